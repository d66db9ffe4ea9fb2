"""Make the configuration of the LeRobot environment that a command line names."""

from dataclasses import fields
from typing import Any

import lerobot.envs  # noqa: F401  (registers LeRobot's environments)
from lerobot.envs.configs import EnvConfig

from lerobot_policy_grids.errors import SimulationError

from ..choices import perturbation_fault
from .demonstrations import Demonstrator
from .libero.installed import LIBERO_KINDS, require_libero

# This package's environments replace LeRobot's: a faster and corrected MetaWorld, and LIBERO with more options.
ALIASES = {"metaworld": "grids_metaworld", "libero": "grids_libero"}
METAWORLD_MISSING = "MetaWorld is not installed ({}); install it with: pip install 'lerobot_policy_grids[sim]'"


def make_env_config(
    name: str,
    tasks: str | None,
    arguments: dict[str, Any] | None = None,
    *,
    look_every: int = 1,
    perturb: str | None = None,
    layout: str | None = None,
) -> EnvConfig:
    """The configuration of a simulated environment.

    Args:
        name: "metaworld", or an environment type of LeRobot.
        tasks: Tasks, comma-separated; None takes the environment's default.
        arguments: More fields of the environment's configuration.
        look_every: Number of steps between two observations of the policy. Environments that can skip the images in
            between do so.
        perturb: Perturbations as kind:severity, comma-separated; see `perturbations`.
        layout: Where objects stand in LIBERO, "official" or "dealt".

    Raises:
        SimulationError: If the environment or a field is unknown, a package is missing, or it cannot be perturbed.
    """
    fault = perturbation_fault(perturb, name)
    if fault is not None:
        raise SimulationError(fault)
    if layout and name != "libero":
        raise SimulationError(f"environment '{name}' has no layouts, only 'libero' has; drop --layout")
    if name in LIBERO_KINDS:
        require_libero(name)
    if name in ALIASES:
        _register(name)
    choices = EnvConfig.get_known_choices()
    kind = ALIASES.get(name, name)
    if kind not in choices:
        raise SimulationError(f"environment '{name}' is unknown; choose from metaworld, {', '.join(sorted(choices))}")
    known = {field.name for field in fields(choices[kind])}
    values = dict(arguments or {})
    if tasks is not None:
        values["task"] = tasks
    if "render_interval" in known:
        values.setdefault("render_interval", look_every)
    values |= {key: value for key, value in (("perturb", perturb), ("layout", layout)) if value}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SimulationError(
            f"environment '{name}' has no {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
        )
    try:
        config: EnvConfig = choices[kind](**values)
    except (TypeError, ValueError) as error:
        raise SimulationError(f"environment '{name}' cannot be configured with {values}: {error}") from error
    return config


def _register(name: str) -> None:
    """Import this package's environment, so that LeRobot knows it."""
    if name == "libero":
        from .libero import environment  # noqa: F401

        return
    try:
        from . import metaworld  # noqa: F401
    except ImportError as error:
        raise SimulationError(METAWORLD_MISSING.format(error)) from error


def make_demonstrator(
    env: str, tasks: str | None, *, size: int, noise: float | None, layout: str, zoom: float = 1.0
) -> Demonstrator:
    """The scripted expert of an environment.

    Args:
        env: "metaworld" or "libero".
        tasks: Tasks, comma-separated; None takes a default.
        size: Height and width of the images in pixels.
        noise: Standard deviation of the noise on executed actions; None takes the expert's own.
        layout: Where objects stand in LIBERO, "official" or "dealt".
        zoom: How many times larger LIBERO's overview camera draws.

    Raises:
        SimulationError: If a package is missing, a task is unknown, or the environment has no such option.
    """
    if env == "libero":
        require_libero(env)
        from .libero.demonstrator import LiberoDemonstrator

        noise = LiberoDemonstrator.noise if noise is None else noise
        return LiberoDemonstrator(tasks or "libero_object", layout, size, noise, zoom)
    if zoom != 1:
        raise SimulationError(f"zoom is {zoom}, which only --env libero has; leave it out")
    _register(env)
    from .metaworld_expert import MetaworldDemonstrator

    noise = MetaworldDemonstrator.noise if noise is None else noise
    return MetaworldDemonstrator(tasks or "push-v3,coffee-push-v3", size, noise)


def task_names(config: EnvConfig) -> list[str]:
    """Names of the tasks in an environment's configuration."""
    if config.type == ALIASES["metaworld"]:
        from .metaworld import expand_tasks

        return expand_tasks(config.task)
    if config.type == ALIASES["libero"]:
        return config.names
    return [task for task in (config.task or config.type).split(",") if task]
