"""Make the configuration of the LeRobot environment that a command line names."""

from dataclasses import fields
from typing import Any

import lerobot.envs  # noqa: F401  (registers LeRobot's environments)
from lerobot.envs.configs import EnvConfig

from lerobot_policy_grids.errors import SimulationError

from .libero import LIBERO_KINDS, require_libero

# This package's faster and corrected MetaWorld replaces LeRobot's.
ALIASES = {"metaworld": "grids_metaworld"}


def make_env_config(
    name: str,
    tasks: str | None,
    arguments: dict[str, Any] | None = None,
    *,
    look_every: int = 1,
    perturb: str | None = None,
) -> EnvConfig:
    """The configuration of a simulated environment.

    Args:
        name: "metaworld", or an environment type of LeRobot.
        tasks: Tasks, comma-separated; None takes the environment's default.
        arguments: More fields of the environment's configuration.
        look_every: Number of steps between two observations of the policy. Environments that can skip the images in
            between do so.
        perturb: Perturbations as kind:severity, comma-separated; see `perturbations`.

    Raises:
        SimulationError: If the environment or a field is unknown, a package is missing, or it cannot be perturbed.
    """
    if name == "metaworld":
        try:
            from lerobot_grids.simulation import metaworld  # noqa: F401  (registers it)
        except ImportError as error:
            raise SimulationError(
                f"MetaWorld is not installed ({error}); install it with: pip install 'lerobot_policy_grids[sim]'"
            ) from error
    choices = EnvConfig.get_known_choices()
    kind = ALIASES.get(name, name)
    if kind not in choices:
        raise SimulationError(f"environment '{name}' is unknown; choose from metaworld, {', '.join(sorted(choices))}")
    if kind in LIBERO_KINDS:
        require_libero(kind)
    known = {field.name for field in fields(choices[kind])}
    values = dict(arguments or {})
    if tasks is not None:
        values["task"] = tasks
    if "render_interval" in known:
        values.setdefault("render_interval", look_every)
    if perturb and "perturb" not in known:
        raise SimulationError(
            f"environment '{name}' cannot be perturbed, only 'metaworld' can; drop --perturb"
            + (", or evaluate LIBERO's perturbed tasks with --env libero_plus" if name == "libero" else "")
        )
    if perturb:
        values["perturb"] = perturb
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


def task_names(config: EnvConfig) -> list[str]:
    """Names of the tasks in an environment's configuration."""
    if config.type == ALIASES["metaworld"]:
        from .metaworld import expand_tasks

        return expand_tasks(config.task)
    return [task for task in (config.task or config.type).split(",") if task]
