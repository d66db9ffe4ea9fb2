"""tiny_smolvla: LeRobot's SmolVLA with about a million parameters, to try everything offline on a CPU.

The configuration and the tokenizer of its vision-language model are in `vlm/`; nothing is downloaded.
"""

from .configuration_tiny_smolvla import TinySmolVLAConfig
from .tokenizer import TINY_FOLDER, VLM_FOLDER, TinyTokenizerStep

__all__ = ["TINY_FOLDER", "VLM_FOLDER", "TinySmolVLAConfig", "TinyTokenizerStep"]
