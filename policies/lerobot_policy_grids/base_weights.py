"""The dense policy under an adapter checkpoint: fetched by commit, checked by hash.

Not through LeRobot's classes: π0's and its siblings' `from_pretrained` ignore the revision, and return random weights
after any failure.
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

from .adapters import ADAPTERS
from .errors import CheckpointError
from .files import CONFIG_FILE, WEIGHTS_FILE, read_json
from .hub_errors import explain
from .manifest import Base, sha256_of


def fetch_base_weights(repo_id: str, revision: str) -> Path:
    """The weights file of a dense policy on the Hub, at a commit.

    A folder that happens to have the repository's name is never used. What the Hub's cache has needs no network.

    Args:
        repo_id: `user/name`.
        revision: 40 hexadecimal digits, which no push can move.

    Raises:
        CheckpointError: If the Hub does not give it, or it is no dense policy of a supported type.
    """
    kind = read_json(_fetch(repo_id, revision, CONFIG_FILE)).get("type")
    if kind not in ADAPTERS:
        raise CheckpointError(
            f"base {repo_id}@{revision} is a {kind!r} policy, expected a dense one of {', '.join(sorted(ADAPTERS))}; "
            "an adapter needs the dense policy itself under it"
        )
    return _fetch(repo_id, revision, WEIGHTS_FILE)


def fetch_base(base: Base) -> Path:
    """The weights file that an adapter was trained on.

    Raises:
        CheckpointError: If it cannot be fetched, or is another file than that; both fingerprints are named.
    """
    weights = fetch_base_weights(base.repo_id, base.revision)
    seen = sha256_of(weights)
    if seen != base.sha256:
        raise CheckpointError(
            f"base {base.repo_id}@{base.revision}: {weights} has SHA-256 {seen}, but the adapter was trained on "
            f"{base.sha256}; remove that file to fetch it again, or use a full checkpoint"
        )
    return weights


def _fetch(repo_id: str, revision: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision))
    except Exception as error:  # the Hub client's errors share no base class
        raise CheckpointError(f"base {repo_id}@{revision} cannot be fetched: {explain(error)}") from error
