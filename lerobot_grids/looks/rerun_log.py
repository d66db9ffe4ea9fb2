"""Log an episode to rerun, as `lerobot-dataset-viz` does, with the points over the cameras' images."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_grids.checkpoint import atomic_file
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.looks import rerun_points

from .drawing import OTHER, TRUE
from .episode import Episode
from .view import Seen

# In the place of a file: open rerun's viewer.
SPAWN = "spawn"
INSTALL = "pip install 'lerobot[viz]'"
# What a session with a display sets.
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def require_rerun(target: str) -> None:
    """Raise `GridsError` unless rerun is installed, and has a display where its viewer is to be opened."""
    if find_spec("rerun") is None:
        raise GridsError(f"--rerun needs rerun-sdk, which is not installed; install it with: {INSTALL}")
    # Elsewhere than on Linux there always is one.
    if target == SPAWN and sys.platform == "linux" and not any(map(os.environ.get, DISPLAYS)):
        raise GridsError(
            "--rerun spawn opens rerun's viewer, and this machine has no display; give a file, such as look.rrd, and "
            "open it with rerun on a machine that has one"
        )


class RerunLog:
    """Logs frames to a recording.

    Args:
        recording: rerun's recording stream.
    """

    def __init__(self, recording: Any) -> None:
        self.recording = recording

    def add(self, seen: Seen) -> None:
        """Log a frame: images, points in pixels of the camera, state, recorded action and the policy's."""
        import rerun as rr

        log = self.recording.log
        self.recording.set_time("frame_index", sequence=seen.number)
        self.recording.set_time("timestamp", timestamp=seen.seconds)
        for camera, image in seen.images.items():
            log(camera, rr.Image(image).compress())
        for (camera, k, told), points in seen.points.items():
            name = f"{camera}/K{k}" + ("_told_otherwise" if told else "")
            for part, drawn in rerun_points(points, seen.images[camera].shape[:2], (TRUE, OTHER)[told]).items():
                log(f"{name}/{part}", drawn)
        for name, vector in (("state", seen.state), (ACTION, seen.action), (f"policy/{ACTION}", seen.predicted)):
            if vector is not None:
                log(name, rr.Scalars(np.asarray(vector, dtype=float)))


@contextmanager
def rerun_log(target: str, episode: Episode) -> Iterator[RerunLog]:
    """Log to a file, which appears when it is complete, or to a viewer that is opened.

    Args:
        target: A file that ends with .rrd, or "spawn".
        episode: The episode that is logged.

    Raises:
        GridsError: If rerun is not installed, the target is neither, or there is no display.
    """
    require_rerun(target)
    import rerun as rr

    recording = rr.RecordingStream(f"{episode.dataset.repo_id}/episode_{episode.number}")
    with ExitStack() as stack:
        if target == SPAWN:
            recording.spawn(default_blueprint=_blueprint(episode))
        else:
            partial = stack.enter_context(atomic_file(Path(target)))
            recording.save(str(partial), default_blueprint=_blueprint(episode))
        yield RerunLog(recording)
        recording.flush()
        recording.disconnect()


def _blueprint(episode: Episode) -> Any:
    """A view for each camera, the state, the action and the policy's action."""
    import rerun.blueprint as blueprint

    features = episode.dataset.meta.features
    views = [blueprint.Spatial2DView(origin=key, name=key) for key in episode.dataset.meta.camera_keys]
    named = (("state", OBS_STATE), (ACTION, ACTION), (f"policy/{ACTION}", ACTION))
    views += [blueprint.TimeSeriesView(origin=name, name=name) for name, key in named if key in features]
    return blueprint.Blueprint(blueprint.Grid(*views))
