"""The processors of tiny_smolvla: those of SmolVLA with this package's tokenizer."""

from dataclasses import replace
from typing import Any

from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import TokenizerProcessorStep
from torch import Tensor

from .configuration_tiny_smolvla import TinySmolVLAConfig
from .tokenizer import VLM_FOLDER, TinyTokenizerStep


def make_tiny_smolvla_pre_post_processors(
    config: TinySmolVLAConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[Any, Any]:
    """Build SmolVLA's processors with this package's tokenizer.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics of the dataset, for normalisation.

    Returns:
        (pre-processor, post-processor).
    """
    local = replace(config, vlm_model_name=str(VLM_FOLDER))
    preprocessor, postprocessor = make_smolvla_pre_post_processors(local, dataset_stats)
    tokenizer = TinyTokenizerStep(max_length=config.tokenizer_max_length, padding=config.pad_language_to)
    preprocessor.steps = [
        tokenizer if isinstance(step, TokenizerProcessorStep) else step for step in preprocessor.steps
    ]
    return preprocessor, postprocessor
