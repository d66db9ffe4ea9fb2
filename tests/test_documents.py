"""What the documents say can be typed: every block of code runs or parses, every link, option and picture is there."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import kept_results
from lerobot_grids.policies.sources import sources
from lerobot_grids_cli import parser as cli_parser
from lerobot_grids_cli.fit_options import EXAMPLES as FIT_EXAMPLES
from lerobot_grids_cli.fit_options import FitOptions
from lerobot_grids_cli.main import COMMANDS
from lerobot_grids_cli.main import main as run_cli
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import REFUSED, families

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.append(ROOT / "benchmarks" / "README.md")
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
MARKDOWN = [*DOCUMENTS, ROOT / "CHANGELOG.md", *(ROOT / "policies").rglob("*.md")]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
LARGEST_PICTURE = 200_000

# What documents speak of -> the fixture, or the text, that stands for it. Where two fit, the longer one does.
STAND_INS = {
    "me/my_robot_data": "dataset",
    "data/push": "dataset",
    "outputs/dense": "dense_checkpoint",
    "outputs/dense-16-elastic": "grids_checkpoint",
    "outputs/smolvla_base-16": "grids_checkpoint",
    "outputs/smolvla_base-16/pretrained_model": "grids_checkpoint",
    "outputs/dense-16-elastic/pretrained_model": "grids_checkpoint",
    "outputs/tiny-16": "grids_checkpoint",
    "outputs/tiny-16/pretrained_model": "grids_checkpoint",
    "validate.json": "result",
    "outputs/robot-16/pretrained_model": "grids_checkpoint",
    "outputs/eval/smolvla_base-16/result.json": "result",
    "max_steps=1000": "max_steps=1",
}
# Lines that are run as they are, offline and in seconds.
RUN = (
    r"lerobot-grids push .* --dry-run",
    r"lerobot-grids validate .*-elastic .*",
    r"python benchmarks/study.py main --dry-run",
    r"python benchmarks/results.py .*",
)
LEROBOT = {
    "lerobot-train": ("lerobot.configs.train", "TrainPipelineConfig"),
    "lerobot-eval": ("lerobot.configs.eval", "EvalPipelineConfig"),
    "lerobot-rollout": ("lerobot.rollout", "RolloutConfig"),
    "lerobot-record": ("lerobot.scripts.lerobot_record", "RecordConfig"),
}
ROBOT_CLIENT = "lerobot.async_inference.robot_client"
# Scripts of benchmarks whose command line is the signature of `main`.
SIGNATURES = ("training_cost", "adapter_size")
# Scripts whose options alone are checked.
WITH_OPTIONS = {
    *("latency", "export_size", "stages", "soak", "libero_expert", "reference", "training_step"),
    *("scenes", "sheet", "tower", "grounding", "control", "expert", "told", "corrections"),
}
# Options of other programs that documents name in passing.
FOREIGN = {
    "--operation.type",
    "--operation.episode_indices",
    "--print_config",
    "--help_all",
    "--help",
    "--config",
    "--display_data",
    "--display_mode",
    "--inference.type",
    "--save_checkpoint_to_hub",
    "--secrets",
    "--job.target",
    "--dataset.no_stamp",
    "--robot.max_relative_target",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    path: Path
    line: int
    language: str
    text: str


def blocks_of(path):
    found, fence = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence = (number, line[3:].strip(), [])
            else:
                found.append(Block(path, fence[0], fence[1], "\n".join(fence[2]) + "\n"))
                fence = None
        elif fence is not None:
            fence[2].append(line)
    assert fence is None, f"{path}:{fence[0]} is never closed"
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def lines_of(block):
    """The commands of a shell block, each in one line, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def prose_of(path):
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


SHELL = [(b, words) for b in BLOCKS if b.language == "bash" for words in lines_of(b)]


def named(case):
    block, words = case
    return f"{block.path.name}:{block.line} {' '.join(words)[:60]}"


def chosen(*programs):
    cases = [case for case in SHELL if program_of(case[1]) in programs]
    return {"argvalues": cases, "ids": map(named, cases)}


