"""A grids policy sees and acts through its base policy's own processors."""

import logging
from importlib import import_module
from inspect import signature
from typing import Any

from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .checkpoint.statistics import find_fault, settle_constants
from .configuration_grids import GridsConfig, base_config
from .errors import DatasetError
from .families import get_family
from .instructions import find_cut

Statistics = dict[str, dict[str, Tensor]]


def make_grids_pre_post_processors(
    config: GridsConfig, dataset_stats: Statistics | None = None, dataset_meta: Any | None = None
) -> tuple[Any, Any]:
    """Build the base policy's pre- and post-processor.

    Args:
        config: The wrapper's configuration; its features and device are passed on to the base.
        dataset_stats: Statistics for normalisation.
        dataset_meta: Dataset metadata, for base policies that ask for it.

    Returns:
        (pre-processor, post-processor).

    Raises:
        DatasetError: If the tokenizer cuts two instructions of the dataset to the same.
    """
    config.share_with_base()
    preprocessor, postprocessor = make_processors(config, dataset_stats, dataset_meta)
    # Left here by lerobot-train, which cuts instructions without a word.
    meta = vars(config).get("_runtime_dataset_meta")
    cut = None if meta is None else find_cut(preprocessor, list(meta.tasks.index), dataset_stats or {})
    if cut is not None:
        if cut.is_ambiguous:
            raise DatasetError(cut.line)
        logging.warning(cut.line)
    return preprocessor, postprocessor


def normalisation_faults(*pipelines: Any) -> list[str]:
    """What a pre- and a post-processor would leave as it is of state and action, or turn into nonsense."""
    faults = []
    for step in (step for pipeline in pipelines for step in pipeline.steps):
        if isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
            read = {name: feature for name, feature in step.features.items() if name in (OBS_STATE, ACTION)}
            features = {name: (feature.type.value, tuple(feature.shape)) for name, feature in read.items()}
            modes = {kind.value: mode.value for kind, mode in step.norm_map.items()}
            fault = find_fault(features, modes, step.stats or {})
            if fault is not None and fault not in faults:
                faults.append(fault)
    return faults


def make_processors(
    config: Any, dataset_stats: Statistics | None = None, dataset_meta: Any | None = None
) -> tuple[Any, Any]:
    """Build the processors of a dense policy, or of the one inside a grids policy, found by LeRobot's naming rule.

    LeRobot's own factory would do in 0.6.1; in 0.6.0 it takes a class derived from a policy of its own for that policy.

    Args:
        config: Configuration of a dense or a grids policy.
        dataset_stats: Statistics for normalisation.
        dataset_meta: Dataset metadata, for policies that ask for it.

    Returns:
        (pre-processor, post-processor).
    """
    base = base_config(config)
    module = import_module(type(base).__module__.replace("configuration_", "processor_"))
    make = getattr(module, f"make_{base.type}_pre_post_processors")
    if dataset_stats is not None:
        dataset_stats = settle_constants(dataset_stats)
    extra = {"dataset_meta": dataset_meta} if "dataset_meta" in signature(make).parameters else {}
    family = get_family(base.type)
    with family.needing_its_extra(), family.needing_its_files(base, fresh=False):
        preprocessor, postprocessor = make(base, dataset_stats=dataset_stats, **extra)
    return preprocessor, postprocessor
