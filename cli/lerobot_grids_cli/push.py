"""lerobot-grids push."""

from typing import Literal

from .parser import run


def push(
    source: str,
    repo: str,
    format: Literal["auto", "adapter", "full"] = "auto",
    private: bool = False,
    tag: str | None = None,
    dry_run: bool = False,
    results: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    template: str | None = None,
    json: str | None = None,
) -> None:
    """Push a checkpoint to the Hub in one commit, with a model card that shows measured results.

    Log in with `hf auth login` first. Access tokens, paths of this machine and files of other programs are not pushed.

    Args:
        source: Checkpoint folder, or output folder of a training run.
        repo: The repository, user/name; created if it does not exist.
        format: adapter (the changes to a base policy, which is pinned by commit and hash), full (self-contained), or
            auto for the adapter if its base is on the Hub and it is much smaller.
        private: Create a private repository; an existing one must be private.
        tag: Tag for the commit, such as v1.
        dry_run: Check all files, list their sizes and print the card, without pushing.
        results: JSON files of eval, validate and bench for the card, comma-separated; a looks.png beside one becomes
            the picture.
        dataset: Hub id of the training data, for the card.
        license: Licence of the weights in the Hub's spelling, such as apache-2.0, for the card.
        template: Jinja2 template to use for the card instead of the default.
        json: JSON file for the list of files, the card and the commit.

    Examples:
        lerobot-grids push outputs/smolvla_base-16 me/cube-16 --dry-run
        lerobot-grids push outputs/smolvla_base-16 me/cube-16 --results outputs/eval/smolvla_base-16/result.json
    """
    from dataclasses import asdict
    from pathlib import Path

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.hub import push as hub
    from lerobot_grids.hub.prepare import Description

    if json is not None:
        require_writable(Path(json))
    description = Description(
        tuple(Path(path) for path in (results or "").split(",") if path),
        dataset,
        license,
        None if template is None else Path(template),
    )
    done = hub.push(
        Path(source), repo, format=format, private=private, tag=tag, description=description, dry_run=dry_run
    )
    if dry_run:
        print(done.card)
    for name, size in done.files.items():
        print(f"{size:>15,}  {name}")
    for name in done.deleted:
        print(f"{'deleted':>15}  {name}")
    total = sum(done.files.values())
    said = "would be pushed to" if done.commit is None else "unchanged at" if done.unchanged else "pushed to"
    where = repo if done.commit is None else f"{repo}@{done.commit}"
    print(f"{total:>15,}  bytes, {done.format} checkpoint, {said} {where}")
    write_json(json, asdict(done))


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(push, "push", arguments, positional=True)
