"""What is in a dataset, and whether its numbers are right."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from .check import Check, from_findings


class DatasetPlan:
    """A dataset, of which only the metadata is fetched."""

    def __init__(self, dataset: str, rename_map: dict[str, str]) -> None:
        self.dataset, self.rename_map = dataset, rename_map
        # What is asked of it after it could not be read is not said again.
        self.is_readable = False

    @cached_property
    def meta(self) -> Any:
        from ..data import load_metadata

        return load_metadata(self.dataset)

    @cached_property
    def features(self) -> Any:
        from ..preflight.features import read_features

        return read_features(self.meta, self.rename_map)

    def check(self) -> Iterator[Check]:
        """What it holds, and what cannot be read."""
        from lerobot_policy_grids.errors import DatasetError

        try:
            meta, features = self.meta, self.features
        except DatasetError as error:
            yield Check("fail", "Dataset", str(error))
            return
        self.is_readable = True
        widths = [f"{name} {f.shape[0]}" for name, f in (("state", features.state), ("action", features.action)) if f]
        seen = f"{meta.total_episodes} episodes, {meta.total_frames} frames at {meta.fps} per second"
        cameras = ", ".join(f"{name} {f.shape[2]} x {f.shape[1]}" for name, f in features.cameras.items())
        yield Check("ok", "Dataset", f"{seen}; {', '.join(widths)}; cameras {cameras or 'none'}")

    def check_numbers(self) -> Iterator[Check]:
        """Whether its numbers are finite and in order, where its data files are here."""
        if not self.is_readable:
            return
        from ..preflight.values import check_values, data_files

        if not data_files(self.meta):
            yield Check("ok", "Numbers", "the dataset's frames are not here; fit looks at each number before it trains")
            return
        # As `fit` does unless it is told otherwise.
        findings = check_values(self.meta, self.features, range(self.meta.total_episodes), 1e-4)
        yield from from_findings("Numbers", findings, "finite, in order, and as the statistics say")
