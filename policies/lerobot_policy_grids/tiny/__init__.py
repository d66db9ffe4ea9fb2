"""tiny_smolvla: LeRobot's SmolVLA at about a million parameters, for trying everything offline on a CPU.

Its vision-language model's configuration and tokenizer ship in `vlm/`; nothing is downloaded.
"""

from .configuration_tiny_smolvla import TinySmolVLAConfig
from .tokenizer import TINY_FOLDER, VLM_FOLDER, TinyTokenizerStep

__all__ = ["TINY_FOLDER", "VLM_FOLDER", "TinySmolVLAConfig", "TinyTokenizerStep"]
