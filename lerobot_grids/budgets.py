"""What a command line may say of a token budget. Without heavy imports, so that a mistake is answered at once."""

import re


def budget_fault(text: str) -> str | None:
    """What is wrong with a budget, a positive number or "dense", in words; None if nothing is."""
    if text == "dense" or (re.fullmatch(r"\d+", text) and int(text) >= 1):
        return None
    given = text or "''"
    return f"--tokens {given} is no token budget; give visual tokens per camera, such as 16, or 'dense' for all of them"
