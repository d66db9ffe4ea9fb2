"""Show where a policy looks along an episode: a strip of frames, a film, a rerun recording, and figures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from PIL import Image
from torch import Tensor

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint import atomic_file
from lerobot_policy_grids.errors import BudgetError, DatasetError
from lerobot_policy_grids.looks import Points
from lerobot_policy_grids.reducers.anchored import AnchoredSampler

from ..console import write_json
from ..data import unit_images
from ..policies import LoadedPolicy
from .drawing import OTHER, TRUE, draw
from .episode import Episode
from .movie import movie
from .points import follows_instruction, look
from .sheets import Line, Row, sheet

STRIP_FILE, FILM_FILE, RESULT_FILE = "looks.png", "looks.mp4", "view.json"
# Longer side of a picture in pixels: on the strip, in the film.
STRIP_SIDE, FILM_SIDE = 180, 260


@dataclass
class LookResult:
    """Where a policy looked with one camera at one budget, over the frames shown.

    Attributes:
        num_tokens: K.
        camera: The camera.
        points: Points per frame; a reducer inside the trunk ranks all cameras together, so it is a mean.
        reads_cells: How far a token reads to the side, and up and down, in cells; None where tokens differ in it.
        in_padding: Share of the points in letterbox padding.
        motion_cells: How far points move from frame to frame: root of a point's variance, mean over points; None where
            points have no names.
        told_otherwise_cells: Mean distance of a point to where it is under the other instruction; None without one.
    """

    num_tokens: int
    camera: str
    points: float
    reads_cells: tuple[float, float] | None
    in_padding: float
    motion_cells: float | None = None
    told_otherwise_cells: float | None = None


@dataclass
class ViewResult:
    """What was shown.

    Attributes:
        policy: Name of the policy.
        dataset: The dataset.
        episode: Number of the episode.
        reducer: Name of the reducer.
        token_grid: Rows and columns of the token grid.
        instruction: What the policy was told: the episode's own.
        other_instruction: What it was told besides; None for nothing.
        follows_instruction: Whether the points may depend on what it is told.
        frames: Frames shown.
        fps: Frames per second of the film.
        looks: Figures of each camera at each budget.
        files: What was written.
    """

    policy: str
    dataset: str
    episode: int
    reducer: str
    token_grid: tuple[int, int]
    instruction: str
    other_instruction: str | None
    follows_instruction: bool
    frames: int
    fps: float
    looks: list[LookResult] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all figures as JSON."""
        write_json(path, asdict(self))


@dataclass(frozen=True)
class Seen:
    """One frame, and where it is read.

    Attributes:
        number: Number of the frame in the episode.
        seconds: Its time stamp.
        images: Camera -> uint8 [h, w, 3].
        points: (camera, K, told: 0 for the episode's instruction, 1 for the other) -> points.
        state: The robot's state as recorded; None where there is none.
        action: The recorded action; None where there is none.
        predicted: The policy's next action, in the dataset's units, where it was asked for.
    """

    number: int
    seconds: float
    images: dict[str, np.ndarray]
    points: dict[tuple[str, int, int], Points]
    state: np.ndarray | None = None
    action: np.ndarray | None = None
    predicted: np.ndarray | None = None


class Sink(Protocol):
    """Takes the frames one by one."""

    def add(self, seen: Seen) -> None:
        """Take a frame."""


def budgets_to_show(policy: GridsPolicy, asked: list[int] | None) -> list[int]:
    """The budgets given, or the policy's own.

    Raises:
        BudgetError: If the policy cannot serve one.
    """
    largest = int(policy.reducer.num_tokens_max)
    for k in asked or []:
        if not 1 <= k <= largest:
            raise BudgetError(f"--tokens {k}, but this policy serves 1 .. {largest} visual tokens per camera")
        policy.reducer.check_budget(k)
    return list(dict.fromkeys(asked or [policy.num_tokens]))


