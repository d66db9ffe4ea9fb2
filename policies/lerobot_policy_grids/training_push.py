"""What `lerobot-train --policy.push_to_hub=true` pushes of a grids policy.

LeRobot pushes weights, its training configuration and a card, and then each processor in a commit of its own. The
training configuration holds paths of this machine, the card is checked by a host that is hard-coded, and who loads
between two commits gets new weights with old processors. Here the first commit is the whole checkpoint: the run's
last one has the processors already, so the commits after it have nothing to change.
"""

import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from lerobot.utils.constants import CHECKPOINTS_DIR, LAST_CHECKPOINT_LINK, PRETRAINED_MODEL_DIR
from torch import Tensor

from lerobot_grids_cards import Measurements, render

from .commit import commit_folder
from .facts import read_facts
from .files import CARD_FILE, CONFIG_FILE, POSTPROCESSOR_FILE, PREPROCESSOR_FILE, STATE_FILE, read_json
from .hub_errors import asking_the_hub
from .manifest import write_manifest
from .outgoing import check_outgoing, scrub_config
from .trust import check_published


def push_trained(policy: Any, train_config: Any, peft_model: Any | None, state_dict: dict[str, Tensor] | None) -> None:
    """Push a grids policy that LeRobot has trained, as a full checkpoint, to `policy.config.repo_id`.

    Args:
        policy: The policy. With `peft_model` its low-rank adapters are merged into it, for good.
        train_config: LeRobot's `TrainPipelineConfig`.
        peft_model: PEFT's wrapper around the policy, where it was trained through one.
        state_dict: The policy's state where it is sharded over processes and has been gathered.

    Raises:
        CheckpointError: If others could not load it, or its weights hold NaN or infinity.
        GridsError: If a file holds a token or a path of this machine.
        HubError: If the Hub refuses.
    """
    config = policy.config
    with TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        complete = _take_processors(train_config, folder)
        if peft_model is not None:
            peft_model.merge_and_unload()
            config.use_peft = False
        policy.save_pretrained(folder, state_dict=state_dict)
        scrub_config(folder)
        if complete:
            write_manifest(folder)
            check_published(folder)
        else:
            logging.warning(
                "the last step has no checkpoint here, so the push has no manifest and comes in three commits"
            )
        repo_id = _full_name(config.repo_id)
        (folder / CARD_FILE).write_text(_card(folder, repo_id, config, train_config), encoding="utf-8")
        check_outgoing(folder)
        message = f"full checkpoint of lerobot-train, lerobot-grids {version('lerobot_policy_grids')}"
        done = commit_folder(folder, repo_id, message, private=bool(config.private))
    # LeRobot ends a remote job when it sees this line.
    logging.info(f"Model pushed to {done.url}")


def _take_processors(train_config: Any, folder: Path) -> bool:
    """Copy the processors of the run's last checkpoint, if its configuration is the one in `folder`."""
    last = Path(train_config.output_dir) / CHECKPOINTS_DIR / LAST_CHECKPOINT_LINK / PRETRAINED_MODEL_DIR
    # Which counts the steps, and names the device.
    if not (last / CONFIG_FILE).is_file() or read_json(last / CONFIG_FILE) != read_json(folder / CONFIG_FILE):
        return False
    for path in last.iterdir():
        if path.name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE) or STATE_FILE.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    return True


def _full_name(repo_id: str) -> str:
    """LeRobot takes a name alone for one of the user's own repositories."""
    if "/" in repo_id:
        return repo_id
    with asking_the_hub(f"{repo_id} cannot be pushed to"):
        return f"{HfApi().whoami()['name']}/{repo_id}"


def _card(folder: Path, repo_id: str, config: Any, train_config: Any) -> str:
    dataset, training = train_config.dataset, ("steps", "batch_size", "seed")
    facts = read_facts(
        folder,
        repo_id=repo_id,
        # One that was read from a folder need not be on the Hub.
        dataset=dataset.repo_id if dataset.root is None else None,
        licence=config.license,
        tags=list(config.tags or []),
        training={name: str(getattr(train_config, name)) for name in training},
    )
    return render(facts, Measurements())
