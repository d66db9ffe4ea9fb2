"""Print results of `lerobot-grids eval` side by side: python examples/summary.py RESULT.json ..."""

import json
import sys
from pathlib import Path

from rich.table import Table

from lerobot_grids.console import wide_console


def main(paths: list[str]) -> None:
    """Show one row per result file."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    table = Table("policy", "visual tokens")
    for task in results[0]["tasks"]:
        table.add_column(task["task"], justify="right")
    table.add_column("all, with 95 % interval", justify="right")
    for result in results:
        total = result["total"]
        low, high = (round(100 * bound) for bound in total["interval"])
        table.add_row(
            Path(result["policy"]).name,
            str(result["num_tokens"]),
            *(f"{task['successes']}/{task['episodes']}" for task in result["tasks"]),
            f"{total['successes']}/{total['episodes']}   {low} - {high} %",
        )
    wide_console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
