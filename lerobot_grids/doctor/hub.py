"""Is there a login to the Hub, and does the Hub answer? The token is never shown."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .check import Check

# Seconds that the Hub has to answer.
TIMEOUT_S = 4.0
LOGIN = "log in with: hf auth login"


def cache_folder() -> Path | None:
    """Where the Hub's client keeps what it fetched; None without the client."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return Path(constants.HF_HUB_CACHE)


def check_hub() -> Iterator[Check]:
    """Whether the Hub answers, and as whom this machine is logged in."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        advice = "unset it to fetch and push"
        yield Check("warn", "Hub", "switched off by HF_HUB_OFFLINE; only what is in the cache can be used", advice)
        return
    token = get_token()
    # Errors are named by their type alone: some repeat the request, with the token in it.
    status, answer = _ask(f"{constants.ENDPOINT}/api/{'whoami-v2' if token else 'models?limit=1'}", token)
    if status is None:
        advice = "check the network; local folders and --policy tiny work without it"
        yield Check("warn", "Hub", f"{constants.ENDPOINT} gives no answer in {TIMEOUT_S:.0f} s ({answer})", advice)
    elif status == 401 and token:
        yield Check("warn", "Hub", "there is a token, and the Hub does not take it", LOGIN)
    elif status != 200:
        yield Check("warn", "Hub", f"{constants.ENDPOINT} answers {status}", "try again later")
    elif not token:
        yield Check("warn", "Hub", "answers; nobody is logged in, so push and gated models will not work", LOGIN)
    else:
        role = _role(answer)
        seen = f"logged in as {answer.get('name', 'somebody')}" + (f", token of role '{role}'" if role else "")
        advice = "to push, log in with a token that can write: hf auth login" if role == "read" else ""
        yield Check("ok", "Hub", seen, advice)


def _role(answer: dict[str, Any]) -> str | None:
    token = (answer.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    return role if isinstance(role, str) else None


def _ask(url: str, token: str | None) -> tuple[int | None, Any]:
    """(Status, content) of the Hub's answer, or (None, why there is none)."""

    def ask() -> tuple[int | None, Any]:
        from huggingface_hub import get_session

        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = get_session().get(url, headers=headers, timeout=TIMEOUT_S)
        return answer.status_code, answer.json() if answer.status_code == 200 else None

    return in_time(ask, TIMEOUT_S + 1) or (None, "timeout")


def in_time(function: Callable[[], tuple[int | None, Any]], seconds: float) -> tuple[int | None, Any] | None:
    """What a function returns, or (None, the type of its error); None if it takes longer, as looking up a name may."""
    found: list[tuple[int | None, Any]] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append((None, type(error).__name__))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
