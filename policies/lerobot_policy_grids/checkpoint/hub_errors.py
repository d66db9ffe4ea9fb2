"""Explain the errors of the Hub's client, and what to do about them."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import GridsError, HubError, causes
from .atomic import is_full_disk

# The first match is used, because the client's errors inherit from each other.
_MEANINGS: tuple[tuple[type[BaseException], str], ...] = (
    (GatedRepoError, "its owner must grant you access; ask on its page, then log in with `hf auth login`"),
    (RepositoryNotFoundError, "it does not exist, or is private and you are not logged in; try `hf auth login`"),
    (RevisionNotFoundError, "the repository has no such revision; look at its history"),
    (OfflineModeIsEnabled, "the Hub is switched off; unset HF_HUB_OFFLINE"),
    (LocalEntryNotFoundError, "it is not in the cache and the Hub cannot be reached; check the network"),
    (EntryNotFoundError, "the repository lacks that file"),
    (HFValidationError, "that is not the name of a repository; give user/name"),
    (LocalTokenNotFoundError, "you are not logged in; log in with `hf auth login`"),
)
_STATUS = {
    401: "your token is not valid; log in with `hf auth login`",
    403: "your token has no permission for this; log in with a token that can write there",
    409: "it already exists",
    412: "somebody else changed the repository meanwhile; look at the change, then run this again",
    429: "too many requests; wait a few minutes",
}


@contextmanager
def asking_the_hub(what: str) -> Iterator[None]:
    """Turn any error of the Hub's client into a `HubError` that says what failed, why, and what to do."""
    try:
        yield
    except GridsError:
        raise
    except Exception as error:  # the Hub client's errors share no base class
        raise HubError(f"{what}: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """One line: what failed, what to do, and the server's own message."""
    # The client wraps some errors, and tries its cache before it raises others: the first that says why is the reason.
    said = [cause for cause in causes(error) if _meaning(cause) is not None]
    if len(said) > 1 and isinstance(said[0], LocalEntryNotFoundError):
        said = said[1:]
    reason = said[0] if said else error
    words = next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
    unknown = f"the Hub's client failed with {type(reason).__name__}"
    return f"{_meaning(reason) or unknown} ({words})"


def _meaning(error: BaseException) -> str | None:
    """What an error of the client means, and what to do; None if it does not say."""
    if is_full_disk(error):
        return f"the disk of {constants.HF_HUB_CACHE} is full; make room there, or set HF_HOME to a folder elsewhere"
    for kind, meaning in _MEANINGS:
        if isinstance(error, kind):
            return meaning
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _STATUS.get(status, f"the Hub answered {status}; try again later")
    if isinstance(error, (httpx.HTTPError, ConnectionError, TimeoutError)):
        return "the Hub cannot be reached; check the network, then run this again"
    return None
