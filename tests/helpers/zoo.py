"""Small datasets of every kind that people record, made by code, each with what is expected of it.

Every number and every image differs from frame to frame and from joint to joint, so that a wrong order shows.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reading import STATE, names_of

TRAINS = "trains"
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (48, 64)
# SVT-AV1 takes no smaller pictures.
VIDEO_SIZE = (64, 96)
BOTH_NAMES = '{"image": "observation.images.top", "wrist_image": "observation.images.wrist"}'
STATE_NAME = '{"observation.qpos": "observation.state"}'
LONG = "carefully take the small red block from the left side of the table and put it into the "
QUANTILES = ("q01", "q10", "q50", "q90", "q99")


@dataclass(frozen=True)
class Recording:
    """What is recorded.

    Attributes:
        fps: Frames per second.
        cameras: Name -> (height, width).
        image_names: Names of an image's axes.
        video: Video codec; None for PNG.
        state: Dimensions of the state; 0 for none.
        action: Dimensions of the action; 0 for none.
        state_name: What the state is called.
        grouped: Whether the names of the joints are {"motors": [...]}; None for no names.
        joints: Prefix of the names of the joints.
        lengths: Frames of each episode.
        tasks: Instructions, used in turn.
        depth: Whether there is a depth camera, too.
        extra: Further columns: name -> (feature, value of every frame).
        still: Joints that never move.
        still_at: Where they are.
        offset: Added to every joint.
        seed: Of the numbers.
    """

    fps: int = 10
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {TOP: SIZE})
    image_names: tuple[str, ...] | None = ("height", "width", "channels")
    video: str | None = None
    state: int = 4
    action: int = 4
    state_name: str = "observation.state"
    grouped: bool | None = False
    joints: str = "joint"
    lengths: tuple[int, ...] = (9, 12, 10)
    tasks: tuple[str, ...] = ("push the cube",)
    depth: bool = False
    extra: Mapping[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    still: tuple[int, ...] = ()
    still_at: float = 0.1
    offset: float = 0
    seed: int = 0

    def features(self) -> dict[str, Any]:
        """LeRobot's features."""
        found: dict[str, Any] = {}
        for name, size in ((self.state_name, self.state), ("action", self.action)):
            if size:
                found[name] = {"dtype": "float32", "shape": (size,), "names": self._names(size)}
        names = None if self.image_names is None else list(self.image_names)
        for name, size in self.cameras.items():
            found[name] = {"dtype": "video" if self.video else "image", "shape": (*size, 3), "names": names}
        if self.depth:
            info = {"is_depth_map": True}
            found["observation.images.depth"] = {"dtype": "image", "shape": (*SIZE, 1), "names": names, "info": info}
        return found | {name: feature for name, (feature, _) in self.extra.items()}

    def _names(self, size: int) -> Any:
        listed = [f"{self.joints}_{i}" for i in range(size)]
        return None if self.grouped is None else {"motors": listed} if self.grouped else listed


def record(root: Path, recording: Recording) -> Path:
    """Write a recording and return its folder."""
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    datasets.disable_progress_bars()
    encoder = RGBEncoderConfig(vcodec=recording.video) if recording.video else None
    dataset = LeRobotDataset.create(
        f"local/{root.name}",
        fps=recording.fps,
        features=recording.features(),
        root=root,
        use_videos=recording.video is not None,
        rgb_encoder=encoder,
        video_backend="pyav",
    )
    random = np.random.default_rng(recording.seed)
    number = 0
    for episode, length in enumerate(recording.lengths):
        for _ in range(length):
            frame = {"task": recording.tasks[episode % len(recording.tasks)]}
            dataset.add_frame(frame | _frame(recording, random, number))
            number += 1
        dataset.save_episode()
    dataset.finalize()
    return root


def _frame(recording: Recording, random: Any, number: int) -> dict[str, Any]:
    frame: dict[str, Any] = {name: value for name, (_, value) in recording.extra.items()}
    for name, size, offset in ((recording.state_name, recording.state, 50), ("action", recording.action, -3)):
        if size:
            # Each joint has its own mean and its own spread.
            values = recording.offset + offset + 10 * np.arange(size) + (1 + np.arange(size)) * random.normal(size=size)
            values[[joint for joint in recording.still if joint < size]] = recording.still_at
            frame[name] = values.astype(np.float32)
    for place, (name, (height, width)) in enumerate(recording.cameras.items()):
        frame[name] = picture(height, width, number, place)
    if recording.depth:
        frame["observation.images.depth"] = random.integers(100, 900, (*SIZE, 1)).astype(np.uint16)
    return frame


