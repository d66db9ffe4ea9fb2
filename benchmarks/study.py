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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import yaml

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "benchmarks" / "studies"
STATE = "training_state/last.ckpt"


class Failed(Exception):
    """A command failed, or must not be run."""


def words(options: str | None) -> list[str]:
    """Options as a list; files of this repository are found from anywhere."""
    return [str(ROOT / word) if "/" in word and (ROOT / word).exists() else word for word in shlex.split(options or "")]


class Runner:
    """Runs the commands of one study in its folder."""

    def __init__(self, study: dict[str, Any], output: Path, dry_run: bool) -> None:
        self.output, self.dry_run = output, dry_run
        self.program = words(study.get("program", "lerobot-grids"))
        if self.program[0] == "python":
            self.program[0] = sys.executable
        # Beside this Python, where the virtual environment is not active.
        elif (beside := Path(sys.executable).with_name(self.program[0])).exists() and not dry_run:
            self.program[0] = str(beside)
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def marker(self, name: str) -> Path:
        """The file that says that a command ended, and what it was."""
        return self.output / "done" / name

    def done(self, name: str, arguments: list[str], after: list[str], keep: bool = False) -> bool:
        """Whether just this command ended already, later than those it depends on; `keep` refuses another one."""
        marker = self.marker(name)
        if not marker.is_file():
            return False
        was = marker.read_text().rstrip("\n")
        if was == shlex.join(arguments):
            times = [self.marker(other).stat().st_mtime for other in after if self.marker(other).is_file()]
            return all(moment <= marker.stat().st_mtime for moment in times)
        if keep:
            raise Failed(
                f"{self.output / name} is there, from\n  {was}\nand not\n  {shlex.join(arguments)}\n"
                f"Remove {marker}, or choose another --output."
            )
        return False

    def run(
        self, name: str, arguments: list[str], after: list[str] | None = None, *, creates: str | None = None, show=False
    ) -> None:
        """Run a command unless it is done. What it `creates` is kept, if whole; a half-done training run goes on."""
        if self.done(name, arguments, after or [], keep=creates is not None):
            print(f"done before   {name}", flush=True)
            return
        command = [*self.program, *arguments]
        if self.dry_run:
            print(shlex.join(command))
            return
        if creates is not None and (self.output / creates / STATE).is_file():
            command.append("--resume")
        elif creates is not None:
            shutil.rmtree(self.output / creates, ignore_errors=True)
        log, start = self.output / "logs" / f"{name}.log", time.monotonic()
        for path in (log, self.marker(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            streams = {} if show else {"stdout": file, "stderr": subprocess.STDOUT}
            status = subprocess.run(command, cwd=self.output, env=self.environment, **streams).returncode
        if status:
            said = "".join(log.read_text().splitlines(keepends=True)[-15:])
            raise Failed(f"{name} failed, with status {status}:\n{shlex.join(command)}\n{said}")
        self.marker(name).write_text(shlex.join(arguments) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {time.monotonic() - start:5.0f} s  {name}", flush=True)


class Study:
    """What a study's file asks for, as commands."""

    def __init__(self, content: dict[str, Any], asked: argparse.Namespace, output: Path, file: Path) -> None:
        self.content, self.output, self.file, self.workers = content, output, file, asked.workers
        self.runner = Runner(content, output, asked.dry_run)
        self.seeds = asked.seeds or content.get("seeds", [0, 1, 2])
        self.more = [] if asked.episodes is None else [f"--episodes={asked.episodes}"]
        self.steps = [] if asked.steps is None else [f"--steps={asked.steps}"]
        every = content.get("methods") or {}
        self.methods = {name: {"fit": way} if isinstance(way, str) else way for name, way in every.items()}
        self.bench = content.get("bench") or {}
        if odd := set(asked.only or []) - set(self.methods) - set(self.bench):
            raise Failed(f"--only {' '.join(sorted(odd))}; this study has {', '.join((*self.methods, *self.bench))}")
        self.chosen = [name for name in (*self.methods, *self.bench) if not asked.only or name in asked.only]

    def seeds_of(self, name: str) -> list[int | None]:
        """Training seeds of a method; [None] for a policy as it is."""
        way = self.methods[name]
        if "of" in way:
            return [s for s in way.get("seeds", self.seeds_of(way["of"]))] if way["of"] in self.methods else [None]
        return [seed for seed in self.seeds if seed in way.get("seeds", self.seeds)]

    def checkpoint(self, name: str, seed: int | None) -> str:
        """Where a method's policy lies, seen from the study's folder."""
        of = self.methods[name].get("of", name)
        return f"{of}-s{seed}" if of in self.methods else of

    def fit(self, name: str, seed: int) -> None:
        """Train a method with one seed."""
        options = [*words(self.content.get("fit")), *words(self.methods[name].get("fit")), *self.steps]
        run = self.checkpoint(name, seed)
        base = ["--policy", self.content["base"], "--dataset", "demonstrations"]
        arguments = ["fit", *base, *options, "--seed", str(seed), "--output", run]
        self.runner.run(run, arguments, creates=run)

    def train(self) -> None:
        """Record the demonstrations and train everything that the chosen methods act with."""
        wanted = {self.methods[name].get("of", name) for name in self.chosen if name in self.methods}
        runs = [(name, seed) for seed in self.seeds for name in self.methods if name in wanted]
        runs = [(name, seed) for name, seed in runs if "of" not in self.methods[name] and seed in self.seeds_of(name)]
        if runs and "record" in self.content or "validate" in self.content:
            arguments = ["record", *words(self.content["record"]), "--output", "demonstrations"]
            self.runner.run("demonstrations", arguments, creates="demonstrations")
        self.parallel(self.fit, runs)

    def parallel(self, act: Any, jobs: list[tuple[Any, ...]]) -> None:
        """As many at once as there are workers; what runs still ends when one has failed, and nothing new starts."""
        with ThreadPoolExecutor(1 if self.runner.dry_run else self.workers) as pool:
            futures = [pool.submit(act, *job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def act(self, name: str, seed: int | None) -> None:
        """Evaluate one policy, and validate it where the study does."""
        way, run = self.methods[name], self.checkpoint(name, seed)
        label = name if seed is None else f"{name}-s{seed}"
        at = [f"--{option}={value}" for option, value in way.get("at", {}).items()]
        for command in ("eval", "validate"):
            if command not in self.content:
                continue
            result, data = f"{label}.{command}.json", ["--dataset", "demonstrations"] if command == "validate" else []
            arguments = [command, "--policy", run, *at, *data, *words(self.content[command]), "--json", result]
            arguments += [*self.more, "--output", f"eval/{label}"] if command == "eval" else []
            self.runner.run(f"{label}.{command}", arguments, [run])
            if not self.runner.dry_run:
                content = json.loads((self.output / result).read_text())
                if command == "eval":
                    self.put([results.evaluation_line(content, name, seed)])
                else:
                    self.put(results.validation_lines(content, name, seed))

    def put(self, lines: list[results.Line]) -> None:
        """Keep lines. A policy's name is that of its method, without folders of this machine."""
        results.put(self.file, lines)

    def compare(self, options: str) -> None:
        """Set the chosen methods side by side under one condition."""
        names = [name for name in self.chosen if name in self.methods]
        policies = {name: [self.checkpoint(name, seed) for seed in self.seeds_of(name)] for name in names}
        if any("at" in self.methods[name] for name in names):
            ways = {name: {"policies": policies[name]} | self.methods[name].get("at", {}) for name in names}
            chosen = ["--methods", json.dumps(ways)]
        else:
            chosen = [f"{name}={','.join(runs)}" for name, runs in policies.items()]
        folder = "compare" + options.replace("--", "-").replace(" ", "-").replace(":", "-").replace("=", "-")
        arguments = ["compare", *chosen, *words(self.content["compare"]), *words(options), *self.more]
        arguments += ["--workers", str(self.workers), "--output", folder]
        self.runner.run(folder, arguments, [run for runs in policies.values() for run in runs])
        if self.runner.dry_run:
            return
        self.put([results.comparison_line(json.loads((self.output / folder / "compare.json").read_text()))])
        for name in names:
            for number, seed in enumerate(self.seeds_of(name)):
                content = json.loads((self.output / folder / f"{name}-{number}.json").read_text())
                self.put([results.evaluation_line(content, name, seed)])

    def run(self) -> None:
        """Everything, in order."""
        self.train()
        if "compare" in self.content:
            for options in self.content.get("conditions", [""]):
                self.compare(options)
        else:
            self.parallel(self.act, [(n, seed) for n in self.chosen if n in self.methods for seed in self.seeds_of(n)])
        for name in (name for name in self.chosen if name in self.bench):
            self.runner.run(name, ["bench", *words(self.bench[name]), "--json", f"{name}.json"])
            if not self.runner.dry_run:
                self.put(results.bench_lines(json.loads((self.output / f"{name}.json").read_text())))


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
    output = (asked.output or Path("outputs") / path.stem).resolve()
    file = asked.results or output / f"{path.stem}.jsonl"
    try:
        study = Study(yaml.safe_load(path.read_text()), asked, output, file.resolve())
        print(f"cd {output}" if asked.dry_run else f"{path.stem}: {study.content['question']}\nin {output}", flush=True)
        study.run()
    except Failed as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    if not asked.dry_run:
        print(f"\n{results.markdown(results.table(results.read(file)))}\n\nlines: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
