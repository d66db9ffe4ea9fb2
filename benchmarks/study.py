"""Run a study: train each method, evaluate it, and save every result as one line of a JSONL file.

    python benchmarks/study.py main --dry-run            # print the commands without running them
    python benchmarks/study.py main --workers 2          # into outputs/main; run it again after a stop to continue
    python benchmarks/study.py main --only dense grids16 --seeds 0 --episodes 10 --output outputs/try
    python benchmarks/results.py outputs/main/main.jsonl # print the table again

A study is a file in benchmarks/studies:

    base         policy that every method starts from
    record       options of `lerobot-grids record`: the demonstrations
    fit          options of `lerobot-grids fit` that all methods share
    methods      name: further options of fit, or name: {fit: ..., of: ..., at: {...}, seeds: [...]}
                   fit: "{dense}" in it is the policy of the method "dense" with the same seed, trained before
                   of: another method, or a policy, whose checkpoints are evaluated; the method itself is not trained
                   at: tokens, reducer, resolution or num_steps in the evaluation, without training for it
    seeds        training seeds; default 0 1 2
    compare      options of `lerobot-grids compare`, which evaluates all methods, with FLOPs and milliseconds
    conditions   further options of compare; it runs once for each
    eval         options of `lerobot-grids eval`, which evaluates each method on its own
    validate     options of `lerobot-grids validate`, to measure the held-out loss too
    bench        name: options of `lerobot-grids bench`
    program      command to run instead of lerobot-grids

A finished command is not run again. If the training options of an existing policy change, the study stops with an
error; if the options of an evaluation change, it runs again. Nothing is downloaded.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import yaml

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "benchmarks" / "studies"
STATE = "training_state/last.ckpt"
# On a small machine, parallel jobs with one thread each are faster than one job with more threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"HF_HUB_OFFLINE": "1"}
# In the options of a method, the policy of another method with the same seed.
OTHER_POLICY = re.compile(r"{(\w+)}")


class StudyError(Exception):
    """A command failed, or its result would replace another one."""


def words(options: str | None) -> list[str]:
    """Split options into a list, and make paths of files in this repository absolute."""
    return [str(ROOT / word) if "/" in word and (ROOT / word).exists() else word for word in shlex.split(options or "")]


class Study:
    """The commands of a study, which run in its output folder."""

    def __init__(self, content: dict[str, Any], asked: argparse.Namespace, output: Path, file: Path) -> None:
        self.content, self.asked, self.output, self.file = content, asked, output, file
        self.methods = {
            n: {"fit": way} if isinstance(way, str) else way for n, way in content.get("methods", {}).items()
        }
        names = [*self.methods, *content.get("bench", {})]
        if odd := set(asked.only or []) - set(names):
            raise StudyError(f"--only {' '.join(sorted(odd))}; this study has {', '.join(names)}")
        for name in self.methods:
            if odd := set(self.needs(name)) - set(self.methods):
                raise StudyError(f"method {name} needs {', '.join(odd)}; this study has {', '.join(self.methods)}")
        self.chosen = [name for name in self.methods if not asked.only or name in asked.only]
        self.seeds = asked.seeds or content.get("seeds", [0, 1, 2])

    def source(self, name: str) -> str:
        """The method, or the policy, whose checkpoints a method is evaluated with."""
        return str(self.methods[name].get("of", name))

    def trained(self, name: str) -> bool:
        """Whether a method is evaluated with checkpoints that this study trains."""
        source = self.source(name)
        return source in self.methods and "of" not in self.methods[source]

    def seeds_of(self, name: str) -> list[int | None]:
        """Training seeds of a method; [None] for an existing policy."""
        allowed = [self.methods[n].get("seeds", self.seeds) for n in {name, self.source(name)} & set(self.methods)]
        return [seed for seed in self.seeds if all(seed in some for some in allowed)] if self.trained(name) else [None]

    def checkpoint(self, name: str, seed: int | None) -> str:
        """Path of a method's policy, relative to the study's folder."""
        return self.source(name) if seed is None else f"{self.source(name)}-s{seed}"

    def needs(self, name: str) -> list[str]:
        """Other methods whose policies the training of a method needs."""
        return OTHER_POLICY.findall(self.methods[name].get("fit", ""))

    def run(self) -> None:
        """Run all commands in order."""
        trained = [self.source(name) for name in self.chosen if self.trained(name)]
        first = [need for name in trained for need in self.needs(name)]
        runs = {(name, seed): None for name in [*first, *trained] for seed in self.seeds_of(name)}
        if runs or "validate" in self.content:
            self.command("demonstrations", ["record", *words(self.content["record"])], creates=True)
        for needing in (False, True):
            group = [run for run in runs if bool(self.needs(run[0])) == needing]
            self.parallel(self.fit, sorted(group, key=lambda run: run[1] or 0))
        if "compare" in self.content:
            for options in self.content.get("conditions", [""]):
                self.compare(options)
        else:
            self.parallel(self.act, [(name, seed) for name in self.chosen for seed in self.seeds_of(name)])
        for name, options in self.content.get("bench", {}).items():
            if self.asked.only and name not in self.asked.only:
                continue
            if self.command(name, ["bench", *words(options), "--json", f"{name}.json"]):
                results.put(self.file, results.bench_lines(self.load(f"{name}.json")))

    def parallel(self, act: Callable[..., list[results.Line]], jobs: list[Any]) -> None:
        """Run jobs in parallel and save their lines. After a failure, running jobs finish and no others start."""
        with ThreadPoolExecutor(1 if self.asked.dry_run else self.asked.workers) as pool:
            futures = [pool.submit(act, *job) for job in jobs]
            try:
                for future in futures:
                    results.put(self.file, future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def fit(self, name: str, seed: int) -> list[results.Line]:
        """Train a method with one seed."""
        options = [*words(self.content.get("fit")), *words(self.methods[name].get("fit"))]
        options = [OTHER_POLICY.sub(lambda found: self.checkpoint(found[1], seed), option) for option in options]
        options += [] if self.asked.steps is None else ["--steps", str(self.asked.steps)]
        start = ["fit", "--policy", *words(self.content["base"]), "--dataset", "demonstrations"]
        self.command(f"{name}-s{seed}", [*start, *options, "--seed", str(seed)], creates=True)
        return []

    def act(self, name: str, seed: int | None) -> list[results.Line]:
        """Evaluate one policy, and validate it if the study does."""
        run, label = self.checkpoint(name, seed), name if seed is None else f"{name}-s{seed}"
        at = [word for key, value in self.methods[name].get("at", {}).items() for word in (f"--{key}", str(value))]
        policy = ["--policy", run, *at]
        lines: list[results.Line] = []
        options = [*words(self.content["eval"]), *self.episodes(), "--output", f"eval/{label}"]
        if self.command(f"{label}.eval", ["eval", *policy, *options], [run]):
            lines.append(results.evaluation_line(self.load(f"eval/{label}/result.json"), name, seed))
        if "validate" in self.content:
            options = ["--dataset", "demonstrations", *words(self.content["validate"]), "--json", f"eval/{label}.json"]
            if self.command(f"{label}.validate", ["validate", *policy, *options], [run]):
                lines += results.validation_lines(self.load(f"eval/{label}.json"), name, seed)
        return lines

    def compare(self, options: str) -> None:
        """Compare the chosen methods under one condition."""
        seeds = {name: self.seeds_of(name) for name in self.chosen}
        policies = {name: [self.checkpoint(name, seed) for seed in seeds[name]] for name in self.chosen}
        methods = [f"{name}={','.join(runs)}" for name, runs in policies.items()]
        if any("at" in self.methods[name] for name in self.chosen):
            more = {name: {"policies": runs} | self.methods[name].get("at", {}) for name, runs in policies.items()}
            methods = ["--methods", json.dumps(more)]
        folder = "-".join(["compare", *options.replace("--", "").replace(":", " ").split()])
        arguments = ["compare", *methods, *words(self.content["compare"]), *words(options), *self.episodes()]
        arguments += ["--workers", str(self.asked.workers), "--output", folder]
        if self.command(folder, arguments, [run for runs in policies.values() for run in runs]):
            lines = [results.comparison_line(self.load(f"{folder}/compare.json"))]
            for name in self.chosen:
                for i, seed in enumerate(seeds[name]):
                    lines.append(results.evaluation_line(self.load(f"{folder}/{name}-{i}.json"), name, seed))
            results.put(self.file, lines)

    def episodes(self) -> list[str]:
        """The option --episodes, if it was given."""
        return [] if self.asked.episodes is None else ["--episodes", str(self.asked.episodes)]

    def load(self, name: str) -> dict[str, Any]:
        """Read a result file."""
        return dict(json.loads((self.output / name).read_text()))

    def command(self, name: str, arguments: list[str], after: list[str] | None = None, creates: bool = False) -> bool:
        """Run a command unless it is done, and return whether its result can be read.

        Args:
            name: Name of its log, of its marker, and of the folder that it creates.
            arguments: Arguments of lerobot-grids.
            after: Names of commands that it needs; if one of them is newer, the command runs again.
            creates: Whether it makes a policy or a dataset. These are never replaced after a change of options.
        """
        arguments += ["--output", name] if creates else []
        text, done, folder = shlex.join(arguments), self.output / "done" / name, self.output / name
        begun, log = self.output / "begun" / name, self.output / "logs" / f"{name}.log"
        needed = [path for other in after or [] if (path := self.output / "done" / other).is_file()]
        was = done.read_text() if done.is_file() else None
        if was == text and all(path.stat().st_mtime <= done.stat().st_mtime for path in needed):
            print(f"# done before: {name}", flush=True)
            return not self.asked.dry_run
        if creates and was is not None:
            raise StudyError(
                f"{folder} was made by\n  {was}\nand not by\n  {text}\nRemove it and {done}, or choose another --output"
            )
        program = words(self.content.get("program", "lerobot-grids"))
        if self.asked.dry_run:
            print(shlex.join([*program, *arguments]))
            return False
        # Use the program of this virtual environment, even if it is not active.
        beside = Path(sys.executable).with_name(program[0])
        command = [str(beside) if beside.exists() else program[0], *program[1:], *arguments]
        if creates and folder.exists():
            if not begun.is_file():
                raise StudyError(f"{folder} was not made by this study; remove it, or choose another --output")
            if begun.read_text() == text and (folder / STATE).is_file():
                command.append("--resume")
            else:
                print(f"# incomplete, runs again: {name}", flush=True)
                shutil.rmtree(folder)
        for path in (done, begun, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(text)
        start = time.monotonic()
        with log.open("w") as file:
            status = subprocess.run(command, cwd=self.output, env=ENVIRONMENT, stdout=file, stderr=file).returncode
        if status:
            end = "\n".join(log.read_text().splitlines()[-15:])
            raise StudyError(f"{name} failed with status {status}\n{shlex.join(command)}\n{end}\nlog: {log}")
        done.write_text(text)
        print(f"{time.strftime('%H:%M:%S')} {time.monotonic() - start:5.0f} s  {name}", flush=True)
        return True


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the study."""
    names = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help=f"{names}, or the path of another file")
    parser.add_argument("--output", type=Path, help="folder for policies, logs and results (outputs/STUDY)")
    parser.add_argument("--results", type=Path, help="file for the lines (OUTPUT/STUDY.jsonl)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run only these methods")
    parser.add_argument("--seeds", nargs="+", type=int, help="training seeds to use instead of the study's")
    parser.add_argument("--steps", type=int, help="training steps to use instead of the study's")
    parser.add_argument("--episodes", type=int, help="episodes of each task to use instead of the study's")
    parser.add_argument("--workers", type=int, default=2, help="number of parallel jobs, with one thread each (2)")
    parser.add_argument("--dry-run", action="store_true", help="print the remaining commands without running them")
    asked = parser.parse_args(arguments)
    path = Path(asked.study) if asked.study.endswith(".yaml") else STUDIES / f"{asked.study}.yaml"
    if not path.is_file():
        parser.error(f"there is no study '{asked.study}'; choose one of {names}")
    content = yaml.safe_load(path.read_text())
    output = (asked.output or Path("outputs") / path.stem).resolve()
    file = (asked.results or output / f"{path.stem}.jsonl").resolve()
    print(f"# {content['question']}\ncd {output}", flush=True)
    try:
        Study(content, asked, output, file).run()
    except StudyError as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: stopped; run the same command to continue")
    if not asked.dry_run:
        print(f"\n{results.markdown(results.table(results.read(file)))}\n\nlines: {file}")
    return 0


if __name__ == "__main__":
    main()
