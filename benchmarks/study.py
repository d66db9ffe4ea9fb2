"""Run a study: train each method, let it act, and keep every outcome as one line of a JSONL file.

    python benchmarks/study.py main --dry-run            # the commands, without running them
    python benchmarks/study.py main --workers 2          # into outputs/main; stopped, it goes on where it was
    python benchmarks/study.py main --only dense grids16 --seeds 0 --episodes 10 --output outputs/try
    python benchmarks/results.py outputs/main/main.jsonl # the table again

A study is a file of benchmarks/studies:

    base         policy that every method starts from
    record       options of `lerobot-grids record`: the demonstrations
    fit          options of `lerobot-grids fit` that all methods share
    methods      name: further options of fit. Or name: {fit: ..., of: ..., at: {...}, seeds: [...]}
                   of: acts with the checkpoints of another method, or with this policy, instead of its own training
                   at: tokens, reducer or resolution while it acts, without training for it
    seeds        training seeds; 0 1 2 unless given
    compare      options of `lerobot-grids compare`: all methods side by side, with FLOPs and milliseconds,
    conditions   once for each of these further options
    eval         options of `lerobot-grids eval`: each method on its own
    validate     options of `lerobot-grids validate`: held-out loss, too
    bench        name: options of `lerobot-grids bench`
    program      what is called instead of lerobot-grids

A command that ended is not run again. Another recipe for a policy that is trained already is refused; other options of
an evaluation evaluate again. Nothing is downloaded.
"""

import argparse
import json
import os
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
# One-thread jobs side by side use a small machine better than one job with more threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"HF_HUB_OFFLINE": "1"}


class StudyError(Exception):
    """A command failed, or must not be run."""


def words(options: str | None) -> list[str]:
    """Options as a list; files of this repository are found from anywhere."""
    return [str(ROOT / word) if "/" in word and (ROOT / word).exists() else word for word in shlex.split(options or "")]


class Study:
    """What a study's file asks for, as commands that run in its folder."""

    def __init__(self, content: dict[str, Any], asked: argparse.Namespace, output: Path, file: Path) -> None:
        self.content, self.asked, self.output, self.file = content, asked, output, file
        self.methods = {
            n: {"fit": way} if isinstance(way, str) else way for n, way in content.get("methods", {}).items()
        }
        names = [*self.methods, *content.get("bench", {})]
        if odd := set(asked.only or []) - set(names):
            raise StudyError(f"--only {' '.join(sorted(odd))}; this study has {', '.join(names)}")
        self.chosen = [name for name in self.methods if not asked.only or name in asked.only]
        self.seeds = asked.seeds or content.get("seeds", [0, 1, 2])

    def source(self, name: str) -> str:
        """The method whose training a method acts with, or the policy that it is."""
        return str(self.methods[name].get("of", name))

    def trained(self, name: str) -> bool:
        """Whether a method acts with what this study trains."""
        source = self.source(name)
        return source in self.methods and "of" not in self.methods[source]

    def seeds_of(self, name: str) -> list[int | None]:
        """Training seeds of a method; [None] for a policy as it is."""
        allowed = [self.methods[n].get("seeds", self.seeds) for n in {name, self.source(name)} & set(self.methods)]
        return [seed for seed in self.seeds if all(seed in some for some in allowed)] if self.trained(name) else [None]

    def checkpoint(self, name: str, seed: int | None) -> str:
        """Where a method's policy lies, seen from the study's folder."""
        return self.source(name) if seed is None else f"{self.source(name)}-s{seed}"

    def run(self) -> None:
        """Everything, in order."""
        runs = {(self.source(n), seed): None for n in self.chosen if self.trained(n) for seed in self.seeds_of(n)}
        if runs or "validate" in self.content:
            self.command("demonstrations", ["record", *words(self.content["record"])], creates=True)
        self.parallel(self.fit, sorted(runs, key=lambda run: run[1] or 0))
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
        """As many at once as there are workers, and keep their lines; when one fails, those that run end first."""
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
        options += [] if self.asked.steps is None else ["--steps", str(self.asked.steps)]
        start = ["fit", "--policy", self.content["base"], "--dataset", "demonstrations"]
        self.command(f"{name}-s{seed}", [*start, *options, "--seed", str(seed)], creates=True)
        return []

    def act(self, name: str, seed: int | None) -> list[results.Line]:
        """Evaluate one policy, and validate it where the study does."""
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
        """Set the chosen methods side by side under one condition."""
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
        """The option, where it was given."""
        return [] if self.asked.episodes is None else ["--episodes", str(self.asked.episodes)]

    def load(self, name: str) -> dict[str, Any]:
        """A result."""
        return dict(json.loads((self.output / name).read_text()))

    def command(self, name: str, arguments: list[str], after: list[str] | None = None, creates: bool = False) -> bool:
        """Run a command unless it is done; whether its result is there to be read.

        Args:
            name: Of its log, of its marker, and of the folder that it `creates`.
            arguments: Of lerobot-grids.
            after: What it needs; where that is newer, the command runs again.
            creates: Whether it makes a policy or a dataset, which is never replaced by one of another recipe.
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
                f"{folder} is there, by\n  {was}\nand not by\n  {text}\nRemove it and {done}, or choose --output"
            )
        program = words(self.content.get("program", "lerobot-grids"))
        if self.asked.dry_run:
            print(shlex.join([*program, *arguments]))
            return False
        # Of this virtual environment, active or not.
        beside = Path(sys.executable).with_name(program[0])
        command = [str(beside) if beside.exists() else program[0], *program[1:], *arguments]
        if creates and folder.exists():
            if not begun.is_file():
                raise StudyError(f"{folder} is there, and not by this study; remove it, or choose --output")
            if begun.read_text() == text and (folder / STATE).is_file():
                command.append("--resume")
            else:
                print(f"# half done, again: {name}", flush=True)
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
    parser.add_argument("study", help=f"{names}; or a file of your own")
    parser.add_argument("--output", type=Path, help="folder for policies, logs and results (outputs/STUDY)")
    parser.add_argument("--results", type=Path, help="file for the lines (OUTPUT/STUDY.jsonl)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="training seeds, instead of the study's")
    parser.add_argument("--steps", type=int, help="training steps, instead of the study's")
    parser.add_argument("--episodes", type=int, help="episodes of each task, instead of the study's")
    parser.add_argument("--workers", type=int, default=2, help="one-thread jobs side by side (2)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left to run")
    asked = parser.parse_args(arguments)
    path = Path(asked.study) if asked.study.endswith(".yaml") else STUDIES / f"{asked.study}.yaml"
    if not path.is_file():
        parser.error(f"there is no study '{asked.study}'; there are {names}")
    content = yaml.safe_load(path.read_text())
    output = (asked.output or Path("outputs") / path.stem).resolve()
    file = (asked.results or output / f"{path.stem}.jsonl").resolve()
    print(f"# {content['question']}\ncd {output}", flush=True)
    try:
        Study(content, asked, output, file).run()
    except StudyError as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: stopped; the same command goes on")
    if not asked.dry_run:
        print(f"\n{results.markdown(results.table(results.read(file)))}\n\nlines: {file}")
    return 0


if __name__ == "__main__":
    main()
