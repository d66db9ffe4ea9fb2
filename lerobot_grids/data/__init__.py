"""Demonstrations: a LeRobotDataset, split by episodes and shuffled by a seed."""

from .datamodule import LeRobotDataModule
from .images import is_image, unit_images
from .metadata import PLACES, POSITIONS, load_metadata

__all__ = ["PLACES", "POSITIONS", "LeRobotDataModule", "is_image", "load_metadata", "unit_images"]
