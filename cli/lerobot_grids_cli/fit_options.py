"""The main options of `fit`. Their docstrings are the help texts; `fit_lightning` uses their values."""

from dataclasses import dataclass
from typing import Any

EPILOG = (
    "All options of Lightning's trainer are available too: --trainer.devices, --trainer.strategy, --trainer.precision, "
    "--trainer.accumulate_grad_batches, ..., and all options of the model and the data: --model.lr, "
    "--model.train, --data.val_fraction, ... `lerobot-grids fit --help_all` lists them, "
    "`--print_config` writes them as YAML, `--config FILE` reads them back."
)

EXAMPLES = (
    "lerobot-grids fit --policy lerobot/smolvla_base --tokens 16 --dataset me/my_robot_data",
    "lerobot-grids fit --policy outputs/dense --tokens 16 --dataset me/my_robot_data --distill 0.5 --schedule elastic",
    "lerobot-grids fit --policy tiny --tokens dense --dataset data/push --steps 200 --logger csv,wandb",
)


@dataclass
class FitOptions:
    """Train a policy on a dataset, dense or with K visual tokens per camera."""

    dataset: str
    """Folder of a LeRobotDataset, or its id on the Hub (user/name)."""
    policy: str = "tiny"
    """Policy to start from: the name of a family (the README and the error for an unknown name list them), a checkpoint
    folder, or a Hub id. tiny is a small policy with random weights that needs no download; tiny_metaworld and
    tiny_libero are trained ones in this package."""
    base: dict[str, Any] | None = None
    """Options of a policy that starts without a checkpoint, such as act, by LeRobot's names: --base.chunk_size 50
    --base.n_action_steps 50."""
    tokens: int | str | None = None
    """Visual tokens per camera, or 'dense' to train with all tokens. Defaults to 16, or to the checkpoint's number."""
    reducer: str | dict[str, Any] | None = None
    """How tokens are reduced: grids (the default), a baseline such as pool, uniform or tome, or blind for no visual
    tokens. With options: --reducer.type grids --reducer.condition_on '[language]'."""
    resolution: int | None = None
    """Side in pixels of the square to which images are resized; smaller images give fewer tokens."""
    schedule: str = "constant"
    """K over the training steps: constant; linear, cosine or exponential, from all tokens down to --tokens; or elastic,
    a random K at each step, for a checkpoint that works at any budget."""
    distill: float = 0.0
    """Weight in the loss, 0 to 1, of the distance to the dense teacher's prediction at the same noise and time."""
    teacher: str | None = None
    """Dense policy to imitate. Defaults to --policy; if its weights stay frozen, no second copy is in memory."""
    output: str | None = None
    """Folder for checkpoint and logs. Defaults to outputs/<policy>-<tokens>; it may only exist with --resume."""
    steps: int | None = None
    """Number of training steps. Defaults to the family's recipe: 2000 for tiny, 20000 or 30000 for large ones."""
    batch_size: int | None = None
    """Frames per step and device. Defaults to the recipe's batch, split into accumulated micro-batches."""
    seed: int = 0
    """Seed of all random numbers. On one machine, the same seed gives the same policy, also after --resume."""
    ema: float | None = None
    """Decay of an exponential moving average of the trained weights, such as 0.999; the policy gets the average."""
    save_every: int = 500
    """Number of steps between two checkpoints, from which a killed run can resume."""
    rename_map: dict[str, str] | None = None
    """Names of dataset features -> the policy's names: '{"observation.image": "observation.images.top"}'."""
    push: str | None = None
    """Repository on the Hub, user/name, for the trained policy; created as a public repository if it does not exist."""
    push_every: int | None = None
    """With --push: also push the saved checkpoint every so many steps, a multiple of --save_every. Training waits for
    each push. A failed push is a warning; only the last one is an error. Each push is one commit."""
    logger: str | None = None
    """Where curves go, one or several of csv, tensorboard, wandb and trackio, such as csv,wandb. Defaults to
    csv,tensorboard. wandb needs a login or WANDB_MODE=offline; trackio keeps its runs on this machine."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint."""
