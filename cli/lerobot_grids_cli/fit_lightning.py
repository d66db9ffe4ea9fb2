"""`fit` with LightningCLI; its main options set those of the model, the data and the trainer."""

import logging
import shlex
import signal
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lerobot_grids.choices import parts
from lerobot_grids.console import report
from lerobot_grids.data import POSITIONS, LeRobotDataModule
from lerobot_grids.hub.prepare import Description
from lerobot_grids.hub.push import check_login, push
from lerobot_grids.policies import parse_tokens, source_type
from lerobot_grids.preflight.disk import check_disk
from lerobot_grids.training.averaging import TrainedWeightsAverage
from lerobot_grids.training.callbacks import Speed, TrainingProgress
from lerobot_grids.training.checkpoints import PushCheckpoint, RunCheckpoint
from lerobot_grids.training.interruption import Interruption, stopping_between_steps
from lerobot_grids.training.loggers import make_loggers
from lerobot_grids.training.memory_advice import advise, is_out_of_memory
from lerobot_grids.training.module import GridsModule
from lerobot_grids.training.state import STATE_FILES, find_state
from lerobot_grids.training.trainable import device_memory
from lerobot_policy_grids.errors import GridsError, OutputExistsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import GridsPolicy

from .fit_checks import check_values
from .fit_options import FitOptions
from .parser import OneLineErrors, require_at_least

# Main option -> option of the model or the data.
LINKS = (
    ("policy", "model.policy"),
    ("base", "model.base"),
    ("tokens", "model.tokens"),
    ("reducer", "model.reducer"),
    ("resolution", "model.resolution"),
    ("schedule", "model.schedule"),
    ("distill", "model.distill"),
    ("teacher", "model.teacher"),
    ("rename_map", "model.rename_map"),
    ("rename_map", "data.rename_map"),
    ("seed", "model.seed"),
    ("dataset", "data.dataset"),
    ("seed", "data.seed"),
    ("seed", "seed_everything"),
)

DEFAULT_LOGGERS = "csv,tensorboard"


class FitParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class FitCLI(LightningCLI):
    """LightningCLI that sets output folder, loggers and callbacks by the main options."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(FitOptions)
        for source, target in LINKS:
            parser.link_arguments(source, target)
        parser.link_arguments("trainer.accelerator", "model.accelerator", str)
        parser.link_arguments("data.meta", "model.meta", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        options = self.config
        tokens = None if options.tokens is None else parse_tokens(options.tokens)
        # Again, because a --config file may have set them.
        check_values(options)
        if options.push is not None:
            check_login(options.push)
        recipe = get_family(source_type(options.policy)).recipe
        reducer = options.reducer.get("type") if isinstance(options.reducer, dict) else options.reducer
        named = [reducer, None if reducer == "blind" else tokens, options.resolution]
        label = "-".join(str(part) for part in named if part is not None) or "grids"
        if options.schedule != "constant":
            label = f"{label}-{options.schedule.partition(':')[0]}"
        self.output = Path(options.output or Path("outputs") / f"{Path(options.policy).name}-{label}")
        if not options.resume and self.output.exists():
            started = any((self.output / name).is_file() for name in STATE_FILES)
            advice = "continue with --resume" if started else "remove it"
            raise OutputExistsError(f"{self.output} already exists; {advice}, or choose another --output")
        self.resume_from = find_resumable(self.output) if options.resume else None
        if options.trainer.max_epochs not in (None, -1):
            raise GridsError(
                f"--trainer.max_epochs {options.trainer.max_epochs}: a run has steps and no epochs; give --steps"
            )
        if options.logger is not None and options.trainer.logger is not None:
            raise GridsError(f"--logger {options.logger} and --trainer.logger; give one of them")
        require_at_least(1, **{"trainer.accumulate_grad_batches": options.trainer.accumulate_grad_batches})
        precision = str(options.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise GridsError(
                f"--trainer.precision {precision} would change the type of every weight, and policies keep some in "
                "float32; give bf16-mixed"
            )
        # FrameOrder distributes each batch over the processes.
        options.trainer.use_distributed_sampler = False
        if options.trainer.strategy == "ddp":
            # As in LeRobot: some weights are unused, depending on the batch and the family.
            options.trainer.strategy = "ddp_find_unused_parameters_true"
        steps = options.steps or recipe.steps
        if options.trainer.max_steps == -1:
            options.trainer.max_steps = steps
        if options.batch_size is not None:
            options.data.batch_size = options.batch_size
        elif options.data.batch_size is None:
            options.data.batch_size = recipe.micro_batch
            if options.trainer.accumulate_grad_batches == 1:
                options.trainer.accumulate_grad_batches = max(1, recipe.batch // recipe.micro_batch)
        if options.trainer.val_check_interval is None:
            # Lightning counts micro-batches.
            interval = min(options.save_every, max(1, options.trainer.max_steps // 4))
            options.trainer.val_check_interval = interval * options.trainer.accumulate_grad_batches

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        options = self.config_init
        every = options.save_every
        callbacks = [*_as_list(options.trainer.callbacks), Speed()]
        if options.ema is not None:
            callbacks.append(TrainedWeightsAverage(options.ema))
        # After the averaging callback, so that it saves the average of the same step.
        callbacks.append(RunCheckpoint(self.output, every_n_steps=every))
        if options.push_every is not None:
            callbacks.append(PushCheckpoint(self.output, options.push, options.push_every, dataset_on_hub(options)))
        if options.trainer.enable_progress_bar is not False:
            callbacks.append(TrainingProgress())
        if options.trainer.logger is None:
            kwargs["logger"] = make_loggers(parts(options.logger or DEFAULT_LOGGERS), self.output)
        if options.trainer.precision is None and getattr(self.model.policy.config, "dtype", None) == "bfloat16":
            # LeRobot also trains such policies with mixed precision.
            kwargs["precision"] = "bf16-mixed"
        # RunCheckpoint replaces Lightning's own checkpoints.
        kwargs |= {"enable_checkpointing": False, "default_root_dir": self.output}
        try:
            for logger in _as_list(options.trainer.logger):
                # Starts it, so that a missing login is said before anything is written.
                _ = getattr(logger, "experiment", None)
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except MisconfigurationException:
            raise
        except Exception as error:  # of options that do not exist or exclude each other, and of loggers
            raise GridsError(f"the options of the trainer cannot be used: {error} (from Lightning)") from error


def _as_list(given: Any) -> list[Any]:
    """One of something, several or none, as Lightning's options may be."""
    if given in (None, True, False):
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def dataset_on_hub(options: Any) -> str | None:
    """Hub id of the dataset for the card; None for a local folder, whose name may look like a Hub id."""
    return None if Path(options.dataset).exists() else options.dataset


