"""Walks over all modules of a policy, which happen at each action of a robot."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def all_modules(roots: Iterable[nn.Module], left_out: Container[nn.Module] = ()) -> list[nn.Module]:
    """These modules and all under them; one that is at two places comes twice.

    `nn.Module.modules` takes several times as long, because it makes up names.

    Args:
        roots: Modules.
        left_out: Those that do not count, nor what is under them.
    """
    found: list[nn.Module] = []
    waiting: list[nn.Module | None] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is not None and module not in left_out:
            found.append(module)
            waiting += module._modules.values()
    return found


def is_watched(policy: nn.Module) -> bool:
    """Whether a hook waits for a module of this policy to run.

    transformers has hooks of its own on layers whose outputs it may be asked for. They do not count.
    """
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for module in all_modules([policy])
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if hooks
        for hook in hooks.values()
    )


@contextmanager
def quick_eval(policy: Any) -> Iterator[None]:
    """In this block `policy.eval()` does nothing where nothing is being trained.

    LeRobot's policies call it at each action, also for those that come from the queue. It takes milliseconds for the
    800 modules of π0, and to look takes a sixth of that.
    """
    vars(policy)["eval"] = partial(_eval, policy)
    try:
        yield
    finally:
        vars(policy).pop("eval", None)


def _eval(policy: Any) -> Any:
    if any(module.training for module in all_modules([policy])):
        type(policy).eval(policy)
    return policy
