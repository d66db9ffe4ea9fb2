"""Where the curves of a training go: files, TensorBoard, Weights & Biases, or Trackio."""

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lerobot_policy_grids.errors import GridsError, first_line

PROJECT = "lerobot-grids"
# Modes of Weights & Biases that need no login.
WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def make_loggers(names: list[str], output: Path) -> list[Logger]:
    """The loggers of a run, of which nothing is written before the first value.

    Args:
        names: Of `csv`, `tensorboard`, `wandb` and `trackio`.
        output: The run's output folder.

    Raises:
        GridsError: If Weights & Biases is asked for and nobody is logged in.
    """
    # Lightning's CSV logger empties its folder, so each resumed part gets its own.
    parts = len(list((output / "logs").glob("csv*")))
    made: list[Logger] = []
    for name in names:
        if name == "csv":
            made.append(CSVLogger(output, name="logs", version="csv" if parts == 0 else f"csv-{parts + 1}"))
        elif name == "tensorboard":
            made.append(TensorBoardLogger(output, name="logs", version="tensorboard"))
        elif name == "wandb":
            made.append(_wandb(output))
        else:
            made.append(TrackioLogger(output.name))
    return made


def _wandb(output: Path) -> Logger:
    import wandb

    if os.environ.get("WANDB_MODE") not in WITHOUT_LOGIN and not wandb.api.api_key:
        raise GridsError(
            "--logger wandb: nobody is logged in to Weights & Biases; run: wandb login, or log without a network with "
            "WANDB_MODE=offline"
        )
    logging.getLogger("wandb").setLevel(logging.ERROR)
    return LazyWandbLogger(name=output.name, project=PROJECT, save_dir=output / "logs")


class LazyWandbLogger(WandbLogger):
    """Lightning's, whose folder is made with the first value and not before."""

    @property
    def experiment(self) -> Any:
        """The run of Weights & Biases.

        Raises:
            GridsError: If it cannot be started.
        """
        if self._experiment is None and rank_zero_only.rank == 0:
            Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        try:
            return super().experiment
        except Exception as error:  # its client has errors of its own
            raise GridsError(
                f"--logger wandb: {first_line(error)}; log without a network with WANDB_MODE=offline"
            ) from error


class TrackioLogger(Logger):
    """Trackio's runs, which are files on this machine; `trackio show` shows them. Lightning has no logger for it.

    Args:
        name: Name of the run.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._run: Any = None
        self._options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Name of the project."""
        return PROJECT

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._name

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the options of the run; they are sent with the first value."""
        self._options |= vars(params) if isinstance(params, Namespace) else dict(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send values, of the first process alone."""
        if rank_zero_only.rank != 0:
            return
        import trackio

        if self._run is None:
            config = {
                name: value if isinstance(value, (int, float)) else str(value) for name, value in self._options.items()
            }
            self._run = trackio.init(project=PROJECT, name=self._name, config=config, resume="allow")
        trackio.log({name: float(value) for name, value in metrics.items()}, step=step)

    def finalize(self, status: str) -> None:
        """Write what is waiting."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None
