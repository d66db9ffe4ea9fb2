"""Train on random small datasets with random options of `fit`, and check what the policy got and what was saved.

    python benchmarks/fuzz_datasets.py                              # 200 cases, about 4 minutes on one core
    python benchmarks/fuzz_datasets.py --seed 1 --count 500 --results benchmarks/results/fuzz-datasets.jsonl
    python benchmarks/fuzz_datasets.py --only 17                    # one of them again, with all that it printed

A case combines the properties of the datasets in tests/helpers/zoo.py with options of `lerobot-grids fit`, sensible or
not. It is fine if it trains and everything in tests/helpers/trials.py holds, or if it is refused in one line with
nothing written. Case N of a seed is the same whatever --count is. Results are lines of JSON: number, family, status
(trained, refused or wrong), line, what was drawn, seconds.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

SIZES = ((48, 64), (64, 48), (64, 64), (80, 48), (96, 96), (17, 33))
CAMERAS = (
    "observation.images.top",
    "observation.images.wrist",
    "observation.images.side",
    "observation.image",
    "image",
    "wrist_image",
)
TASKS = (
    "push the cube",
    "",
    "abra_cadabra",
    "把红色方块放进碗里",
    "two\nlines",
    "the cube " * 40 + "a",
    "the cube " * 40 + "b",
)
REDUCERS = ("grids", "uniform", "pool", "random", "tome", "blind", "fastv", "sparsevlm")
SCHEDULES = ("constant", "linear", "cosine", "exponential", "elastic", "elastic:4,9", "elastic:2-12", "steps:0=36,1=4")


class Draw:
    """Random choices of one case.

    Args:
        seed: Of all cases.
        number: Of this one.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.random = np.random.default_rng([seed, number])

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def one(self, values: Any) -> Any:
        return values[int(self.random.integers(len(values)))]

    def some(self, values: Any, least: int, most: int) -> list[Any]:
        count = min(int(self.random.integers(least, most + 1)), len(values))
        return [values[i] for i in self.random.permutation(len(values))[:count]]

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))


def draw_recording(draw: Draw) -> Any:
    """What is recorded."""
    import zoo

    video = draw.one(("h264", "libsvtav1")) if draw.chance(0.06) else None
    names = draw.some(CAMERAS[:3], 1, 3) if draw.chance(0.8) else draw.some(CAMERAS, 0, 4)
    state = draw.one((1, 2, 4, 6, 7, 14, 32)) if draw.chance(0.9) else draw.one((0, 33))
    extra = {}
    if draw.chance(0.2):
        extra["note"] = (zoo.TEXT, "fine")
    if draw.chance(0.2):
        extra["observation.force"] = (zoo.VECTOR, np.ones(3, np.float32))
    return zoo.Recording(
        fps=draw.one((5, 10, 30, 50)),
        cameras={name: zoo.VIDEO_SIZE if video else draw.one(SIZES) for name in names},
        image_names=draw.one(
            (("height", "width", "channels"), ("height", "width", "channel"), None, ("a", "b", "rgb"))
        ),
        video=video,
        state=state,
        action=state if state and draw.chance(0.6) else draw.one((1, 3, 4, 7, 32)) if draw.chance(0.95) else 0,
        state_name="observation.qpos" if draw.chance(0.1) else "observation.state",
        grouped=draw.one((False, True, None)),
        joints=draw.one(("joint", "arm.pos", "größe")),
        # LeRobot cannot join videos of one frame.
        lengths=tuple(draw.number(4 if video else 1, 10) for _ in range(draw.number(1, 5))),
        tasks=tuple(draw.some(TASKS[:5] if draw.chance(0.8) else TASKS, 1, 3)),
        depth=draw.chance(0.05),
        extra=extra,
        still=(0,) if draw.chance(0.1) else (),
        still_at=draw.one((0.0, 0.1, 777.7)),
        offset=draw.one((0, 0, 0, 1000)),
        seed=draw.number(0, 99),
    )


def draw_change(draw: Draw, recording: Any) -> Any:
    """What is changed afterwards; mostly nothing."""
    import zoo

    if draw.chance(0.8):
        return None
    frames = sum(recording.lengths)
    changes = [zoo.without_quantiles, zoo.annotate, zoo.old_version, zoo.damage, zoo.without_statistics]
    if frames > 8:
        changes += [zoo.cut_frames, zoo.swap_frames, partial(zoo.shift_time, seconds=draw.one((0.00005, 0.002, 0.1)))]
    if frames > 6 and recording.state > 1 and recording.state_name == "observation.state":
        changes += [partial(zoo.put_nan, frame=draw.number(0, frames - 1)), zoo.foreign_statistics]
    if frames > 4 and recording.action > 2:
        changes += [zoo.ragged_vectors]
    return draw.one(changes)


