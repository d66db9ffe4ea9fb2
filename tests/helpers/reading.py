"""A dataset's files read without LeRobot, and whether what a policy got is what they hold."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

STATE, ACTION = "observation.state", "action"
# How LeRobot's classes normalise state and action, by their source.
MODES = {"tiny_smolvla": "mean", "pi0": "mean", "pi05": "quantiles", "pi0_fast": "mean", "xvla": "none", "act": "mean"}
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
# Grey levels by which lossy coding may change a broad stripe.
LOSS = 30
# What single precision loses of a variance, as a share of the squared mean.
ROUNDING = 5e-7


@dataclass
class Files:
    """A dataset's files.

    Attributes:
        table: Every column, in the order of the frames.
        features: As meta/info.json has them.
        tasks: Instructions by their number.
        names: Dataset's name -> policy's name.
        root: The dataset's folder.
    """

    table: pa.Table
    features: dict[str, Any]
    tasks: list[str]
    names: dict[str, str]
    root: Path
    _videos: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def vectors(self, name: str) -> np.ndarray:
        """State or action, float64 [frames, dimensions], by the policy's name."""
        rows = self.table[self.source(name)].to_pylist()
        return np.array([row if isinstance(row, list) else [row] for row in rows], np.float64)

    def source(self, name: str) -> str:
        """The dataset's name of what the policy calls so."""
        return next((old for old, new in self.names.items() if new == name), name)

    def has(self, name: str) -> bool:
        """Whether the dataset has what the policy calls so."""
        return self.source(name) in self.features

    def joints(self, name: str) -> list[str] | None:
        """Names of the dimensions."""
        names = self.features[self.source(name)]["names"]
        return names["motors"] if isinstance(names, dict) else names

    def cameras(self) -> list[str]:
        """The policy's names of the colour cameras."""
        pictures = [n for n, f in self.features.items() if f["dtype"] in ("image", "video") and f["shape"][-1] == 3]
        return [self.names.get(name, name) for name in pictures]

    def image(self, camera: str, row: int) -> np.ndarray:
        """Pixels [h, w, 3]."""
        source = self.source(camera)
        if self.features[source]["dtype"] == "image":
            return np.array(Image.open(io.BytesIO(self.table[source][row].as_py()["bytes"])).convert("RGB"))
        if source not in self._videos:
            self._videos[source] = _decode(sorted((self.root / "videos" / source).rglob("*.mp4")))
        return self._videos[source][row]

    def bounds(self, row: int) -> tuple[int, int]:
        """The first frame of a frame's episode, and the one after its last."""
        same = np.flatnonzero(self.table["episode_index"].to_numpy() == self.table["episode_index"][row].as_py())
        return int(same[0]), int(same[-1]) + 1

    def task(self, row: int) -> str:
        """A frame's instruction."""
        return self.tasks[self.table["task_index"][row].as_py()]

    def normalised(self, name: str, values: np.ndarray, mode: str) -> np.ndarray:
        """By the mean and deviation of the data itself, or by the quantiles that the dataset tells."""
        data = self.vectors(name)
        if mode == "mean":
            return (values - np.nanmean(data, 0)) / np.maximum(np.nanstd(data, 0), 1e-6)
        if mode == "quantiles":
            told = json.loads((self.root / "meta" / "stats.json").read_text())[self.source(name)]
            low, high = np.array(told["q01"]), np.array(told["q99"])
            assert (low >= np.nanmin(data, 0) - 1e-3).all(), "a quantile is below the data"
            assert (high <= np.nanmax(data, 0) + 1e-3).all(), "a quantile is above the data"
            return 2 * (values - low) / np.maximum(high - low, 1e-6) - 1
        return values


