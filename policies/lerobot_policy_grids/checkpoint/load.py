"""Build a policy, load a checkpoint folder into it, and fetch an adapter's base policy from the Hub.

The base is fetched by commit and checked by hash. LeRobot's `from_pretrained` is not used for it: in some classes it
ignores the revision, or returns random weights after a failure.
"""

from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from ..configuration_grids import GRIDS_TYPE
from ..errors import CheckpointError, causes
from ..families import families, get_family
from .digests import digest_of
from .files import ADAPTER_FILE, CONFIG_FILE, WEIGHTS_FILE, read_json
from .hub_errors import explain
from .manifest import Base, verify_manifest
from .weights import load_weights

# The Hub's answers for a base that is deleted or hidden.
GONE = (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError)
WITHOUT_BASE = (
    "; an adapter does not work without its base, so whoever has the trained policy or a cached base should push it "
    "with lerobot-grids push --format full"
)


def build(config: PreTrainedConfig, *, fresh: bool = False, **kwargs: Any) -> Any:
    """Construct the policy of a configuration with random weights.

    Args:
        config: Configuration of a base policy or of a grids policy.
        fresh: Whether no weights are loaded into it afterwards: some of LeRobot's classes then fetch those that they
            begin with. Otherwise nothing is downloaded that can be done without.
        **kwargs: More arguments for the policy's constructor.
    """
    if config.type == GRIDS_TYPE:
        return get_policy_class(GRIDS_TYPE)(config, fresh=fresh, **kwargs)
    return get_family(config.type).build(config, fresh=fresh, **kwargs)


def load_checkpoint(policy: Any, folder: Path, *, verify: bool = False) -> None:
    """Load a checkpoint folder's weights into a policy, dense or grids. All names and shapes must match.

    The base of an adapter is first fetched from the Hub, or from its cache.

    Args:
        policy: Built from the folder's configuration.
        folder: The checkpoint.
        verify: Whether to hash files again that have not changed since they were last hashed.

    Raises:
        CheckpointError: If the weights or an adapter's base do not fit, or a file differs from the folder's manifest.
    """
    manifest = verify_manifest(folder, verify=verify)
    if manifest is None or manifest.base is None:
        load_file(policy, folder / WEIGHTS_FILE)
    elif policy.config.type == GRIDS_TYPE:
        load_file(policy.base, fetch_base(manifest.base, verify=verify))
        load_weights(policy, folder / ADAPTER_FILE, required="reducer.")
    else:
        raise CheckpointError(f"{folder} is an adapter for policy type '{policy.config.type}', expected '{GRIDS_TYPE}'")


def load_file(policy: Any, path: Path) -> None:
    """Load a weights file with all tensors of a policy, under its current names or those of older releases.

    Raises:
        CheckpointError: If names or shapes do not match.
    """
    family = families().get(policy.config.type)
    if family is None:
        load_weights(policy, path)
    else:
        load_weights(policy, path, partial(family.checkpoint_names, policy), family.checkpoint_value)


def fetch_base_weights(repo_id: str, revision: str) -> Path:
    """The weights file of a dense policy on the Hub, at a commit.

    A local folder with the repository's name is never used. A file in the Hub's cache needs no network.

    Args:
        repo_id: `user/name`.
        revision: A commit of 40 hexadecimal digits, because a push can move a branch or a tag.

    Raises:
        CheckpointError: If the download fails, or it is not a dense policy of a supported type.
    """
    kind = read_json(_fetch(repo_id, revision, CONFIG_FILE)).get("type")
    if kind not in families():
        raise CheckpointError(
            f"base {repo_id}@{revision} is a {kind!r} policy, expected a dense one of {', '.join(sorted(families()))}; "
            "an adapter needs the dense policy that it was trained on"
        )
    return _fetch(repo_id, revision, WEIGHTS_FILE)


def fetch_base(base: Base, *, verify: bool = False) -> Path:
    """The weights file that an adapter was trained on.

    Args:
        base: The base in the adapter's manifest.
        verify: Whether to hash the file even if it has not changed since it was last hashed.

    Raises:
        CheckpointError: If it cannot be fetched, or its hash differs; the message names both hashes.
    """
    weights = fetch_base_weights(base.repo_id, base.revision)
    seen = digest_of(weights, verify=verify)
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
        gone = any(isinstance(cause, GONE) for cause in causes(error))
        raise CheckpointError(
            f"base {repo_id}@{revision} cannot be fetched: {explain(error)}{WITHOUT_BASE if gone else ''}"
        ) from error