def draw_options(draw: Draw, recording: Any, family: str) -> list[str]:
    """Options of `fit`."""
    options: dict[str, Any] = {}
    if draw.chance(0.7):
        options["tokens"] = (
            draw.one((1, 4, 9, 16, 25, 64)) if draw.chance(0.85) else draw.one(("dense", "dense", 0, 500, "many"))
        )
    if draw.chance(0.5):
        options["reducer"] = draw.one(REDUCERS if draw.chance(0.2) else REDUCERS[:6])
    if draw.chance(0.3):
        options["schedule"] = draw.one(SCHEDULES) if draw.chance(0.9) else "elastic:9-2"
    # The tiny policy starts from random weights, which teach nothing.
    if draw.chance(0.05 if family == "tiny_smolvla" else 0.4):
        options["distill"] = draw.one((0.3, 1.0, 0)) if draw.chance(0.9) else 1.5
    if draw.chance(0.5):
        options["data.cache"] = draw.one(("auto", "never"))
    if draw.chance(0.25):
        numbers = draw.some(list(range(len(recording.lengths) + draw.chance(0.2))), 1, 4)
        options["data.episodes"] = json.dumps(numbers)
    if draw.chance(0.4):
        options["data.val_fraction"] = draw.one((0, 0.2, 0.5, 0.9)) if draw.chance(0.95) else 1.0
    if draw.chance(0.2):
        options["data.tolerance_s"] = draw.one((0.0001, 0.01))
    if draw.chance(0.5):
        options["batch_size"] = draw.one((1, 2, 5, 64))
    if draw.chance(0.2):
        options["model.train"] = draw.one(("all", "reducer", "reducer+lora"))
    if draw.chance(0.1):
        options["model.freeze_vision"] = "true"
    if draw.chance(0.1):
        options["model.position_ids"] = draw.one(("consecutive", "dense"))
    if draw.chance(0.1):
        options["trainer.accumulate_grad_batches"] = 2
    names = draw_names(draw, recording)
    if names:
        options["rename_map"] = json.dumps(names)
    options["seed"] = draw.number(0, 9)
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def draw_names(draw: Draw, recording: Any) -> dict[str, str]:
    """A rename map: what is needed, mostly; sometimes a needless or a wrong one."""
    names = {}
    if draw.chance(0.9):
        foreign = [name for name in recording.cameras if not name.startswith("observation.")]
        names |= {name: f"observation.images.{name}" for name in foreign}
        if recording.state_name != "observation.state":
            names[recording.state_name] = "observation.state"
    if draw.chance(0.02):
        names["observation.images.nothing"] = "observation.images.top"
    if draw.chance(0.1) and len(recording.cameras) > 1:
        first, second, *_ = recording.cameras
        names |= {first: second, second: first}
    return names


def run_case(seed: int, number: int, work: Path, checkpoints: Any) -> tuple[dict[str, Any], str]:
    """The result of a case, and what it printed."""
    import trials
    import zoo

    draw = Draw(seed, number)
    family = "tiny_smolvla" if draw.chance(0.5) else draw.one(trials.FAMILIES[1:])
    recording = draw_recording(draw)
    change = draw_change(draw, recording)
    case = zoo.Case(recording, change, options=tuple(draw_options(draw, recording, family)))
    dataset = case.make(work / f"data-{number}")
    policy: Any = "tiny"
    if family != "tiny_smolvla":
        policy = checkpoints.get(family, sorted(case.cameras), case.has_state)
    outcome = trials.fit(dataset, work / "run", policy, family, *case.options, "--trainer.logger", "false")
    changed = getattr(change, "func", change)
    drawn = {"options": " ".join(case.options), "change": getattr(changed, "__name__", ""), "data": str(recording)}
    line = {"kind": "fuzz", "seed": seed, "number": number, "family": family, "status": outcome.status}
    line["line"] = outcome.line.replace(str(work), "…")
    return line | {name: value.replace(str(work), "…") for name, value in drawn.items()} | {
        "seconds": round(outcome.seconds, 2)
    }, outcome.printed


def summary(lines: list[dict[str, Any]]) -> str:
    """Counts, and the kinds of refusals."""
    counts = Counter(line["status"] for line in lines)
    kinds = Counter(
        re.sub(r"[0-9]+|'[^']*'|…\S*", "#", line["line"])[:90] for line in lines if line["status"] == "refused"
    )
    rows = [f"  {count:3d}  {kind}" for kind, count in kinds.most_common()]
    return "\n".join([", ".join(f"{count} {status}" for status, count in counts.items()), "refusals:", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases")
    parser.add_argument("--count", type=int, default=200, help="number of cases")
    parser.add_argument("--only", type=int, help="run this case alone, and show all that it printed")
    parser.add_argument("--results", type=Path, help="JSONL file for the results; its lines are replaced")
    asked = parser.parse_args()
    import trials

    numbers = range(asked.count) if asked.only is None else [asked.only]
    begin, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, trials.small_world(Path(folder)):
        checkpoints = trials.Checkpoints(Path(folder) / "checkpoints")
        for number in numbers:
            line, printed = run_case(asked.seed, number, Path(folder), checkpoints)
            lines.append(line)
            if asked.only is not None:
                print(printed, json.dumps(line, indent=2, ensure_ascii=False), sep="\n")
            bad = f": {line['line'][:300]} [{line['options']}]" if line["status"] == "wrong" else ""
            print(f"[{len(lines)}/{len(numbers)}] case {number}: {line['status']}{bad}", file=sys.stderr, flush=True)
    if asked.results is not None:
        asked.results.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(summary(lines))
    print(f"{len(lines)} cases of seed {asked.seed} in {time.perf_counter() - begin:.0f} s")
    return int(any(line["status"] == "wrong" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