def find_resumable(output: Path) -> Path:
    """Find the training state to resume from, and rename newer damaged states.

    Raises:
        CheckpointError: If there is no undamaged state.
    """
    state, damaged = find_state(output)
    for path in damaged:
        print(f"{path} is damaged; continuing from {state.name}, the previous state", file=sys.stderr)
        # Otherwise the next save would replace the undamaged state by this one.
        path.replace(path.with_suffix(".damaged"))
    return state


class SaveOptions(SaveConfigCallback):
    """Save the options of the run in fit.yaml, in the format of `fit --config`."""

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        path = Path(trainer.default_root_dir) / "fit.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, path, overwrite=True, multifile=False)


def quiet() -> None:
    """Hide warnings of libraries that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lerobot").setLevel(logging.ERROR)
    for message in (
        "does not have many workers",
        "LeafSpec",
        "lr_scheduler.step",
        "LightningCLI's args parameter",
        "exists and is not empty",
        "your dataloader is not resumable",
    ):
        warnings.filterwarnings("ignore", f".*{message}.*")


def describe(cli: FitCLI) -> str:
    """Describe the training for the user: weights, tokens, data and steps."""
    module, data = cli.model, cli.datamodule
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.policy.parameters())
    train, val = data.split()
    accumulated = cli.config.trainer.accumulate_grad_batches
    positions = " and the recorded positions" if module.position_loss is not None else ""
    revision = getattr(module.policy.config, "base_revision", None)
    base = f"{cli.config.policy} at {revision[:12]}" if revision else cli.config.policy
    return (
        f"{module.trainable.reason}\n{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters of {base} with "
        f"{_describe_tokens(module)}\non {len(train)} episodes{positions} ({len(val)} held out) of "
        f"{cli.config.dataset}\n{cli.config.trainer.max_steps} steps of {data.batch_size} frames"
        f"{f' x {accumulated} accumulated' if accumulated > 1 else ''}, peak learning rate {module.lr:g}, "
        f"seed {cli.config.seed}"
    )


def _describe_tokens(module: GridsModule) -> str:
    """Describe the visual tokens and the teacher."""
    policy = module.policy
    if not isinstance(policy, GridsPolicy):
        return "all visual tokens per camera"
    if policy.num_tokens == 0:
        return "no visual tokens"
    reducer = policy.config.reducer
    text = f"{reducer.budget} visual tokens per camera by '{reducer.type}'"
    if policy.config.schedule != "constant":
        text += f" (schedule in training: {policy.config.schedule}, up to {reducer.largest})"
    if module.looking is not None:
        text += (
            f"\nfirst, on {module.look_first} frames, the sampler learns where to look from "
            f"{module.looking.teacher.description}"
        )
    if module.distillation is not None:
        start, end = module.distill
        share = f"{100 * start:.0f} %" if start == end else f"{100 * start:.0f} to {100 * end:.0f} %"
        text += f"\n{share} of the loss: the distance to {module.distillation.teacher.description}"
    return text


def fit(arguments: list[str]) -> None:
    """Train with the options of a command line."""
    quiet()
    # Remove our handler, so that Lightning's handler saves between two steps and stops.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    try:
        _run(arguments)
    except MisconfigurationException as error:
        # Lightning raises this for options that do not fit together.
        raise GridsError(f"{error} (from Lightning)") from error


def _run(arguments: list[str]) -> None:
    cli = _parse(arguments)
    if cli.trainer.is_global_zero:
        disk = check_disk(cli.output, cli.model.policy)
        report([*cli.datamodule.findings, *cli.model.loaded.findings, *disk])
        print(describe(cli))
    # Before Lightning writes the options of the run: what is wrong with the data is said, and nothing is left behind.
    cli.datamodule.load(cli.model.policy.config, cli.model.loaded.renames)
    stop = Interruption()
    try:
        with stopping_between_steps() as stop:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from)
    except SIGTERMException:
        if cli.trainer.is_global_zero:
            print(f"lerobot-grids: {_how_to_go_on(cli, arguments, stop)}", file=sys.stderr)
        sys.exit(130 if stop.pressed else 143)
    except SystemExit as ended:
        # Lightning turns Ctrl-C into an exit without a message.
        raise KeyboardInterrupt from ended
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = device_memory(cli.config.trainer.accelerator)
        raise GridsError(advise(cli.model, cli.datamodule.batch_size, *device)) from error
    if not cli.trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    if "val/loss" in metrics:
        print(f"validation loss {metrics['val/loss']:.4f}")
    # A recorded simulation can count successes; a robot cannot.
    simulated = POSITIONS in cli.datamodule.meta.features
    then = "eval" if simulated else f"validate --dataset {cli.config.dataset}"
    print(
        f"saved {cli.output}/pretrained_model, for LeRobot's commands: --policy.path={cli.output}/pretrained_model\n"
        f"next: lerobot-grids {then} --policy {cli.output}"
    )
    if cli.config.push is not None:
        _push(cli)


def _without_resume(arguments: list[str]) -> list[str]:
    """Arguments without --resume, --resume=false and --resume false."""
    return [
        word
        for before, word in pairwise(["", *arguments])
        if not word.startswith("--resume") and (before != "--resume" or word.startswith("--"))
    ]


def _how_to_go_on(cli: FitCLI, arguments: list[str], stop: Interruption) -> str:
    """What was kept of a run that was stopped, and the command that goes on."""
    what = "interrupted" if stop.pressed else "terminated"
    if not any((cli.output / name).is_file() for name in STATE_FILES):
        return f"{what} before the first step was done, so there is nothing to continue"
    saved = next(c.saved_at for c in cli.trainer.callbacks if isinstance(c, RunCheckpoint))
    again = shlex.join(["lerobot-grids", "fit", *_without_resume(arguments), "--resume"])
    return f"{what}; continue with --resume, step {saved} is saved: {again}"


def _push(cli: FitCLI) -> None:
    options = cli.config
    try:
        pushed = push(cli.output, options.push, description=Description(dataset=dataset_on_hub(options)))
    except GridsError as error:
        raise GridsError(
            f"{error}; the policy is saved, push it with lerobot-grids push {cli.output} {options.push}"
        ) from error
    done = "the Hub already has this" if pushed.unchanged else "pushed"
    print(f"{done} {pushed.format} checkpoint {'at' if pushed.unchanged else 'to'} {options.push}@{pushed.commit}")


def _parse(arguments: list[str]) -> FitCLI:
    return FitCLI(
        GridsModule,
        LeRobotDataModule,
        args=arguments,
        run=False,
        save_config_callback=SaveOptions,
        save_config_kwargs={"save_to_log_dir": False},
        parser_class=FitParser,
        parser_kwargs={"prog": "lerobot-grids fit"},
        seed_everything_default=0,
        trainer_defaults={
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
    )