def program_of(words):
    """What a command line runs; ours may be launched by another."""
    launched = words[0] in ("torchrun", "srun") and any("lerobot-grids" in word for word in words)
    return "lerobot-grids" if launched else words[0]


def after_program(words):
    """Arguments of lerobot-grids, by whatever it is launched."""
    return words[1:] if words[0] == "lerobot-grids" else words[words.index("fit") :]


@pytest.fixture
def result(grids_checkpoint, tmp_path):
    """A result.json of `lerobot-grids eval`, as of that checkpoint."""
    path = tmp_path / "result.json"
    content = kept_results.write_evaluation("demo", "grids16", path)
    path.write_text(json.dumps(content | {"policy": str(grids_checkpoint)}))
    return path


@pytest.fixture
def replaced(request):
    """Puts what `STAND_INS` names into a text."""
    longest_first = sorted(STAND_INS, key=len, reverse=True)
    pattern = re.compile("|".join(rf"{re.escape(name)}(?![\w/-])" for name in longest_first))

    def stand_in(match):
        value = STAND_INS[match[0]]
        return value if "=" in value else str(request.getfixturevalue(value))

    return lambda text: pattern.sub(stand_in, text)


@cache
def fit_parser():
    """The parser of `lerobot-grids fit`, whose class would train next."""
    from lerobot_grids_cli import fit_lightning

    with pytest.MonkeyPatch.context() as patch:
        for step in ("before_instantiate_classes", "instantiate_classes"):
            patch.setattr(fit_lightning.FitCLI, step, lambda cli: None)
        # Lightning warns where it is given other arguments than its process.
        patch.setattr(sys, "argv", ["lerobot-grids"])
        return fit_lightning._parse(["--dataset", "a/b"]).parser


@pytest.fixture
def options_of(monkeypatch):
    """Parses a command line of lerobot-grids and returns its options, without running anything."""
    monkeypatch.chdir(ROOT)

    def parse(arguments):
        name, *rest = arguments
        if name == "fit":
            return vars(fit_parser().parse_args(cli_parser.switched_on(FitOptions, rest)))
        module, seen = import_module(f"lerobot_grids_cli.{COMMANDS[name][0]}"), {}
        monkeypatch.setattr(module, "run", lambda *a, **k: seen.update(cli_parser.parse(*a, **k)))
        module.main(rest)
        assert seen
        return seen

    def checked(arguments):
        options = parse(arguments)
        check_values(options)
        return options

    return checked


def check_values(options):
    """Values that the parser takes as text: budgets, reducers, schedules, perturbations."""
    from lerobot_grids.evaluation.tampering import parse_tamperings
    from lerobot_grids.policies import parse_tokens
    from lerobot_grids.simulation.perturbations import parse_perturbations
    from lerobot_policy_grids.reducers import reducer_config
    from lerobot_policy_grids.schedule import TokenSchedule

    for count in str(options.get("tokens") or 1).split(","):
        parse_tokens(count)
    reducer = options.get("reducer") or "grids"
    if isinstance(reducer, dict):
        values = {"type": "grids", **reducer}
        reducer_config(values.pop("type"), **values)
    else:
        for name in reducer.split(","):
            reducer_config(name)
    if "schedule" in options:
        TokenSchedule(options["schedule"], 256, 16, 100)
    parse_tamperings(options.get("tamper"))
    parse_perturbations(options.get("perturb") or "", options.get("env") or "metaworld")
    for method in (options.get("methods") or {}).values():
        check_values({name: value for name, value in method.items() if name != "policies"})


# Blocks.


def test_every_block_says_its_language():
    """One that says none is a drawing of folders; text is what a command printed."""
    assert {block.language for block in BLOCKS} == {"", "bash", "python", "json", "bibtex", "text"}
    for block in BLOCKS:
        assert block.language or "/" in block.text.splitlines()[0], f"{block.path}:{block.line}"


