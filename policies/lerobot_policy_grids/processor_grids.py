"""A grids policy sees and acts through its base policy's own processors."""

from importlib import import_module
from inspect import signature
from typing import Any

from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .checkpoint.statistics import find_fault, settle_constants
from .configuration_grids import GridsConfig, base_config
from .errors import DatasetError

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
        DatasetError: If statistics are given, and state or action would not be normalised by them.
    """
    config.share_with_base()
    processors = make_processors(config, dataset_stats, dataset_meta)
    faults = [] if dataset_stats is None else normalisation_faults(*processors)
    if faults:
        raise DatasetError(f"the dataset's statistics: normalisation {faults[0]}; rename or compute them")
    return processors


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
    preprocessor, postprocessor = make(base, dataset_stats=dataset_stats, **extra)
    return preprocessor, postprocessor
