"""lerobot-grids pull."""

from .parser import run


def pull(repo: str, folder: str, force: bool = False, json: str | None = None) -> None:
    """Fetch a checkpoint from the Hub into a folder and check every file against its hash.

    Give LeRobot's commands the folder as --policy.path, so that policy and processors have the same revision.

    Args:
        repo: The repository, user/name or user/name@revision (branch, tag or commit).
        folder: The folder to write, completely or not at all.
        force: Replace the folder, if it is a checkpoint, and fetch every file again.
        json: JSON file for repository, folder, commit and format.

    Examples:
        lerobot-grids pull me/cube-16 my_policy
        lerobot-grids pull me/cube-16@v1 my_policy --force
    """
    from pathlib import Path

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.hub import pull as hub

    if json is not None:
        require_writable(Path(json))
    done = hub.pull(repo, Path(folder), force=force)
    print(f"pulled {repo} at {done.commit}, {done.format} checkpoint, to {done.folder}")
    print(f"next: lerobot-grids eval --policy {done.folder}")
    write_json(json, {"repo": repo, "folder": str(done.folder), "commit": done.commit, "format": done.format})


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(pull, "pull", arguments, positional=True)