# Those of export.md need neither torch nor a policy: tests/contracts/test_export.py runs them without.
WITH_PYTHON = sorted({b.path for b in BLOCKS if b.language == "python" and b.path.name != "export.md"})


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.name)
def test_python_blocks_run(path, replaced, dense_checkpoint, tmp_path, monkeypatch):
    """In one namespace, where `policy` is a dense policy to begin with."""
    from lerobot_grids import load
    from lerobot_policy_grids import GridsPolicy

    monkeypatch.chdir(tmp_path)
    namespace = {"policy": load(dense_checkpoint).policy}
    for block in (block for block in BLOCKS if (block.path, block.language) == (path, "python")):
        exec(compile(replaced(block.text), f"{path}:{block.line}", "exec"), namespace)
        assert isinstance(namespace["policy"], GridsPolicy)


def test_readme_has_the_two_lines_and_the_training():
    (*_, first, _, last) = [b.text for b in BLOCKS if b.path.name == "README.md" and b.language == "python"]
    assert "compress(policy, num_tokens=16)" in first
    assert "Trainer(" in last


def test_json_blocks_are_json():
    for block in (block for block in BLOCKS if block.language == "json"):
        json.loads(block.text)


def test_every_shell_line_is_of_a_program_that_is_checked():
    checks = {"lerobot-grids", *LEROBOT, "make", "python", "pip", ".venv/bin/python", "bash", "sbatch", "hf"}
    assert {program_of(words) for _, words in SHELL} - checks == {"git", "cd", "export", "ssh"}


@pytest.mark.parametrize("case", **chosen("lerobot-grids"))
def test_our_commands_parse(case, options_of):
    assert options_of(after_program(case[1]))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_parse(name, options_of):
    examples = FIT_EXAMPLES if name == "fit" else cli_parser.examples_of(function_of(name))
    assert len(examples) in (2, 3)
    for example in examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("lerobot-grids", name)
        options_of([command, *arguments])


@pytest.mark.parametrize("case", **chosen(*LEROBOT))
def test_lerobots_commands_parse(case, replaced, monkeypatch, tmp_path):
    """By LeRobot's own parser; training also validates what it is told."""
    from lerobot.configs import parser
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    program, *arguments = case[1]
    module, kind = LEROBOT[program]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *map(replaced, arguments)])
    if program == "lerobot-rollout":
        import lerobot.scripts.lerobot_rollout  # noqa: F401  (registers robots)

    def main(config):
        return config

    main.__annotations__["config"] = getattr(import_module(module), kind)
    config = parser.wrap()(main)()
    if program == "lerobot-record":
        assert config.dataset.num_episodes > 0
        return
    assert config.policy.type == "grids"
    if program == "lerobot-train":
        config.validate()
    asked = dict(re.findall(r"--policy\.([\w.]+)=(\S+)", " ".join(arguments)))
    tokens = asked.get("num_tokens", asked.get("reducer.num_tokens"))
    assert tokens is None or config.policy.reducer.num_tokens == int(tokens)


@pytest.mark.parametrize("case", **chosen("make"))
def test_make_targets_exist(case):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(case[1][1:]) <= set(targets)


@pytest.mark.parametrize("case", **chosen("bash", "sbatch"))
def test_scripts_of_examples_are_there(case):
    _, script, *arguments = case[1]
    assert ROOT / script in SCRIPTS
    # The first lines of the script show how it is called, with as many arguments.
    shown = next(line for line in (ROOT / script).read_text().splitlines() if script in line).split(script)[1]
    assert len([a for a in arguments if not a.startswith("-")]) == len(re.sub(r"\[.*\]", "", shown).split())


@pytest.mark.parametrize("case", **chosen("hf"))
def test_hub_commands_exist(case):
    hub_command(case[1][1:])


@pytest.mark.parametrize("case", **chosen("pip"))
def test_extras_exist(case):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (package, extra) = re.search(r"(lerobot_policy_grids|lerobot|\.)\[(\w+)\]", " ".join(case[1])).groups()
    known = metadata("lerobot").get_all("Provides-Extra") if package == "lerobot" else known
    assert extra.replace("_", "-") in [name.replace("_", "-") for name in known]