def picture(height: int, width: int, number: int, camera: int) -> np.ndarray:
    """Broad stripes whose colours say which frame of which camera it is, even after lossy coding."""
    pixels = np.zeros((height, width, 3), np.uint8)
    bits = [(number >> bit) & 1 for bit in range(8)]
    for bit, part in enumerate(np.array_split(np.arange(height), 8)):
        pixels[part] = 200 if bits[bit] else 40
    pixels[:, : width // 4] = (60 * (camera + 1), 20, 120)
    return pixels


# What is changed in a recording afterwards.


def _parquet(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in sorted((root / "data").rglob("*.parquet")):
        pq.write_table(change(pq.read_table(path)), path)


def _json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def without_quantiles(root: Path) -> None:
    def drop(stats: Any) -> Any:
        return {name: {k: v for k, v in kinds.items() if k not in QUANTILES} for name, kinds in stats.items()}

    _json(root / "meta" / "stats.json", drop)


def old_version(root: Path) -> None:
    _json(root / "meta" / "info.json", lambda info: info | {"codebase_version": "v2.1"})


def shift_time(root: Path, seconds: float = 0.002) -> None:
    def shift(table: pa.Table) -> pa.Table:
        at = table.column_names.index("timestamp")
        moved = pc.add(table["timestamp"], pa.scalar(seconds, pa.float32()))
        return table.set_column(at, table.schema.field(at), moved)

    _parquet(root, shift)


def put_nan(root: Path, column: str = "observation.state", frame: int = 5) -> None:
    def put(table: pa.Table) -> pa.Table:
        at, rows = table.column_names.index(column), table[column].to_pylist()
        rows[frame][1] = float("nan")
        return table.set_column(at, table.schema.field(at), pa.array(rows, table.schema.field(at).type))

    _parquet(root, put)


def damage(root: Path) -> None:
    path = next((root / "data").rglob("*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_frames(root: Path, frames: int = 4) -> None:
    _parquet(root, lambda table: table.slice(0, len(table) - frames))


def swap_frames(root: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        order = list(range(len(table)))
        order[2], order[7] = order[7], order[2]
        return table.take(order)

    _parquet(root, swap)


def ragged_vectors(root: Path) -> None:
    def shorten(table: pa.Table) -> pa.Table:
        at, rows = table.column_names.index("action"), table["action"].to_pylist()
        rows[3] = rows[3][:2]
        return table.set_column(at, pa.field("action", pa.list_(pa.float32())), pa.array(rows, pa.list_(pa.float32())))

    _parquet(root, shorten)


def annotate(root: Path) -> None:
    """Add the columns of lerobot-annotate, with lists of different lengths."""
    from lerobot.datasets.language import language_feature_info

    described = {name: info | {"shape": [1]} for name, info in language_feature_info().items()}
    _json(root / "meta" / "info.json", lambda info: info | {"features": info["features"] | described})
    row = {"role": "assistant", "content": "grasp", "style": "subtask", "camera": None, "tool_calls": None}

    def add(table: pa.Table) -> pa.Table:
        episodes, frames = table["episode_index"].to_pylist(), table["frame_index"].to_pylist()
        persistent = pa.array([[row | {"timestamp": 0.0}] * (1 + episode) for episode in episodes])
        events = pa.array([[row] if frame == 3 else [] for frame in frames])
        return table.append_column("language_persistent", persistent).append_column("language_events", events)

    _parquet(root, add)


def foreign_statistics(root: Path) -> None:
    """Statistics of another dataset, as after a merge that forgot to compute them again."""

    def move(stats: Any) -> Any:
        state = stats["observation.state"]
        state["mean"] = [value + 500 for value in state["mean"]]
        return stats

    _json(root / "meta" / "stats.json", move)


def without_statistics(root: Path) -> None:
    (root / "meta" / "stats.json").unlink()


@dataclass(frozen=True)
class Case:
    """A dataset, and what is expected of it.

    Attributes:
        recording: What is recorded.
        change: What is changed afterwards.
        fit: What `lerobot-grids fit` does: "trains", or a pattern in its line of refusal.
        options: Options of `fit`.
        train: Options of lerobot-train that mean the same.
        families: Family -> what `fit` does there, where that differs.
        said: A pattern in what `fit` prints although it trains.
        silent: Families of which it does not.
        upstream: What lerobot-train does wrong there, where nothing of this project can see it.
    """

    recording: Recording
    change: Callable[[Path], None] | None = None
    fit: str = TRAINS
    options: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    families: Mapping[str, str] = field(default_factory=dict)
    said: str = ""
    silent: tuple[str, ...] = ()
    upstream: str = ""

    def make(self, root: Path) -> Path:
        """Write the dataset."""
        record(root, self.recording)
        if self.change is not None:
            self.change(root)
        return root

    @property
    def cameras(self) -> list[str]:
        """The policy's names of the colour cameras; one where there are none."""
        names = names_of(self.options)
        cameras = [names.get(name, name) for name in self.recording.cameras]
        return [name for name in cameras if name.startswith("observation.")] or [TOP]

    @property
    def has_state(self) -> bool:
        """Whether the policy gets a state."""
        name = self.recording.state_name
        return bool(self.recording.state) and names_of(self.options).get(name, name) == STATE

    def expected(self, family: str) -> str:
        """What `fit` does with a family."""
        return self.families.get(family, self.fit)

    def said_of(self, family: str) -> str:
        """A pattern in what `fit` prints of a family."""
        return "" if family in self.silent else self.said


def _renamed(names: str) -> dict[str, Any]:
    return {"options": ("--rename_map", names), "train": (f"--rename_map={names}",)}


def _cameras(*names: str, size: tuple[int, int] = SIZE, **more: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, size) | {f"observation.images.{name}": other for name, other in more.items()}


VECTOR = {"dtype": "float32", "shape": (3,), "names": None}
TEXT = {"dtype": "string", "shape": (1,), "names": None}
TOO_WIDE = r"has 40 dimensions, and .* takes at most 32 .*choose another policy"
NO_STATE = r"reads 'observation.state', which the dataset lacks"
VIDEO = partial(Recording, cameras={TOP: VIDEO_SIZE}, lengths=(5, 6))
QUANTILE_ADVICE = r"has no 'q01' of 'observation.state'.*augment_dataset_quantile_stats"
ONE_SIZE = r"cameras of different sizes .*bring the cameras of the dataset to one size"
DRIFT = "are not those of its data"
DATASETS: dict[str, Case] = {
    "png at 10 fps": Case(Recording()),
    "png at 30 fps": Case(Recording(fps=30)),
    "png at 50 fps": Case(Recording(fps=50)),
    "av1 video": Case(VIDEO(video="libsvtav1", fps=30)),
    "h264 video": Case(VIDEO(video="h264")),
    "portrait": Case(Recording(cameras=_cameras(TOP, size=(80, 48)))),
    "two cameras": Case(Recording(cameras=_cameras(TOP, WRIST))),
    "three cameras of mixed sizes": Case(
        Recording(cameras=_cameras(TOP, wrist=(80, 48), side=(64, 64))), families={"act": ONE_SIZE}
    ),
    "four cameras": Case(Recording(cameras=_cameras(*(f"observation.images.{i}" for i in range(4))))),
    "camera called observation.image": Case(
        Recording(cameras=_cameras("observation.image")), upstream="normalises no such camera for X-VLA"
    ),
    "image names null": Case(Recording(image_names=None)),
    "image names rgb": Case(Recording(image_names=("height", "width", "rgb"))),
    "joint names null": Case(Recording(grouped=None)),
    "joint names grouped": Case(Recording(grouped=True)),
    "7 joints": Case(Recording(state=7, action=7)),
    "14 joints": Case(Recording(state=14, action=14)),
    "32 joints": Case(Recording(state=32, action=32)),
    "40 joints": Case(Recording(state=40, action=40), fit=TOO_WIDE, families={"act": TRAINS}),
    "state wider than action": Case(Recording(state=14, action=7)),
    "action wider than state": Case(Recording(state=6, action=7)),
    "one joint": Case(Recording(state=1, action=1)),
    "no state": Case(Recording(state=0), fit=NO_STATE, families={"xvla": TRAINS}),
    "no camera": Case(Recording(cameras={}), fit="no colour camera"),
    "no action": Case(Recording(action=0), fit="no 'action' to learn"),
    "episodes of 1 to 3 frames": Case(Recording(lengths=(1, 2, 3, 1, 2)), said="shorter than the action chunk"),
    "one episode": Case(Recording(lengths=(12,))),
    "one frame": Case(Recording(lengths=(1,))),
    "empty task": Case(Recording(tasks=("",))),
    "very long task": Case(Recording(tasks=(LONG * 8 + "bin",)), said="the end is cut", silent=("act",)),
    "long tasks alike at the start": Case(
        Recording(tasks=(LONG * 4 + "left bin", LONG * 4 + "right bin")),
        fit="cannot tell apart",
        families={"act": TRAINS},
    ),
    "non-ASCII task": Case(Recording(tasks=("把红色方块放进碗里", "pousse le cube à côté"))),
    "task with newlines": Case(Recording(tasks=("push the cube\nthen stop\n",))),
    "several tasks": Case(Recording(tasks=("push the cube", "open the drawer", "press the button"))),
    "no quantiles": Case(Recording(), without_quantiles, families={"pi05": QUANTILE_ADVICE}),
    "no statistics": Case(Recording(), without_statistics, fit="statistics", families={"xvla": TRAINS}),
    "statistics of other data": Case(
        Recording(), foreign_statistics, said=DRIFT, upstream="normalises by the statistics that the dataset tells"
    ),
    "still joint": Case(Recording(still=(2,))),
    "still joint far from zero": Case(Recording(still=(2,), still_at=1234.5)),
    "narrow joints far from zero": Case(
        Recording(offset=5000), said=DRIFT, upstream="computes statistics in float32, where little is left of them"
    ),
    "extra columns": Case(
        Recording(
            extra={
                "note": (TEXT, "fine"),
                "observation.force": (VECTOR, np.ones(3, np.float32)),
                "quality": ({"dtype": "int64", "shape": (1,), "names": None}, np.array([3])),
            }
        ),
        said="observation.force",
    ),
    "language annotations": Case(Recording(), annotate),
    "depth beside colour": Case(Recording(depth=True), said="depth"),
    "codebase v2.1": Case(Recording(), old_version, fit="convert_dataset_v21_to_v30"),
    "foreign camera names": Case(Recording(cameras=_cameras("image", "wrist_image")), fit="give --rename_map"),
    "foreign camera names, renamed": Case(Recording(cameras=_cameras("image", "wrist_image")), **_renamed(BOTH_NAMES)),
    "a name given on": Case(
        Recording(cameras=_cameras(TOP, "image")),
        fit="gives 'image' the name 'observation.images.top', and that name to another",
        upstream="drops a camera whose name does not begin with observation., and goes without",
        **_renamed('{"image": "observation.images.top", "observation.images.top": "observation.images.side"}'),
    ),
    "two names exchanged": Case(
        Recording(cameras=_cameras(TOP, wrist=(80, 48))),
        families={"act": ONE_SIZE},
        **_renamed(
            '{"observation.images.top": "observation.images.wrist", "observation.images.wrist": '
            '"observation.images.top"}'
        ),
    ),
    "foreign state name": Case(
        Recording(state_name="observation.qpos"), fit=NO_STATE, families={"xvla": TRAINS}, said="observation.qpos"
    ),
    "foreign state name, renamed": Case(Recording(state_name="observation.qpos"), **_renamed(STATE_NAME)),
    "NaN in a state": Case(Recording(), put_nan, fit="holds NaN or infinity in 1 frames, first in frame 5"),
    "NaN in an action": Case(Recording(), partial(put_nan, column="action"), fit="'action' holds NaN"),
    "video, time off": Case(VIDEO(video="h264"), shift_time, fit=r"2\.0 ms off the video's.*--data.tolerance_s"),
    "video, time off, tolerated": Case(
        VIDEO(video="h264"), shift_time, options=("--data.tolerance_s", "0.01"), train=("--tolerance_s=0.01",)
    ),
    "damaged parquet": Case(Recording(), damage, fit="data files cannot be read.*fetch the dataset again"),
    "fewer frames than told": Case(Recording(), cut_frames, fit="hold 27 frames, its metadata says 31"),
    "frames in another order": Case(
        Recording(), swap_frames, fit="'index' is not what", upstream="takes a frame by its row"
    ),
    "an action that is too short": Case(Recording(), ragged_vectors, fit="does not have 4 values in every frame"),
}
