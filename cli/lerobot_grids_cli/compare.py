"""lerobot-grids compare."""

import re
from typing import Any, Literal

from lerobot_grids.choices import perturbation_fault, tampering_fault

from .messages import OptionError
from .parser import refuse, require_at_least, run

# Of a method in a --config file.
FIELDS = ("policies", "tokens", "reducer", "resolution", "num_steps")


def compare(
    policies: list[str] | None = None,
    methods: dict[str, dict[str, Any]] | None = None,
    env: str = "metaworld",
    tasks: str | None = None,
    episodes: int = 100,
    seed: int = 100_000,
    batch_size: int = 10,
    device: str | None = None,
    workers: int = 1,
    costs: bool = True,
    output: str = "outputs/compare",
    json: str | None = None,
    env_args: dict[str, Any] | None = None,
    perturb: str | None = None,
    layout: Literal["official", "dealt"] | None = None,
    tamper: str | None = None,
) -> None:
    """Compare policies on the same episodes: success, tokens, FLOPs, milliseconds, and paired tests.

    The others are compared with the first. Evaluations in the output folder are not run again, so a stopped comparison
    continues, and for an additional method only that method is evaluated.

    Args:
        policies: NAME=CHECKPOINT, or NAME=CHECKPOINT,CHECKPOINT,... for checkpoints that differ in the training seed.
        methods: The same in a --config file, with more options: {name: {policies: [...], tokens: 16, reducer: pool,
            resolution: 48, num_steps: 2}}. A reducer or a resolution is applied to a dense checkpoint without training.
        env: "metaworld", or any environment type of LeRobot.
        tasks: Tasks of the environment, comma-separated. Defaults to the environment's default tasks.
        episodes: Number of episodes of each task and checkpoint.
        seed: Seed of the first episode; the others have the next seeds.
        batch_size: Number of episodes that run in parallel.
        device: Device, such as cpu or cuda. Defaults to each checkpoint's, or to one that this machine has.
        workers: Number of checkpoints that are evaluated at the same time, each in its own process.
        costs: Whether to count FLOPs and measure milliseconds, as each policy acts: on a GPU a grids policy does so by
            its fast path. Do not run other programs meanwhile.
        output: Folder for every evaluation, compare.json, compare.md and compare.png.
        json: Further JSON file for the result.
        env_args: More fields of the environment's configuration.
        perturb: Perturb episodes by kind:severity, comma-separated, as in `eval`.
        layout: Where objects stand in LIBERO: in its official initial states, in which the named object hardly moves,
            or dealt anew by each episode's seed, the same for every policy. Defaults to official.
        tamper: Remove or shuffle inputs of the policies, as in `eval`.

    Examples:
        lerobot-grids compare dense=outputs/dense grids=outputs/grids16 --episodes 100
        lerobot-grids compare dense=outputs/dense,outputs/dense2 grids=outputs/a,outputs/b --tasks push-v3 --workers 2
    """
    require_at_least(1, episodes=episodes, batch_size=batch_size, workers=workers)
    refuse(tampering_fault(tamper) or perturbation_fault(perturb, env))
    named = _named(policies or [], methods or {})
    from functools import partial
    from pathlib import Path

    from lerobot_grids.console import counting_bar, require_writable
    from lerobot_grids.evaluation.paired import Method
    from lerobot_grids.evaluation.paired import compare as compare_methods
    from lerobot_grids.evaluation.tables import draw_methods, markdown, print_methods
    from lerobot_grids.evaluation.tampering import parse_tamperings
    from lerobot_grids.simulation.environments import make_env_config, task_names

    chosen = {name: Method(**options) for name, options in named.items()}
    folder = Path(output)
    for path in (*([Path(json)] if json else []), folder / "compare.json"):
        require_writable(path)
    make_env = partial(make_env_config, env, tasks, env_args, perturb=perturb, layout=layout)
    tasks_of = task_names(make_env())
    total = episodes * len(tasks_of) * sum(len(method.policies) for method in chosen.values())
    with counting_bar("comparing", total, "episodes") as bar:
        result = compare_methods(
            chosen,
            make_env,
            folder,
            episodes=episodes,
            seed=seed,
            batch_size=batch_size,
            device=device,
            tampering=parse_tamperings(tamper),
            workers=workers,
            costs=costs,
            protocol={"env": env, "tasks": ",".join(tasks_of), "perturb": perturb, "layout": layout, "tamper": tamper}
            | (env_args or {}),
            on_evaluation=lambda name, count: bar.advance(count, name),
        )
    result.save(folder / "compare.json")
    if json is not None:
        result.save(Path(json))
    (folder / "compare.md").write_text(markdown(result))
    draw_methods(result, folder / "compare.png")
    print_methods(result)
    print(f"result:  {folder / 'compare.json'}, compare.md\npicture: {folder / 'compare.png'}")


def _named(policies: list[str], methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The methods to compare by name, each with its options.

    Raises:
        OptionError: If a name is given twice or is no file name, an option is unknown, or there is only one method.
    """
    given = []
    for text in policies:
        name, _, paths = text.partition("=")
        if not name or not paths:
            raise OptionError(f"--policies {text}; give NAME=CHECKPOINT, such as dense=outputs/base")
        given.append((name, {"policies": paths.split(",")}))
    for name, options in methods.items():
        if "policies" not in options or set(options) - set(FIELDS):
            raise OptionError(f"methods: '{name}' has {', '.join(options)}; the fields are {', '.join(FIELDS)}")
        numbers = ("tokens", "resolution", "num_steps")
        require_at_least(1, **{key: options.get(key) for key in numbers})
        given.append((name, options))
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"'{name}' is given twice; give each method its own name")
        if not re.fullmatch(r"[\w.-]+", name):
            raise OptionError(f"method '{name}': names become file names; use letters, digits, dots and dashes")
    if len(names) < 2:
        raise OptionError(
            f"{len(names)} policies given; give at least two, such as dense=outputs/base grids=outputs/grids16"
        )
    return dict(given)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    # Arguments NAME=CHECKPOINT before the options mean --policies.
    count = next((i for i, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    given = [part for text in arguments[:count] for part in ("--policies+", text)]
    run(compare, "compare", given + arguments[count:])