def hub_command(words):
    """Parses a command line of `hf`, and returns what it was given."""
    from huggingface_hub.cli.hf import app

    command, name = app, "hf"
    while hasattr(command, "commands"):
        name, *words = words
        command = command.get_command(None, name)
        assert command is not None, name
        # The Hub's client imports some of its commands when they are asked for.
        command = command.materialize() if hasattr(command, "materialize") else command
    return command.make_context(name, list(words)).params


def client_options():
    """Options of LeRobot's robot_client."""
    from lerobot.async_inference.configs import RobotClientConfig

    return {field.name for field in fields(RobotClientConfig)}


def check_python(arguments):
    """What follows `python`: a program that compiles, a test file, or a script of benchmarks and its arguments."""
    if arguments[0] == "-c":
        compile(arguments[1], "<document>", "exec")
    elif arguments[:2] == ["-m", ROBOT_CLIENT]:
        given = dict(word.removeprefix("--").split("=", 1) for word in arguments[2:])
        assert {name for name in given if not name.startswith("robot.")} <= client_options(), given
        assert isinstance(yaml.safe_load(given["robot.cameras"]), dict)
    elif arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).is_file()
    else:
        check_script(ROOT / arguments[0], arguments[1:])


def arguments_of(path):
    """Options that a script, or what it takes its command line from, gives to argparse."""
    text = path.read_text()
    if "from stage import" in text:
        text += (path.parent / "stage.py").read_text()
    return set(re.findall(r'add_argument\("(--[\w-]+)"', text))


def check_script(path, arguments):
    assert path.is_file(), path
    name, text = path.stem, path.read_text()
    if name == "study":
        assert (ROOT / "benchmarks" / "studies" / f"{arguments[0]}.yaml").is_file(), arguments
        assert {word for word in arguments if word.startswith("--")} <= arguments_of(path), arguments
        content = yaml.safe_load((ROOT / "benchmarks" / "studies" / f"{arguments[0]}.yaml").read_text())
        if "--only" in arguments:
            only = arguments[arguments.index("--only") + 1 :]
            assert set(only) <= {*content.get("methods", {}), *content.get("bench", {})}
    elif name in WITH_OPTIONS:
        assert {word for word in arguments if word.startswith("--")} <= arguments_of(path), arguments
    elif name == "results":
        assert (ROOT / arguments[0]).is_file(), arguments
    elif name == "perturbations":
        assert f'"{arguments[0]}"' in text or arguments[0] == "expert", arguments
    elif name == "pretend":
        assert len(arguments) == 1
    elif name in SIGNATURES:
        required = re.search(r"def main\(\s*(.*?)\) ->", text, flags=re.S)[1]
        assert len([a for a in arguments if not a.startswith("-")]) == len(
            re.findall(r"\w+: (?:str|Path)(?= *[,)]|$)", required)
        )
    else:
        raise AssertionError(f"nothing is known of the command line of {path}")


@pytest.mark.parametrize("case", **chosen("python", ".venv/bin/python"))
def test_python_lines_point_to_programs(case):
    check_python([word for word in case[1][1:] if word != "|"])


EXECUTED = [case for case in SHELL if any(re.fullmatch(pattern, " ".join(case[1])) for pattern in RUN)]


def test_some_lines_are_run():
    assert {pattern for pattern in RUN if any(re.fullmatch(pattern, " ".join(w)) for _, w in EXECUTED)} == set(RUN)


@pytest.mark.parametrize("case", EXECUTED, ids=map(named, EXECUTED))
def test_quick_lines_run(case, replaced, tmp_path, monkeypatch, capsys):
    program, *arguments = case[1]
    if program == "python":
        command = [sys.executable, *arguments]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    else:
        monkeypatch.chdir(tmp_path)
        status = run_cli(list(map(replaced, arguments)))
        said, errors = capsys.readouterr()
        assert status == 0, errors
    assert len(said.splitlines()) > 3


def test_every_stand_in_is_needed():
    text = "".join(block.text for block in BLOCKS)
    assert [name for name in STAND_INS if name not in text] == []


# Prose.


