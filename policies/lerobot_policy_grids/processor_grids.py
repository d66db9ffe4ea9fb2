"""A grids policy sees and acts through its base policy's own processors."""

from typing import Any

from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor

from .configuration_grids import GridsConfig


def make_grids_pre_post_processors(
    config: GridsConfig,
    dataset_stats: dict[str, dict[str, Tensor]] | None = None,
    dataset_meta: Any | None = None,
) -> tuple[Any, Any]:
    """Build the base policy's pre- and post-processor.

    Args:
        config: The wrapper's configuration; its features and device are passed on to the base.
        dataset_stats: Statistics for normalisation.
        dataset_meta: Dataset metadata, for base policies that ask for it.

    Returns:
        (pre-processor, post-processor).
    """
    config.share_with_base()
    return make_pre_post_processors(config.require_base(), dataset_stats=dataset_stats, dataset_meta=dataset_meta)
