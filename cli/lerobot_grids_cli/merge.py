"""lerobot-grids merge."""

from .parser import run


def merge(source: str, folder: str, json: str | None = None) -> None:
    """Make a full checkpoint from an adapter; the policy has exactly the same weights.

    Args:
        source: Adapter checkpoint: a folder, or a Hub id.
        folder: The folder to write.
        json: JSON file for the names of source and folder.

    Examples:
        lerobot-grids merge my_policy my_policy_full
        lerobot-grids merge outputs/smolvla_base-16 full --json merge.json
    """
    from pathlib import Path

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.hub import pull as hub

    if json is not None:
        require_writable(Path(json))
    hub.merge(source, Path(folder))
    print(f"merged {source} into {folder}")
    write_json(json, {"source": source, "folder": folder})


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(merge, "merge", arguments, positional=True)