def spans_of(path):
    """What stands in backticks in a document's prose, each in one line."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(path))]


SPANS = [(path, span) for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"] for span in spans_of(path)]


def function_of(name):
    """What a subcommand runs; `fit` has a class."""
    module = import_module(f"lerobot_grids_cli.{COMMANDS[name][0]}")
    return vars(module)["evaluate" if name == "eval" else COMMANDS[name][0]]


def known_options():
    """Every option of every subcommand, and of a reducer."""
    from inspect import signature

    from lerobot_policy_grids.reducers import ReducerConfig

    options = set()
    for name in COMMANDS.keys() - {"fit"}:
        options |= {f"--{parameter}" for parameter in signature(function_of(name)).parameters}
    options |= set(fit_parser()._option_string_actions)
    for kind in ReducerConfig.get_known_choices().values():
        options |= {f"--reducer.{field.name}" for field in fields(kind)}
    for script in ("latency", "libero_expert", "soak", "training_step", "where/__main__"):
        options |= arguments_of(ROOT / "benchmarks" / f"{script}.py")
    options |= {f"--{name}" for name in client_options()}
    return options | {"--reducer.type", "--dry-run"} | FOREIGN


def test_options_in_prose_exist():
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    from lerobot_policy_grids import GridsConfig

    known = known_options() | {f"--base.{field.name}" for kind in (ACTConfig, GrootConfig) for field in fields(kind)}
    ours = {field.name for kind in (GridsConfig, PI0Config, SmolVLAConfig) for field in fields(kind)} | {"path"}
    checked = 0
    for path, span in SPANS:
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
            checked += 1
            option = option.rstrip(".")
            if option.startswith("--policy."):
                assert option.split(".")[1] in ours, (path.name, span)
            elif not option.startswith("--env."):
                assert option in known or span.startswith(("python ", "torchrun")), (path.name, span)
    assert checked > 80


def test_python_lines_in_prose_point_to_programs():
    scripts = ("study", "adapter_size", "latency", "libero_expert", "training_step")
    starts = ("python benchmarks/", *(f"{name}.py " for name in scripts))
    spans = [(path, span) for path, span in SPANS if span.startswith(starts)]
    assert len(spans) > 20
    for _, span in spans:
        words = shlex.split(span.replace("FILE.", "main."))
        words = words[1:] if words[0] == "python" else [f"benchmarks/{words[0]}", *words[1:]]
        if len(words) > 1 and "--help" not in words:
            check_python(words)


def test_commands_in_prose_parse(options_of):
    spans = [span for _, span in SPANS if re.match(r"lerobot-grids (?!NAME)\w+ .*-", span) and "..." not in span]
    assert spans
    for span in spans:
        words = shlex.split(span.replace("RUN/", "run/"))[1:]
        if words[0] in COMMANDS and "--help_all" not in words and "--help" not in words:
            options_of(words)


# Examples and studies.


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_parse(path, options_of):
    """As the command in their first line reads them; every line of the file arrives."""
    program, *arguments = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert program == "lerobot-grids"
    options = options_of(arguments)
    for name, value in yaml.safe_load(path.read_text()).items():
        given = options[name]
        if isinstance(value, dict):
            assert value.items() <= (given if isinstance(given, dict) else vars(given)).items()
        else:
            assert given == value


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_commands_of_studies_parse(path, options_of, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = kept_results.load_script("study")
    study.main([path.stem, "--dry-run", "--output", str(tmp_path)])
    said = {re.sub(r"--seed \d+|-s\d+", "", line) for line in capsys.readouterr().out.splitlines()[2:]}
    assert said
    for line in said:
        words = shlex.split(line)
        options_of(words[next(i for i, word in enumerate(words) if word in COMMANDS) :])


# Links, pictures and tables.


def slug(heading):
    """How a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", prose_of(path)):
        if "://" in target:
            continue
        place = path.parent / target if target else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", prose_of(place), flags=re.M)
            assert anchor in map(slug, headings), f"{path.name}: {target}#{anchor}"