def watch(
    loaded: LoadedPolicy,
    episode: Episode,
    budgets: list[int],
    other: str | None = None,
    *,
    batch_size: int = 16,
    act: bool = False,
) -> Iterator[Seen]:
    """Look at the frames of an episode, one by one.

    Args:
        loaded: A grids policy and its processors.
        episode: The frames.
        budgets: Budgets, in visual tokens per camera.
        other: Another instruction.
        batch_size: Frames per call of the policy.
        act: Whether the policy's action is computed too, at its own budget: all its denoising or decoding steps.
    """
    policy = loaded.policy
    own = policy.num_tokens
    for raw in episode.batches(batch_size):
        count = len(raw["index"])
        told = [list(raw["task"]), *([[other] * count] if other is not None else [])]
        found: dict[tuple[str, int, int], list[Points]] = {}
        with policy.seam.share_vision():
            batches = [loaded.preprocessor(unit_images(raw | {"task": tasks})) for tasks in told]
            _require_finite_state(batches[0], raw)
            for k in budgets:
                policy.num_tokens = k
                for number, batch in enumerate(batches):
                    for camera, points in look(policy, batch).items():
                        found[camera, k, number] = points
        policy.num_tokens = own
        predicted = _next_actions(loaded, batches[0]) if act else None
        images = {camera: _pictures(raw, camera, loaded.renames) for camera in dict.fromkeys(key[0] for key in found)}
        for i in range(count):
            yield Seen(
                number=int(raw["frame_index"][i]),
                seconds=float(raw["timestamp"][i]),
                images={camera: pictures[i] for camera, pictures in images.items()},
                points={key: points[i] for key, points in found.items()},
                state=_vector(raw, "observation.state", i),
                action=_vector(raw, "action", i),
                predicted=None if predicted is None else predicted[i],
            )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _require_finite_state(batch: dict[str, Any], raw: dict[str, Any]) -> None:
    """Refuse a state without numbers, from which points may follow."""
    state = batch.get(OBS_STATE)
    if isinstance(state, Tensor) and not (finite := state.isfinite().flatten(1).all(1)).all():
        frame = int(raw["frame_index"][int((~finite).int().argmax())])
        raise DatasetError(
            f"'{OBS_STATE}' holds NaN or infinity in frame {frame} of this episode; repair the dataset, or show "
            "another --episode"
        )


@torch.no_grad()
def _next_actions(loaded: LoadedPolicy, batch: dict[str, Any]) -> np.ndarray:
    """The first action of each frame's chunk, [b, d], in the dataset's units."""
    torch.manual_seed(0)
    loaded.policy.reset()
    chunk = loaded.policy.predict_action_chunk(dict(batch)).float()
    loaded.policy.reset()
    actions: np.ndarray = loaded.postprocessor(chunk).float().cpu().numpy()[:, 0]
    return actions


def _pictures(raw: dict[str, Any], camera: str, renames: dict[str, str]) -> np.ndarray:
    """A camera's images, uint8 [b, h, w, 3], by the policy's name of it."""
    names = [camera, *(old for old, new in renames.items() if new == camera)]
    images: Tensor = next(raw[name] for name in names if name in raw)
    images = images[:, -1] if images.ndim == 5 else images
    if images.is_floating_point():
        images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    pictures: np.ndarray = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


def _vector(raw: dict[str, Any], name: str, frame: int) -> np.ndarray | None:
    if name not in raw:
        return None
    # The first step of a chunk of actions, the last of a history of states.
    value = raw[name][frame].float()
    steps = value.reshape(-1, value.shape[-1])
    vector: np.ndarray = steps[0 if name == "action" else -1].cpu().numpy()
    return vector


class Panels:
    """Pictures of one frame: rows of cameras and instructions, at each budget.

    Args:
        budgets: The budgets.
        told: The instructions: the episode's own, and perhaps another.
    """

    def __init__(self, budgets: list[int], told: list[str]) -> None:
        self.budgets, self.told = budgets, told

    def lines(self, title: str) -> list[Line]:
        """Text above a sheet."""
        if len(self.told) == 1:
            return [Line(title), Line(f"told: {self.told[0]}", TRUE)]
        marks = zip(("told", "if it were told"), self.told, (TRUE, OTHER), strict=True)
        return [Line(title), *(Line(f"{what}: {text}", colour) for what, text, colour in marks)]

    def picture(self, seen: Seen, camera: str, k: int, number: int, side: int) -> np.ndarray:
        """One picture."""
        points = seen.points[camera, k, number]
        return draw(seen.images[camera], points, side=side, colour=(TRUE, OTHER)[number])

    def film(self, seen: Seen, title: str) -> np.ndarray:
        """A frame of the film: budgets side by side."""
        rows = [
            Row(
                self._label(camera, number, seen),
                [self.picture(seen, camera, k, number, FILM_SIDE) for k in self.budgets],
            )
            for camera in seen.images
            for number in range(len(self.told))
        ]
        return sheet(self.lines(f"{title}, {seen.seconds:.1f} s"), [f"K = {k}" for k in self.budgets], rows)

    def strip(self, picked: list[Seen], title: str) -> np.ndarray:
        """A sheet with some frames: time goes to the right."""
        rows = []
        for camera in picked[0].images:
            for k in self.budgets:
                for number in range(len(self.told)):
                    label = ", ".join(filter(None, [f"K = {k}", self._label(camera, number, picked[0])]))
                    pictures = [self.picture(seen, camera, k, number, STRIP_SIDE) for seen in picked]
                    rows.append(Row(label, pictures))
        return sheet(self.lines(title), [f"{seen.seconds:.1f} s" for seen in picked], rows)

    def _label(self, camera: str, number: int, seen: Seen) -> str:
        name = camera.rpartition(".")[2] if len(seen.images) > 1 else ""
        return ", ".join(filter(None, [name, "other" if number else ""]))


