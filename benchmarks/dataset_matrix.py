"""Train six families on every dataset that the tests make, and check what the policy got and what was saved.

    python benchmarks/dataset_matrix.py                                   # all six, all datasets, both commands
    python benchmarks/dataset_matrix.py --only "two cameras" --families pi05 --commands fit
    python benchmarks/dataset_matrix.py --table benchmarks/results/dataset-matrix.jsonl

Each dataset of tests/helpers/zoo.py is made by code. A family is trained on it for one step, by `lerobot-grids fit` and
by LeRobot's own `lerobot-train --policy.type=grids`. The large families are LeRobot's classes at a small size. What is
checked (tests/helpers/trials.py) is read from the dataset's files without LeRobot: that the batch is normalised by the
data's own numbers, that joints and frames are in their order, that instructions are whole, that the saved policy acts
as the trained one. Otherwise the dataset must be refused in one line, and nothing written.

Results are lines of JSON: family, dataset, command, status (trained, refused or wrong), line, expected, ok, seconds.
`lerobot-train` may refuse what `fit` trains, and the other way round; only "wrong" is a fault there.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
COMMANDS = ("fit", "lerobot-train")


def trials_of(families: list[str], names: list[str], commands: list[str], work: Path) -> Iterator[dict[str, Any]]:
    """The result of each trial."""
    import trials
    import zoo

    checkpoints = trials.Checkpoints(work / "checkpoints")
    for name in names:
        case = zoo.DATASETS[name]
        dataset = case.make(work / "data" / name.replace(" ", "-").replace(",", ""))
        for family in families:
            new = family in trials.FRESH
            checkpoint = None if new else checkpoints.get(family, case.cameras, case.has_state)
            source, options, flags = trials.fresh(family) if new else (str(checkpoint), [], [])
            for command in commands:
                output = work / "run"
                if command == "fit":
                    outcome = trials.fit(dataset, output, source, family, *options, *case.options)
                    expected, ok = case.expected(family), outcome.fits(case.expected(family), case.said_of(family))
                else:
                    base = flags if checkpoint is None else trials.flags_of(checkpoint)
                    if any(option.startswith("--rename_map") for option in case.train):
                        # LeRobot renames only for a trained policy.
                        base = [f"--policy.path={checkpoints.wrapped(family, case.cameras)}"]
                    outcome = trials.lerobot_train(dataset, output, base, family, *case.train)
                    expected = f"LeRobot {case.upstream}" if case.upstream else "not wrong"
                    ok = outcome.status != "wrong" or bool(case.upstream)
                line = {
                    "kind": "trial",
                    "family": family,
                    "dataset": name,
                    "command": command,
                    "status": outcome.status,
                }
                line |= {"line": outcome.line.replace(str(work), "…"), "expected": expected, "ok": ok}
                yield line | {"seconds": round(outcome.seconds, 2)}


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each dataset, a column for each family, `fit` and lerobot-train in each cell."""
    families = list(dict.fromkeys(line["family"] for line in lines))
    rows = [["dataset", *families, "refusal by fit"]]
    for name in dict.fromkeys(line["dataset"] for line in lines):
        row, refusals = [name], []
        for family in families:
            here = {x["command"]: x for x in lines if (x["family"], x["dataset"]) == (family, name)}
            row.append(" / ".join(here[c]["status"] + ("" if here[c]["ok"] else " (!)") for c in COMMANDS if c in here))
            if here.get("fit", {}).get("line"):
                refusals.append(here["fit"]["line"])
        rows.append([*row, refusals[0].replace("|", "\\|") if refusals else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these datasets alone")
    parser.add_argument("--families", nargs="+", help="these families alone")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these commands alone")
    parser.add_argument("--results", type=Path, help="JSONL file for the results; its lines are replaced")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and run nothing")
    asked = parser.parse_args()
    if asked.table is not None:
        print(table([json.loads(line) for line in asked.table.read_text().splitlines()]))
        return 0
    import trials
    import zoo

    names = asked.only or list(zoo.DATASETS)
    families = asked.families or list(trials.FAMILIES)
    total, begin, lines = len(names) * len(families) * len(asked.commands), time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, trials.small_world(Path(folder)):
        for line in trials_of(families, names, asked.commands, Path(folder)):
            lines.append(line)
            if asked.results is not None:
                text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
                asked.results.write_text(text)
            mark = "" if line["ok"] else f"\n  UNEXPECTED, wanted {line['expected']}: {line['line'][:400]}"
            place = f"{line['dataset']}, {line['family']}, {line['command']}"
            print(f"[{len(lines)}/{total}] {place}: {line['status']}{mark}", file=sys.stderr, flush=True)
    print(table(lines))
    bad = sum(not line["ok"] for line in lines)
    print(f"\n{total} trials in {time.perf_counter() - begin:.0f} s, {bad} not as expected")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
