"""lerobot-grids merge."""

from .parser import run


def merge(source: str, folder: str, json: str | None = None) -> None:
    """Make a self-contained checkpoint of an adapter, bit for bit the same policy.

    Args:
        source: Adapter checkpoint: a folder, or a Hub id.
        folder: The folder to appear.
        json: File for what was merged.
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