class Figures:
    """Collects the points, and computes `LookResult`s."""

    def __init__(self, policy: GridsPolicy) -> None:
        # Only these have the same tokens in the same order in every frame.
        self.named = isinstance(policy.reducer, AnchoredSampler)
        height, width = policy.seam.layout.token_grid
        self.cells = np.array([width, height])
        self.places: dict[tuple[str, int, int], list[np.ndarray]] = {}
        self.lost: dict[tuple[str, int, int], list[np.ndarray]] = {}
        self.reads: dict[tuple[str, int, int], tuple[float, float] | None] = {}

    def add(self, seen: Seen) -> None:
        """Count a frame."""
        for key, points in seen.points.items():
            self.places.setdefault(key, []).append(points.coordinates)
            self.lost.setdefault(key, []).append(points.in_padding())
            self.reads[key] = points.reads

    def results(self) -> list[LookResult]:
        """The figures of each camera at each budget, under the episode's own instruction."""
        return [self._result(*key) for key in self.places if key[2] == 0]

    def _result(self, camera: str, k: int, told: int) -> LookResult:
        key, places = (camera, k, told), self.places[camera, k, told]
        lost, reads = np.concatenate(self.lost[key]), self.reads[key]
        result = LookResult(
            num_tokens=k,
            camera=camera,
            points=len(lost) / len(places),
            reads_cells=None if reads is None else (float(reads[0] * self.cells[0]), float(reads[1] * self.cells[1])),
            in_padding=float(lost.mean()) if len(lost) else 0.0,
        )
        if self.named:
            cells = np.stack(places) * self.cells
            result.motion_cells = float(np.sqrt(cells.var(0).sum(-1)).mean())
            if (camera, k, 1) in self.places:
                others = np.stack(self.places[camera, k, 1]) * self.cells
                result.told_otherwise_cells = float(np.linalg.norm(cells - others, axis=-1).mean())
        return result


def show(
    loaded: LoadedPolicy,
    episode: Episode,
    budgets: list[int],
    folder: Path,
    *,
    source: str,
    dataset: str,
    other: str | None = None,
    frames: int = 6,
    film: bool = True,
    sinks: Sequence[Sink] = (),
    act: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[], None] = lambda: None,
) -> ViewResult:
    """Draw where a policy looks along an episode.

    Args:
        loaded: A grids policy and its processors.
        episode: The frames.
        budgets: Budgets from `budgets_to_show`.
        folder: Output folder for looks.png, looks.mp4 and view.json.
        source: Name of the policy for titles and the result.
        dataset: Name of the dataset for the result.
        other: Another instruction, shown beside the episode's.
        frames: Frames on the strip, spread evenly.
        film: Whether to write the film.
        sinks: Take every frame, too.
        act: Whether they need the policy's actions.
        batch_size: Frames per call of the policy.
        on_progress: Called after each frame.
    """
    policy, task, total = loaded.policy, episode.task, len(episode.frames)
    panels = Panels(budgets, [task, *([other] if other is not None else [])])
    title = f"{Path(source).name}, episode {episode.number}"
    picks = set(np.linspace(0, total - 1, min(frames, total)).round().astype(int).tolist())
    figures, picked = Figures(policy), []
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / STRIP_FILE]
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        add = stack.enter_context(movie(folder / FILM_FILE, episode.fps)) if film else None
        watched = watch(loaded, episode, budgets, other, batch_size=batch_size, act=act)
        for place, seen in enumerate(watched):
            for sink in (figures, *sinks):
                sink.add(seen)
            if add is not None:
                add(panels.film(seen, title))
            if place in picks:
                picked.append(seen)
            on_progress()
        with atomic_file(folder / STRIP_FILE) as partial:
            Image.fromarray(panels.strip(picked, title)).save(partial, format="PNG", optimize=True)
    files += [folder / FILM_FILE] if film else []
    result = ViewResult(
        policy=source,
        dataset=dataset,
        episode=episode.number,
        reducer=policy.config.reducer.type,
        token_grid=policy.seam.layout.token_grid,
        instruction=task,
        other_instruction=other,
        follows_instruction=follows_instruction(policy),
        frames=total,
        fps=episode.fps,
        looks=figures.results(),
        files=[str(path) for path in files],
    )
    result.save(folder / RESULT_FILE)
    return result