def test_pictures_are_small_and_shown():
    shown = {
        (path.parent / target).resolve()
        for path in DOCUMENTS
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text())
    }
    assert shown == {path.resolve() for path in (ROOT / "docs").glob("*.png")}
    for picture in shown:
        assert picture.stat().st_size < LARGEST_PICTURE, picture


TABLES = {"training": "training.md"} | dict.fromkeys(
    ("main", "few-tokens", "frozen-vision", "ablations", "untrained", "perturbed", "act"), "results.md"
)
# Measured with other episodes than the rest; the text has it.
LEFT_OUT = {"ablations": {"fast-sampler"}}


def tables_of(path):
    """Each table of a document, as its header and its rows."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), flags=re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip().split("|")[1:-1]] for line in table.splitlines()]
        yield header, rows


@pytest.mark.parametrize("study", TABLES)
def test_tables_are_those_of_the_kept_results(study):
    """Row by row as benchmarks/results.py prints them; a table may leave columns out."""
    header, *rows = kept_results.results.table(kept_results.lines(study))
    shown = [(h, r) for h, r in tables_of(ROOT / "docs" / TABLES[study]) if set(h) <= set(header) and "" in h]
    assert shown
    for row in rows:
        if row[0] not in LEFT_OUT.get(study, ()):
            values = dict(zip(header, row, strict=True))
            assert any([values[name] for name in names] in found for names, found in shown), row


def test_the_readme_repeats_the_kept_results():
    """Its table of successes by reducer and tokens, and the demo's."""
    results, tables = kept_results.results, list(tables_of(ROOT / "README.md"))
    counts = {row[0]: row for row in results.table(kept_results.lines("main"))}
    ((names, rows),) = [table for table in tables if table[0][:2] == ["tokens", "dense"]]
    for tokens, *cells in rows:
        for name, cell in zip(names[1:], cells, strict=True):
            method = "dense" if name == "dense" else f"{name}{tokens}"
            assert not cell or f"{cell}/1200" in counts[method], method
    demo = {row[0]: row for row in results.table(kept_results.lines("demo"))}
    ((_, rows),) = [table for table in tables if table[0][:2] == ["policy", "visual tokens"]]
    assert len(rows) == len(demo) - 1
    for name, tokens, *tasks, total in rows:
        assert [tokens, *(task.split("/")[0] for task in tasks)] == demo[name][1 : 2 + len(tasks)]
        assert total.startswith(demo[name][2 + len(tasks)] + ", ")
        assert total.endswith(f"{demo[name][3 + len(tasks)]} %")


def test_policies_has_a_row_for_every_policy_of_lerobot():
    """Supported ones with what was measured of them, the others with the reason that the commands give."""
    tables = list(tables_of(ROOT / "docs" / "policies.md"))
    ((_, rows),) = [table for table in tables if table[0][:2] == ["policy", "`--policy`"]]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[1])) == sorted(sources())
    kept = kept_results.lines("bench")
    for row in rows:
        (name, *_) = re.findall(r"`(\w+)`", row[1])
        costs = {x["name"]: x for x in kept if (x["policy"], x["cameras"], x.get("device")) == (name, 2, None)}
        if costs:
            dense, sampled = (sum(costs[variant]["flops"].values()) for variant in ("dense", "K=16"))
            assert row[2].startswith(f"{costs['dense']['visual_tokens']} = ")
            assert row[3] == f"−{100 * (1 - sampled / dense):.1f} %"  # noqa: RUF001
        else:
            assert row[3] == "not counted"
        family = next(family for family in families().values() if name in family.sources)
        try:
            family.act_through(None, None, SimpleNamespace(name="fast"))
        except UnsupportedPolicyError:
            assert row[5].startswith("no")
        except AttributeError:  # it goes on, and there is no policy
            assert row[5] == "yes"
    ((_, rows),) = [table for table in tables if table[0][0] == "policy type"]
    refused = {name: why for names, why in rows for name in re.findall(r"`(\w+)`", names)}
    assert refused == {name: refusal.reason for name, refusal in REFUSED.items()}


