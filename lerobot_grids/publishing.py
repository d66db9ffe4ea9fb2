"""What a push consists of: the checkpoint's own files and a card, and nothing that says who or where you are."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lerobot_grids_cards import DistanceRow, Measurements, PolicyFacts, SuccessRow, read_measurements, render
from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, require_complete, resolve_checkpoint
from lerobot_policy_grids.errors import CheckpointError, GridsError
from lerobot_policy_grids.facts import read_facts
from lerobot_policy_grids.files import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, PICTURE_FILE, WEIGHTS_FILE, read_json
from lerobot_policy_grids.formats import write_adapter, write_full
from lerobot_policy_grids.manifest import read_manifest, write_manifest
from lerobot_policy_grids.outgoing import check_outgoing, scrub_config
from lerobot_policy_grids.trust import REFUSED, check_processors, check_published

Format = Literal["auto", "adapter", "full"]

# An adapter that is larger than this share of the full checkpoint saves too little to need a base.
WORTHWHILE = 0.5

# Options of a run that a card shows; the others are paths, names, or defaults of Lightning.
TRAINING_OPTIONS = (
    "tokens",
    "reducer",
    "budget",
    "distill",
    "steps",
    "batch_size",
    "seed",
    "ema",
    "model.train",
    "model.lora_rank",
    "model.lr",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "trainer.precision",
)


@dataclass(frozen=True)
class Description:
    """What the card is told besides what the checkpoint says.

    Attributes:
        results: JSON files of eval, validate and bench; a looks.png beside one goes along.
        dataset: Hub id of the training data.
        licence: Identifier as the Hub spells it.
        template: A jinja2 template instead of the project's.
        step: Training step of a checkpoint that is trained further.
    """

    results: tuple[Path, ...] = ()
    dataset: str | None = None
    licence: str | None = None
    template: Path | None = None
    step: int | None = None


def prepare(source: Path, staging: Path, repo_id: str, format: Format, description: Description) -> None:
    """Put everything that will be pushed into a folder.

    Args:
        source: A checkpoint folder; it is only read.
        staging: An empty folder on the same disk.
        repo_id: Where it will go.
        format: What to make of it; "auto" takes the adapter where there is a base on the Hub and it saves enough.
        description: For the card.

    Raises:
        CheckpointError: If the checkpoint is incomplete, damaged, holds NaN or links, or could not be loaded by others.
        GridsError: If something in it should not leave this machine, or a result is not what it should be.
    """
    links = [path.name for path in source.iterdir() if path.is_symlink()]
    if links:
        raise CheckpointError(f"{source} holds links, {', '.join(links)}; only plain files are pushed, copy them there")
    require_complete(source)
    before = source.stat().st_ino
    _write_format(source, staging, format)
    if source.stat().st_ino != before:
        raise CheckpointError(f"{source} was replaced by its training run while it was read; push again")
    manifest = read_manifest(staging)
    assert manifest is not None  # just written
    scrub_config(staging)
    for result in description.results:
        picture = result.parent / PICTURE_FILE
        if picture.is_file():
            shutil.copyfile(picture, staging / PICTURE_FILE)
    write_manifest(staging, manifest.base)
    text = _card(source, staging, repo_id, description)
    (staging / CARD_FILE).write_text(text, encoding="utf-8")
    _check_loadable(source, staging)
    check_outgoing(staging)


def _write_format(source: Path, staging: Path, format: Format) -> None:
    if format == "auto":
        config = read_json(source / CONFIG_FILE)
        has_base = config.get("base_repo_id") is not None and config.get("base_revision") is not None
        format = "adapter" if has_base else "full"
        if has_base and (source / WEIGHTS_FILE).is_file():
            write_adapter(source, staging)
            if (staging / ADAPTER_FILE).stat().st_size <= WORTHWHILE * (source / WEIGHTS_FILE).stat().st_size:
                return
            for path in staging.iterdir():
                path.unlink()
            format = "full"
    (write_adapter if format == "adapter" else write_full)(source, staging)


def _check_loadable(source: Path, staging: Path) -> None:
    try:
        check_published(staging)
        check_processors(staging)
    except CheckpointError as error:
        seen = str(error).removesuffix(REFUSED).replace(str(staging), str(source))
        raise CheckpointError(f"{seen}others could not load it from the Hub") from error


def _card(source: Path, staging: Path, repo_id: str, description: Description) -> str:
    training = {} if description.step is None else {"saved at step": str(description.step)}
    facts = read_facts(
        staging,
        repo_id=repo_id,
        dataset=description.dataset,
        licence=description.licence,
        training=training | _training(source),
    )
    measurements = _measurements(source, facts, description)
    options: dict[str, Any] = {} if description.template is None else {"template": description.template}
    try:
        return render(facts, measurements, **options)
    except Exception as error:  # jinja2 raises what the template meets
        raise GridsError(f"the card cannot be rendered: {error!r}; correct the template") from error


def _measurements(source: Path, facts: PolicyFacts, description: Description) -> Measurements:
    try:
        found = read_measurements(list(description.results), _is(source, facts.repo_id))
    except ValueError as error:
        raise GridsError(str(error)) from error
    for costs in found.costs:
        if costs.policy != facts.family:
            raise GridsError(f"--results has costs of '{costs.policy}', but {source} is a '{facts.family}' policy")
    rows: list[SuccessRow | DistanceRow] = [*found.successes, *found.distances]
    if rows and not any(row.own for row in rows):
        seen = ", ".join(sorted({row.policy for row in rows}))
        raise GridsError(f"--results has figures of {seen}, none of {source}; give one that was measured with it")
    return found


def _is(source: Path, repo_id: str) -> Callable[[str], bool]:
    def is_own(policy: str) -> bool:
        try:
            return resolve_checkpoint(Path(policy)).resolve() == source.resolve()
        except CheckpointError:
            return policy.partition("@")[0] == repo_id

    return is_own


def _training(source: Path) -> dict[str, str]:
    """The options of the run that a checkpoint lies in, where it does."""
    path = source.parent / "fit.yaml"
    if source.name != CHECKPOINT_FOLDER or not path.is_file():
        return {}
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise GridsError(f"{path} is no YAML ({error}); remove it, then push") from error
    shown = {}
    for name in TRAINING_OPTIONS:
        value: Any = options
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and re.fullmatch(r"[\w.,:@+ -]{1,80}", str(value)):
            shown[name] = str(value)
    return shown
