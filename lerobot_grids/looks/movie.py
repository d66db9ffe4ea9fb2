"""Write films frame by frame, so that a long episode needs no more memory than a short one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from lerobot_policy_grids.checkpoint import atomic_file


@contextmanager
def movie(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4 file (H.264), all of it or nothing.

    Args:
        path: The file.
        fps: Frames per second.

    Yields:
        A function that adds a frame, uint8 [h, w, 3] with even sides; all frames have the size of the first.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, av.open(str(partial), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        # Small marks stay sharp.
        stream.options = {"crf": "18"}

        def add(frame: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield add
        container.mux(stream.encode(None))
