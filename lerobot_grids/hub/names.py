"""Names of repositories on the Hub."""

from lerobot_policy_grids.checkpoint.manifest import REPOSITORY
from lerobot_policy_grids.errors import HubError


def parse_repository(text: str) -> tuple[str, str | None]:
    """(`user/name`, revision or None) of `user/name[@revision]`.

    Raises:
        HubError: If it is no such thing.
    """
    repo_id, _, revision = text.partition("@")
    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise HubError(f"'{text}' is no repository; give user/name, or to pull user/name@revision")
    return repo_id, revision or None
