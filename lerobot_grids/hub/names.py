"""Names of repositories on the Hub."""

from lerobot_policy_grids.checkpoint.manifest import REPOSITORY
from lerobot_policy_grids.errors import HubError


def parse_repository(text: str) -> tuple[str, str | None]:
    """Split `user/name[@revision]` into (`user/name`, revision or None).

    Raises:
        HubError: If the text has another form.
    """
    repo_id, _, revision = text.partition("@")
    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise HubError(f"'{text}' is not the name of a repository; give user/name, or user/name@revision to pull")
    return repo_id, revision or None