def read(root: Path, names: dict[str, str] | None = None) -> Files:
    """Read a dataset's files."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))])
    table = table.take(np.argsort(table["index"].to_numpy(), kind="stable"))
    listed = pq.read_table(root / "meta" / "tasks.parquet")
    (key,) = [name for name in listed.column_names if name != "task_index"]
    tasks = [task for _, task in sorted(zip(listed["task_index"].to_pylist(), listed[key].to_pylist(), strict=True))]
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    return Files(table, features, tasks, names or {}, root)


def names_of(options: Sequence[str]) -> dict[str, str]:
    """What --rename_map in the options of a command says."""
    found = re.search(r"--rename_map[ =](\{.*?\})", " ".join(options))
    return json.loads(found.group(1)) if found else {}


def episodes_of(options: Sequence[str]) -> set[int]:
    """What --data.episodes in the options of a command says."""
    options = list(options)
    return set(json.loads(options[options.index("--data.episodes") + 1])) if "--data.episodes" in options else set()


def _decode(paths: list[Path]) -> list[np.ndarray]:
    import av

    frames = []
    for path in paths:
        with av.open(str(path)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return frames


def batch_faults(batch: dict[str, Any], files: Files, family: str, chunk: int, printed: str = "") -> list[str]:
    """What a batch that a policy got has otherwise than the files say; nothing if all is well.

    Args:
        batch: What the policy's `forward` got.
        files: The dataset.
        family: LeRobot's type of the policy.
        chunk: Steps of its action chunks.
        printed: What the command said: what it warned of is no fault.
    """
    if "index" not in batch:
        return ["the batch has no 'index'"]
    rows, mode = [int(i) for i in batch["index"].flatten()], MODES[family]
    faults = []
    if STATE in batch and not files.has(STATE):
        faults.append("there is a state in the batch and none in the dataset")
    for name in (STATE, ACTION):
        if files.has(name) and "are not those of its data" not in printed:
            faults += _vector_faults(name, batch, files, rows, mode, chunk)
    for camera in files.cameras():
        if camera in batch and f"it gets the pixels of {camera} as they are" not in printed:
            faults += _image_faults(camera, batch[camera], files, rows, family)
    if not any(camera in batch for camera in files.cameras()):
        faults.append("no camera is in the batch")
    return faults


def _vector_faults(name: str, batch: Any, files: Files, rows: list[int], mode: str, chunk: int) -> list[str]:
    if name not in batch:
        return [f"'{name}' is not in the batch"]
    wanted = rows
    if name == ACTION:
        bounds = [files.bounds(row) for row in rows]
        steps = [[row + step for step in range(chunk)] for row in rows]
        wanted = [[min(at, end - 1) for at in ats] for ats, (_, end) in zip(steps, bounds, strict=True)]
        padded = [[at >= end for at in ats] for ats, (_, end) in zip(steps, bounds, strict=True)]
        if batch["action_is_pad"].tolist() != padded:
            return ["'action_is_pad' is not what the ends of the episodes say"]
    expected = files.normalised(name, files.vectors(name)[np.array(wanted)], mode)
    got = _one_step(batch[name], expected.ndim).double().cpu().numpy()
    if got.shape != expected.shape:
        return [f"'{name}' has shape {got.shape}, expected {expected.shape}"]
    if not np.isfinite(got).all():
        return [f"'{name}' is not finite"]
    # LeRobot's statistics of a joint that never moves are not exact.
    data = files.vectors(name)
    still = np.ptp(data, 0) < 1e-6
    if mode != "none" and (np.abs(got[..., still]) > 10).any():
        return [f"'{name}' of a joint that never moves is {np.abs(got[..., still]).max():.3g}"]
    # Nor are they of one that moves little, far from zero: they are computed in float32.
    lost = ROUNDING * (np.nanmean(data, 0) / np.maximum(np.nanstd(data, 0), 1e-6)) ** 2
    # The statistics are from before a value was damaged.
    lost = lost + 0.3 * np.isnan(data).any(0)
    off = np.abs(got - expected) / np.maximum(1, np.abs(expected)) - lost
    off = off[..., ~still].max(initial=0)
    return [] if off < 2e-3 else [f"'{name}' is off by {off:.3g}"]


def _one_step(values: torch.Tensor, axes: int) -> torch.Tensor:
    """Some policies get observations [b, steps, ...] with one step."""
    return values[:, 0] if values.ndim == axes + 1 and values.shape[1] == 1 else values


def _image_faults(camera: str, images: torch.Tensor, files: Files, rows: list[int], family: str) -> list[str]:
    allowed = 1.1 if files.features[files.source(camera)]["dtype"] == "image" else LOSS
    for row, image in zip(rows, _one_step(images, 4), strict=True):
        pixels = files.image(camera, row)
        got = image.permute(1, 2, 0).double().cpu().numpy()
        if family in ("xvla", "act"):
            got = got * IMAGENET[1] + IMAGENET[0]
        if got.shape != pixels.shape:
            return [f"'{camera}' has shape {got.shape}, expected {pixels.shape}"]
        off = np.abs(255 * got - pixels).max()
        if off > allowed:
            return [f"'{camera}' of frame {row} is off by {off:.0f} grey levels"]
    return []


def language_faults(batch: dict[str, Any], files: Files, tokenizer: Any, said_cut: bool) -> list[str]:
    """Whether instructions are whole in the tokens, or were said to be cut."""
    faults = []
    for row, ids, mask in zip(
        batch["index"].flatten().tolist(),
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        strict=True,
    ):
        kept = _plain(tokenizer.decode(ids[mask.bool()].tolist()))
        task = _plain(files.task(int(row)))
        written = files.task(int(row)).isascii() and files.task(int(row)).isprintable()
        if written and task not in kept and not said_cut:
            faults.append(f"the instruction {files.task(int(row))[-20:]!r} is cut, and nothing said so")
    return faults[:1]


def _plain(text: str) -> str:
    return "".join(text.replace("_", " ").split())


def observation(files: Files, row: int) -> dict[str, Any]:
    """What a robot would send at a frame, in the policy's names."""
    sent: dict[str, Any] = {}
    for camera in files.cameras():
        sent[camera] = torch.from_numpy(files.image(camera, row)).permute(2, 0, 1)[None].float() / 255
    if files.has(STATE):
        sent[STATE] = torch.from_numpy(files.vectors(STATE)[row]).float()[None]
    return sent | {"task": [files.task(row)]}