def test_flops_are_the_kept_ones():
    """Each row of docs/flops.md, whose policies are called as in docs/policies.md."""
    ((_, rows),) = [t for t in tables_of(ROOT / "docs" / "policies.md") if t[0][:2] == ["policy", "`--policy`"]]
    names = {row[0]: re.findall(r"`(\w+)`", row[1])[0] for row in rows}
    ((header, rows),) = [t for t in tables_of(ROOT / "docs" / "flops.md") if t[0][:2] == ["policy", "cameras"]]
    assert header[2:6] == ["language tokens", "dense", "K = 16", "cut"]
    kept, shown = kept_results.lines("bench"), set()
    for policy, cameras, words, *cells in rows:
        key = (names[policy.split(",")[0]], int(cameras), None)
        costs = {x["name"]: x for x in kept if (x["policy"], x["cameras"], x.get("device")) == key}
        full, few = (sum(costs[name]["flops"].values()) for name in ("dense", "K=16"))
        sampler = costs["K=16"]["flops"]["sampler"]
        cut = f"−{100 * (1 - few / full):.1f} %"  # noqa: RUF001
        assert [words, *cells] == [
            str(costs["dense"]["language_tokens"]),
            f"{full / 1e9:.0f}",
            f"{few / 1e9:.0f}",
            cut,
            f"{sampler / 1e9:.2f}",
        ]
        shown.add(key[0])
    assert shown == set(names.values()) - {"tiny"}


def test_the_batches_that_fit_are_the_kept_ones():
    """Each row of docs/choose.md, and each policy that was predicted."""
    ((header, rows),) = [t for t in tables_of(ROOT / "docs" / "choose.md") if t[0][:2] == ["policy", "trained"]]
    kept = {
        (line["policy"], row["train"], "yes" if row["gradient_checkpointing"] else "no", row["name"]): row["fits"]
        for line in kept_results.lines("steps")
        for row in line["rows"]
    }
    for policy, train, checkpointing, tokens, *batches in rows:
        fits = kept[policy.strip("`"), train, checkpointing, "dense" if tokens == "all" else f"K={tokens}"]
        expected = {f"{size} GB": str(count or "\u2013") for size, count in fits.items()}
        assert dict(zip(header[4:], batches, strict=True)) == expected
    assert {row[0].strip("`") for row in rows} == {line["policy"] for line in kept_results.lines("steps")}


def test_documents_name_no_place_of_one_machine():
    for path in MARKDOWN:
        assert not re.search(r"/(?:home|root|work|tmp|Users)/", path.read_text()), path


def test_the_drawn_recording_has_the_joints_of_lerobots_robot():
    spec = spec_from_file_location("pretend", ROOT / "examples" / "so101" / "pretend.py")
    pretend = module_from_spec(spec)
    spec.loader.exec_module(pretend)
    robot = Path(find_spec("lerobot.robots.so_follower").origin).with_name("so_follower.py").read_text()
    motors = re.findall(r'"(\w+)": Motor\(', robot)
    features, frames = pretend.features(), pretend.episode(np.random.default_rng(0))
    assert features["action"]["names"] == features["observation.state"]["names"] == [f"{name}.pos" for name in motors]
    for name, feature in features.items():
        assert {frame[name].shape for frame in frames} == {feature["shape"]}


# What variables of the scripts in examples stand for.
VARIABLES = {
    '"$(dirname "$0")/': '"examples/',
    '"$@"': "",
    '"$STEPS"': "1",
    '"$TRIALS"': "1",
    '"$RESUME"': "true",
    '"$SLURM_NNODES"': "2",
    '"$SLURM_NTASKS_PER_NODE"': "4",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_of_examples_are_commands_that_parse(path, options_of):
    """Variables stand for what they are set to; `make demo` runs the demo itself."""
    text = path.read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", "-c", text], check=True)
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    lines = [shlex.split(line) for line in text.splitlines() if "lerobot-grids " in line]
    commands = [words for words in lines if words and "lerobot-grids" in words and words[0] != "#"]
    assert len(commands) == (7 if path.stem == "demo" else 1)
    for words in commands:
        if words[0] == "hf":
            assert hub_command(words[1:])["flavor"]
        options_of(words[words.index("lerobot-grids") + 1 :])
