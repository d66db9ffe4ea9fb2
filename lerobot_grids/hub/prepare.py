"""Prepare a push: the checkpoint's files and a model card, without private data such as tokens or paths."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lerobot_grids_cards import DistanceRow, Measurements, PolicyFacts, SuccessRow, read_measurements, render
from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, check_processors, check_published, resolve_checkpoint
from lerobot_policy_grids.checkpoint.files import (
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    OPTIONS_FILE,
    PICTURE_FILE,
    WEIGHTS_FILE,
    read_json,
)
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.checkpoint.manifest import FORMATS, Base, read_manifest, write_manifest
from lerobot_policy_grids.checkpoint.statistics import check_statistics
from lerobot_policy_grids.checkpoint.trust import REFUSED
from lerobot_policy_grids.configuration_grids import GRIDS_TYPE
from lerobot_policy_grids.errors import CheckpointError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.reducers import ReducerConfig

from .formats import write_adapter, write_full
from .privacy import check_outgoing, scrub_config

Format = Literal["auto", "adapter", "full"]

# Above this size, as a share of the full checkpoint, "auto" pushes the full checkpoint.
WORTHWHILE = 0.5

# Training options that a card shows; the others are paths, names, or defaults of Lightning.
TRAINING_OPTIONS = (
    "tokens",
    "reducer",
    "schedule",
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
    """Information for the card that is not in the checkpoint.

    Attributes:
        results: JSON files of eval, validate and bench; a looks.png beside one is pushed too.
        dataset: Hub id of the training data.
        licence: Identifier of the licence in the Hub's spelling.
        template: A jinja2 template to use instead of the project's.
        step: Training step of the checkpoint, if training continues.
    """

    results: tuple[Path, ...] = ()
    dataset: str | None = None
    licence: str | None = None
    template: Path | None = None
    step: int | None = None


def prepare(source: Path, staging: Path, repo_id: str, format: Format, description: Description) -> None:
    """Write all files of a push into a folder and check them.

    Args:
        source: A checkpoint folder; it is not changed.
        staging: An empty folder on the same disk.
        repo_id: Repository of the push, `user/name`.
        format: Format to write. "auto" takes the adapter if its base is on the Hub and it is small enough.
        description: Information for the card.

    Raises:
        CheckpointError: If the checkpoint is incomplete, damaged, holds NaN or links, or others could not load it.
        GridsError: If a file holds private data, or a result file does not fit.
    """
    links = [path.name for path in source.rglob("*") if path.is_symlink()]
    if links:
        raise CheckpointError(
            f"{source} holds links, {', '.join(links)}; only plain files can be pushed; replace the links by files"
        )
    require_complete(source)
    before = source.stat().st_ino
    base = _write_format(source, staging, format)
    if source.stat().st_ino != before:
        raise CheckpointError(f"{source} was replaced by its training run during the push; push again")
    scrub_config(staging)
    for result in description.results:
        picture = result.parent / PICTURE_FILE
        if picture.is_file():
            shutil.copyfile(picture, staging / PICTURE_FILE)
    write_manifest(staging, base)
    text = _card(source, staging, repo_id, description)
    (staging / CARD_FILE).write_text(text, encoding="utf-8")
    _check_loadable(staging)
    check_statistics(staging)
    check_outgoing(staging)


def _write_format(source: Path, staging: Path, format: Format) -> Base | None:
    if format == "auto":
        config = read_json(source / CONFIG_FILE)
        has_base = config.get("base_repo_id") is not None and config.get("base_revision") is not None
        format = "adapter" if has_base else "full"
        if has_base and (source / WEIGHTS_FILE).is_file():
            base = write_adapter(source, staging)
            if (staging / ADAPTER_FILE).stat().st_size <= WORTHWHILE * (source / WEIGHTS_FILE).stat().st_size:
                return base
            for path in staging.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            format = "full"
    if format == "adapter":
        return write_adapter(source, staging)
    write_full(source, staging)
    return None


def _check_loadable(staging: Path) -> None:
    try:
        check_published(staging)
        check_processors(staging)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).removesuffix(REFUSED)}others could not load it from the Hub") from error


def read_facts(folder: Path, **known: Any) -> PolicyFacts:
    """Read the facts for a model card from a checkpoint folder, dense or grids.

    Args:
        folder: The checkpoint; without a manifest it counts as a full one.
        **known: Facts that the folder does not hold: repo_id, dataset, licence, training, tags.

    Raises:
        CheckpointError: If its configuration or its manifest cannot be read.
    """
    config, manifest = read_json(folder / CONFIG_FILE), read_manifest(folder)
    grids = config["type"] == GRIDS_TYPE
    base = None if manifest is None else manifest.base
    features = config["input_features"] or {}
    reducer = config["reducer"] if grids else {}
    dense = config["base"] if grids else config
    return PolicyFacts(
        family=dense["type"],
        num_steps=_flow_steps(dense),
        num_tokens=reducer.get("num_tokens", 0) if grids else None,
        num_tokens_max=reducer.get("num_tokens_max"),
        reducer=reducer.get("type", ""),
        reducer_summary=ReducerConfig.get_choice_class(reducer["type"]).summary if grids else "",
        cameras=[name for name, feature in features.items() if feature["type"] == "VISUAL"],
        format=FORMATS[0] if manifest is None else manifest.format,
        base_repo_id=config.get("base_repo_id"),
        base_revision=config.get("base_revision"),
        base_sha256=None if base is None else base.sha256,
        picture=(folder / PICTURE_FILE).is_file(),
        **known,
    )


def _flow_steps(config: dict[str, Any]) -> int | None:
    """Integration steps of the flow of a dense policy, by its configuration; None without a flow."""
    try:
        field = get_family(config["type"]).flow_steps
    except UnsupportedPolicyError:
        return None
    return None if field is None else config.get(field)


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
    except Exception as error:  # a template can raise any error
        raise GridsError(f"the card cannot be rendered: {error!r}; correct the template") from error


def _measurements(source: Path, facts: PolicyFacts, description: Description) -> Measurements:
    try:
        found = read_measurements(list(description.results), _is(source, facts.repo_id))
    except ValueError as error:
        raise GridsError(str(error)) from error
    for costs in found.costs:
        if costs.policy != facts.family:
            raise GridsError(f"--results has costs of '{costs.policy}', but {source} has type '{facts.family}'")
    rows: list[SuccessRow | DistanceRow] = [*found.successes, *found.distances]
    if rows and not any(row.own for row in rows):
        seen = ", ".join(sorted({row.policy for row in rows}))
        raise GridsError(f"--results has figures of {seen}, none of {source}; give results of this checkpoint")
    return found


def _is(source: Path, repo_id: str) -> Callable[[str], bool]:
    def is_own(policy: str) -> bool:
        try:
            return resolve_checkpoint(Path(policy)).resolve() == source.resolve()
        except CheckpointError:
            return policy.partition("@")[0] == repo_id

    return is_own


def _training(source: Path) -> dict[str, str]:
    """Training options of the run whose output folder holds the checkpoint, or an empty dict."""
    path = source.parent / OPTIONS_FILE
    if source.name != CHECKPOINT_FOLDER or not path.is_file():
        return {}
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise GridsError(f"{path} is not valid YAML ({error}); remove it, then push") from error
    shown = {}
    for name in TRAINING_OPTIONS:
        value: Any = options
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and re.fullmatch(r"[\w.,:@+ -]{1,80}", str(value)):
            shown[name] = str(value)
    return shown
