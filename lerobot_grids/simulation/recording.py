"""Record demonstrations of a scripted expert as a LeRobotDataset."""

import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_policy_grids.checkpoint.atomic import atomic_folder
from lerobot_policy_grids.errors import SimulationError

from .demonstrations import Demonstration, Demonstrator

# Ctrl-C, and the request to end.
STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Recorded:
    """What a recording holds.

    Attributes:
        episodes: Number of episodes.
        frames: Number of frames.
        stopped: The exception that stopped it before all episodes were recorded, or None.
    """

    episodes: int
    frames: int
    stopped: BaseException | None = None


def demonstrations(demonstrator: Demonstrator, episodes: int, seed: int, workers: int) -> Generator[Demonstration]:
    """Yield `episodes` successful episodes of each task; a failed one is repeated with the next seed.

    The result does not depend on `workers`, because seeds are used in order.

    Raises:
        SimulationError: If the expert fails more than three times as often as it succeeds.
    """
    # spawn: a forked process would inherit an OpenGL context that it cannot use.
    # Ctrl-C reaches all processes of a terminal: workers end without a traceback, and this process says what is kept.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        for task in demonstrator.tasks:
            successes = tries = 0
            pending: deque[Future[Demonstration | None]] = deque()
            while successes < episodes:
                if tries >= 20 + 4 * episodes:
                    raise SimulationError(
                        f"the expert succeeded in {successes} of {tries} episodes of {task}; "
                        "lower --noise, or leave the task out"
                    )
                while len(pending) < min(workers + 1, episodes - successes):
                    pending.append(pool.submit(demonstrator.demonstrate, task, seed + tries + len(pending)))
                episode = pending.popleft().result()
                tries += 1
                if episode is not None:
                    successes += 1
                    yield episode
    finally:
        pool.shutdown(cancel_futures=True)


def record(
    output: str | Path,
    demonstrator: Demonstrator,
    *,
    episodes: int,
    seed: int = 5000,
    workers: int = 2,
    on_episode: Callable[[Demonstration], None] | None = None,
) -> Recorded:
    """Record demonstrations into a new LeRobotDataset (format v3.0).

    The folder appears only when it is complete. A recording that is stopped, by Ctrl-C or a request to end, keeps its
    finished episodes as a dataset; without any, it leaves nothing behind.

    Args:
        output: Folder of the new dataset.
        demonstrator: The simulator and its expert.
        episodes: Number of successful episodes of each task.
        seed: First seed; evaluations should use other seeds.
        workers: Number of processes that simulate.
        on_episode: Called with each `Demonstration`, for a progress bar.

    Raises:
        OutputExistsError: If `output` exists.
        SimulationError: If a task or a renderer is missing, or the expert keeps failing.
    """
    recorded = frames = 0
    stopped: BaseException | None = None
    datasets.disable_progress_bars()  # one per episode would overwrite the caller's bar
    output = Path(output)
    with atomic_folder(output) as folder:
        folder.rmdir()  # LeRobot must create it
        dataset = LeRobotDataset.create(
            repo_id=f"local/{output.name}",
            fps=demonstrator.fps,
            features=demonstrator.features,
            root=folder,
            robot_type=demonstrator.robot_type,
            use_videos=False,
        )
        try:
            with closing(demonstrations(demonstrator, episodes, seed, workers)) as shown:
                for episode in shown:
                    with stopping_afterwards():
                        _save(dataset, episode)
                        recorded += 1
                        frames += episode.length
                    if on_episode is not None:
                        on_episode(episode)
        except (KeyboardInterrupt, SystemExit) as stop:
            if not recorded:
                raise
            stopped = stop
        finally:
            # Needed after an interruption too: otherwise LeRobot writes the folder again after it was removed.
            with stopping_afterwards():
                dataset.finalize()
        # The images are in the parquet files now; LeRobot does not remove its temporary folders.
        shutil.rmtree(folder / "images", ignore_errors=True)
    return Recorded(recorded, frames, stopped)


def _save(dataset: LeRobotDataset, episode: Demonstration) -> None:
    for step in range(episode.length):
        frame = {name: values[step] for name, values in episode.columns.items()}
        dataset.add_frame(frame | {"task": episode.instruction})
    dataset.save_episode()


@contextmanager
def stopping_afterwards() -> Iterator[None]:
    """In this block Ctrl-C and a request to end wait for its end, so that what it writes is whole."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread gets signals.
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in STOPPING}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    for number in came[:1]:
        signal.raise_signal(number)
