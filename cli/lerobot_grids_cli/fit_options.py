"""The main options of `fit`: their docstrings are its help, their values what Lightning's side is told."""

from dataclasses import dataclass
from typing import Any

EPILOG = (
    "Everything Lightning offers is reachable too: --trainer.devices, --trainer.strategy, --trainer.precision, "
    "--trainer.accumulate_grad_batches, ..., and the rest of the model and the data: --model.lr, "
    "--model.train, --data.val_fraction, ... `lerobot-grids fit --help_all` lists them, "
    "`--print_config` writes them as YAML, `--config FILE` reads them back."
)


@dataclass
class FitOptions:
    """Train a policy on a dataset, dense or with K visual tokens per camera."""

    dataset: str
    """Folder of a LeRobotDataset, or its id on the Hub (user/name)."""
    policy: str = "tiny"
    """What to start from: a family by its name (the README lists them, and so does the error for an unknown one), a
    checkpoint folder, or a Hub id. tiny is a small policy with random weights that needs no download, tiny_metaworld a
    trained one in the package."""
    tokens: int | str | None = None
    """Visual tokens per camera, or 'dense' to train the policy as it is. Defaults to 16, or to a checkpoint's own."""
    reducer: str | dict[str, Any] | None = None
    """How tokens are reduced: grids (the default), or what it is compared with, such as pool, uniform, tome, or blind
    for no visual tokens at all. With options: --reducer.type grids --reducer.condition_on '[image]'."""
    resolution: int | None = None
    """Side in pixels of the square that images are brought to: fewer tokens by smaller images."""
    schedule: str = "constant"
    """K over the steps: constant; linear, cosine or exponential, from every token down to --tokens; or elastic, drawn
    anew at each step, for a checkpoint that serves any budget."""
    distill: float = 0.0
    """Share of the loss, 0 to 1, that is the distance to the dense teacher's prediction, same noise, same time."""
    teacher: str | None = None
    """Dense policy to imitate. Defaults to what --policy names; where that stays frozen no second copy is kept."""
    output: str | None = None
    """Folder for checkpoint and logs. Defaults to outputs/<policy>-<tokens>; must not exist unless --resume."""
    steps: int | None = None
    """Training steps. Defaults to the family's recipe: 2000 for tiny, 20000 or 30000 for the large ones."""
    batch_size: int | None = None
    """Frames per step and device. By default the recipe's batch, in micro-batches that are accumulated."""
    seed: int = 0
    """Seed of everything random; the same seed on the same machine gives the same policy, killed and resumed or not."""
    ema: float | None = None
    """Keep an exponential moving average of the trained weights with this decay, such as 0.999; the policy gets it."""
    save_every: int = 500
    """Steps between two checkpoints, so that a killed run can go on."""
    rename_map: dict[str, str] | None = None
    """Dataset feature names to the policy's, where they differ: '{"observation.image": "observation.images.top"}'."""
    push: str | None = None
    """Repository on the Hub, user/name, to push the trained policy to; made, and public, if it does not exist."""
    push_every: int | None = None
    """With --push: also push every so many steps, what was saved there, so a multiple of --save_every. Training waits
    for it; a push that fails is a warning, except the last one's. Each is one commit on top of the one before."""
    resume: bool = False
    """Go on with the run in --output from its last checkpoint."""
