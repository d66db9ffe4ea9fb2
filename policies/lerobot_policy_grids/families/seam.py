"""The seam: what an attached policy asks at each call, the same for every family."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from ..reducers import Reducer, TokenLayout
from ..reducers.anchors import Region
from ..reducers.layout import masked_mean
from ..runtime import FastRuntime

# A border of the image may be this far from where it was in training, as a share of the vision tower's input.
SAME_PLACE = 0.02


class Sampling:
    """One call of a reducer, on the maps of some cameras, which come when the vision tower has them.

    Args:
        reducer: The reducer.
        grid: Rows and columns of the maps.
        context: What it gets besides the maps.
        camera: Number of a camera whose budget and region all of these have.

    Attributes:
        coordinates: float32 [n, k, 2], after the call.
    """

    def __init__(self, reducer: Any, grid: tuple[int, int], context: dict[str, Tensor], camera: int) -> None:
        self.reducer, self.grid = reducer, grid
        self.arguments = (context, reducer.tokens_of(camera), camera)
        self.coordinates: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """The tokens of maps [n, rows * columns, c]."""
        sampled = self.reducer(states.unflatten(1, self.grid), *self.arguments)
        self.coordinates = sampled.coordinates
        tokens: Tensor = sampled.tokens
        return tokens


def _sample(maps: Tensor, sample: Sampling) -> Tensor:
    return sample(maps)


class Seam:
    """Turns a policy's images into the visual tokens its trunk gets.

    Args:
        get_reducer: Gives the reducer, or None for all tokens. Asked at each call: PEFT puts a trainable copy in the
            reducer's place, and a policy may look everywhere for a while.
        layout: The policy's visual tokens.
        image_region: Where an image of (height, width) lies in the vision tower's input.
        inside: The map that is sampled inside the vision tower, if tokens are sampled there.
    """

    def __init__(
        self,
        get_reducer: Callable[[], Reducer | None],
        layout: TokenLayout,
        image_region: Callable[[int, int], Region],
        inside: TokenLayout | None = None,
    ) -> None:
        self._get_reducer = get_reducer
        self.layout = layout
        self.inside = inside
        # Layers of the vision tower that see all patches, once it is sampled inside.
        self.after = 0
        # What the vision tower does between two of its layers in the call that is running, if anything.
        self.between: Sampling | None = None
        self._image_region = image_region
        # Cameras whose images have not been seen yet.
        self._unseen = set(range(len(layout.cameras)))
        self._kept: list[Tensor] | None = None
        self._leaves: list[Tensor] | None = None
        # What `encode` gave beside the tokens, in families whose trunk gets more than those.
        self.aside: list[Tensor] = []
        # Coordinates of each camera in the last call, once they are to be remembered; without and with gradients.
        self.coordinates: list[Tensor] | None = None
        self.moving_coordinates: list[Tensor] = []
        # Acts in place of the policy's own loop, if there is one.
        self.runtime: FastRuntime | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not part of the graph of the last training step.
        return vars(self) | {"moving_coordinates": []}

    def tokens(
        self,
        images: list[Tensor],
        batch: Mapping[str, Any],
        encode: Callable[..., Tensor],
        embed_language: Callable[[Tensor], Tensor] | None,
    ) -> list[Tensor]:
        """Encode the images of all cameras in one call and reduce them.

        Args:
            images: The policy's prepared images, each [b, 3, height, width]; those of missing cameras come last.
            batch: The policy's batch.
            encode: Images [n, 3, height, width] to dense tokens [n, H * W, c]. In families whose towers can be sampled
                inside, a second argument is what `sampling` is to be entered with around the tower, and then it gives
                [n, k, c].
            embed_language: Token ids [b, l] to [b, l, c]; None for a policy that reads no instruction.

        Returns:
            [b, k, c] for each camera in the batch. Nothing attends to the blank images of missing ones, so they cost
            no vision and no tokens.
        """
        cameras = self.cameras_of(batch)
        images = images[: len(cameras)]
        reducer: Any = self.reducer
        self._remember([])
        if reducer is not None and reducer.num_tokens == 0:
            self._remember([image.new_zeros(len(image), 0, 2) for image in images])
            return [image.new_zeros(len(image), 0, self.layout.width) for image in images]
        stack, encode = torch.cat(images), partial(self._encode, encode)
        tokens, coordinates = self.reduce(reducer, stack, batch, cameras, encode, embed_language)
        self._remember(coordinates)
        return tokens

    @property
    def reducer(self) -> Reducer | None:
        """The reducer at the moment; None for all tokens."""
        return self._get_reducer()

    @property
    def acts_in_phases(self) -> bool:
        """Whether a runtime is about to take the policy's images as they are."""
        return self.runtime is not None and self.runtime.acting

    def cameras_of(self, batch: Mapping[str, Any]) -> list[int]:
        """Numbers of the cameras in a batch, whose images lie where they did in training, or a warning says so."""
        cameras = present_cameras(self.layout.cameras, batch)
        if not self._unseen.isdisjoint(cameras):
            self._warn_of_other_shapes(batch, cameras)
        return cameras

    def budget(self, cameras: list[int]) -> tuple[int, tuple[int, ...]] | None:
        """The reducer, by its identity, and its tokens for each of these cameras; None for all tokens."""
        reducer: Any = self.reducer
        if reducer is None:
            return None
        return id(reducer), tuple(reducer.tokens_of(camera) for camera in cameras)

    def reduce(
        self,
        reducer: Any,
        images: Tensor,
        batch: Mapping[str, Any],
        cameras: list[int],
        encode: Callable[..., Tensor],
        embed_language: Callable[[Tensor], Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encode images and reduce what becomes of them, a function of tensors alone.

        Args:
            reducer: Reduces them; None keeps all.
            images: Prepared images, stacked camera by camera.
            batch: The policy's batch; only what the reducer is conditioned on is read.
            cameras: Their numbers.
            encode: As in `tokens`.
            embed_language: As in `tokens`.

        Returns:
            (Tokens [b, k, c] of each camera, their coordinates [b, k, 2]; none where all tokens are kept).
        """
        if reducer is None or reducer.in_trunk:
            return list(encode(images).chunk(len(cameras))), []
        context = gather_context(
            reducer.condition_on,
            batch,
            embed_language=embed_language,
            state_width=self.layout.state_width,
            cameras=cameras,
        )
        if self.inside is not None:
            return self._reduce(reducer, images, encode, context, cameras)
        extra, cells = encode(images).split([self.layout.extra_tokens, self.layout.num_dense_tokens], dim=1)
        tokens, coordinates = self._reduce(reducer, cells, _sample, context, cameras)
        if self.layout.extra_tokens:
            tokens = [torch.cat(pair, dim=1) for pair in zip(extra.chunk(len(cameras)), tokens, strict=True)]
        return tokens, coordinates

    def _warn_of_other_shapes(self, batch: Mapping[str, Any], cameras: list[int]) -> None:
        """Say, once for each camera, that its images lie elsewhere than those for which the points were placed."""
        for camera in self._unseen.intersection(cameras):
            name, expected = self.layout.cameras[camera], self.layout.regions[camera]
            height, width = batch[name].shape[-2:]
            borders = zip(self._image_region(height, width), expected, strict=True)
            if any(abs(now - before) > SAME_PLACE for now, before in borders):
                left, top, right, bottom = expected
                logging.getLogger(__name__).warning(
                    f"camera '{name}' sends images of {height} x {width} pixels, and the policy expects another aspect "
                    f"ratio, which fills {right - left:.2f} x {bottom - top:.2f} of what it sees; points may look at "
                    "padding, so set the camera to the size of the training data"
                )
        self._unseen.difference_update(cameras)

    def _reduce(
        self,
        reducer: Any,
        stack: Tensor,
        read: Callable[[Tensor, "Sampling"], Tensor],
        context: dict[str, Tensor],
        cameras: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(Tokens, coordinates) of each camera.

        Args:
            reducer: The reducer.
            stack: Maps or images, camera by camera.
            read: Gives the tokens of a part of the stack, by a `Sampling`.
            context: The reducer's context, stacked in the same way.
            cameras: Numbers of the cameras.
        """
        alike = len({(reducer.tokens_of(camera), reducer.region_of(camera)) for camera in cameras}) == 1
        tokens: list[Tensor] = []
        coordinates: list[Tensor] = []
        start = 0
        for group in [cameras] if alike else [[camera] for camera in cameras]:
            part = slice(start, start + len(stack) // len(cameras) * len(group))
            start = part.stop
            own = {name: value[part] for name, value in context.items()}
            sample = Sampling(reducer, (self.inside or self.layout).map_grid, own, group[0])
            tokens += read(stack[part], sample).chunk(len(group))
            coordinates += sample.coordinates.chunk(len(group))
        return tokens, coordinates

    def remember_coordinates(self) -> None:
        """From now on `coordinates` holds those of the last call, of each camera."""
        self.coordinates = []

    def _remember(self, coordinates: list[Tensor]) -> None:
        if self.coordinates is not None:
            self.coordinates = [camera.detach() for camera in coordinates]
            self.moving_coordinates = coordinates

    @property
    def full_layers(self) -> int | None:
        """Layers of the trunk that see every token, if a `TrunkReducer` was told."""
        reducer: Any = self._get_reducer()
        layers: int | None = reducer.layers
        return layers

    def prune(self, prefix: Any, cameras: int) -> Any:
        """What a `TrunkReducer` keeps of a `reducers.attention.Prefix`; None for everything."""
        reducer: Any = self._get_reducer()
        return None if reducer is None else reducer(prefix, cameras)

    @contextmanager
    def sampling(self, sample: "Sampling | None") -> Iterator[None]:
        """In this block the vision tower goes on with what `sample` makes of its states between two of its layers.

        Entered in the function that gradient checkpointing runs again, so that it samples again.
        """
        self.between = sample
        try:
            yield
        finally:
            self.between = None

    @contextmanager
    def share_vision(self) -> Iterator[None]:
        """In this block the images are encoded once; later calls must bring the same ones."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None
            self.aside = []

    @contextmanager
    def maps_as_leaves(self) -> Iterator[list[Tensor]]:
        """In this block dense maps get gradients, and what is before them none.

        Yields:
            The maps [cameras * b, H * W, c] of each call, camera by camera.
        """
        self._leaves = []
        try:
            yield self._leaves
        finally:
            self._leaves = None

    def take_aside(self) -> list[Tensor]:
        """What `encode` put into `aside`, now or when the images were encoded that are shared."""
        aside = self.aside
        self.aside = [] if self._kept is None else [part.detach() for part in aside]
        return aside

    def _encode(self, encode: Callable[..., Tensor], images: Tensor, sample: Sampling | None = None) -> Tensor:
        if sample is not None:
            return encode(images, sample)
        if self._kept:
            return self._kept[0]
        dense = encode(images)
        if self._kept is not None:
            self._kept.append(dense.detach())
        if self._leaves is not None:
            dense = dense.detach().requires_grad_()
            self._leaves.append(dense)
        return dense


def present_cameras(cameras: Iterable[str], batch: Mapping[str, Any]) -> list[int]:
    """Numbers of the cameras in a batch, in the order in which LeRobot stacks their images.

    A pre-processor that hands over patches alone leaves no image in the batch, and none is missing then.
    """
    keys = list(cameras)
    return [number for number, key in enumerate(keys) if key in batch] or list(range(len(keys)))


def gather_context(
    condition_on: Iterable[str],
    batch: Mapping[str, Tensor],
    *,
    embed_language: Callable[[Tensor], Tensor] | None,
    state_width: int,
    cameras: list[int],
) -> dict[str, Tensor]:
    """Build a sampler's context for the images of several cameras, stacked camera by camera.

    Args:
        condition_on: Which entries to build.
        batch: The policy's batch: token ids [b, l] with their mask, state [b, s] or [b, steps, s].
        embed_language: The policy's embedding of token ids, [b, l] to [b, l, c]; None if it reads no instruction.
        state_width: The state is padded with zeros to this many dimensions.
        cameras: Number of each camera whose images are stacked.

    Returns:
        "language" [cameras * b, c], the mean of the instruction's tokens; "state" [cameras * b, state_width];
        "camera" int64 [cameras * b].
    """
    context: dict[str, Tensor] = {}
    # Every policy reads at least one of them.
    tokens = batch[OBS_STATE if embed_language is None else OBS_LANGUAGE_TOKENS]
    if embed_language is not None and "language" in condition_on:
        context["language"] = masked_mean(embed_language(tokens).float(), batch[OBS_LANGUAGE_ATTENTION_MASK])
    if "state" in condition_on:
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim > 2 else state
        context["state"] = torch.nn.functional.pad(state, (0, state_width - state.shape[-1]))
    context = {name: value.repeat(len(cameras), 1) for name, value in context.items()}
    if "camera" in condition_on:
        # Filled on the device: a list of numbers would be copied there, and waited for.
        context["camera"] = torch.cat(
            [tokens.new_full(tokens.shape[:1], number, dtype=torch.int64) for number in cameras]
        )
    return context
