"""Demonstrations: a LeRobotDataset, split by episodes and shuffled by a seed."""

from .datamodule import POSITIONS, LeRobotDataModule, load_metadata
from .images import is_image, unit_images

__all__ = ["POSITIONS", "LeRobotDataModule", "is_image", "load_metadata", "unit_images"]
