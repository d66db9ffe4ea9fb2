"""The seam: what an attached policy asks at each call, the same for every family."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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


class Seam:
    """Turns a policy's images into the visual tokens its trunk gets.

    Args:
        get_reducer: Gives the reducer, or None for all tokens. Asked at each call: PEFT puts a trainable copy in the
            reducer's place, and a policy may look everywhere for a while.
        layout: The policy's visual tokens.
        image_region: Where an image of (height, width) lies in the vision tower's input.
    """

    def __init__(
        self,
        get_reducer: Callable[[], Reducer | None],
        layout: TokenLayout,
        image_region: Callable[[int, int], Region],
    ) -> None:
        self._get_reducer = get_reducer
        self.layout = layout
        self._image_region = image_region
        # Cameras whose images have not been seen yet.
        self._unseen = set(range(len(layout.cameras)))
        self._kept: list[Tensor] | None = None
        # Coordinates of each camera in the last call, once they are to be remembered.
        self.coordinates: list[Tensor] | None = None
        # Acts in place of the policy's own loop, if there is one.
        self.runtime: FastRuntime | None = None

    def tokens(
        self,
        images: list[Tensor],
        batch: Mapping[str, Any],
        encode: Callable[[Tensor], Tensor],
        embed_language: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """Encode the images of all cameras in one call and reduce them.

        Args:
            images: The policy's prepared images, each [b, 3, height, width]; those of missing cameras come last.
            batch: The policy's batch.
            encode: Images [n, 3, height, width] to dense tokens [n, H * W, c].
            embed_language: Token ids [b, l] to [b, l, c].

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
        tokens, coordinates = self.reduce(reducer, self._encode(encode, images), batch, cameras, embed_language)
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
        dense: Tensor,
        batch: Mapping[str, Any],
        cameras: list[int],
        embed_language: Callable[[Tensor], Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Reduce dense tokens, a function of tensors alone.

        Args:
            reducer: Reduces them; None keeps all.
            dense: [cameras * b, extra + H * W, c], stacked camera by camera.
            batch: The policy's batch; only what the reducer is conditioned on is read.
            cameras: Their numbers.
            embed_language: Token ids [b, l] to [b, l, c].

        Returns:
            (Tokens [b, k, c] of each camera, their coordinates [b, k, 2]; none where all tokens are kept).
        """
        if reducer is None or reducer.in_trunk:
            return list(dense.chunk(len(cameras))), []
        extra, cells = dense.split([self.layout.extra_tokens, self.layout.num_dense_tokens], dim=1)
        context = gather_context(
            reducer.condition_on,
            batch,
            embed_language=embed_language,
            state_width=self.layout.state_width,
            cameras=cameras,
        )
        tokens, coordinates = self._reduce(reducer, cells.unflatten(1, self.layout.token_grid), context, cameras)
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
        self, reducer: Any, maps: Tensor, context: dict[str, Tensor], cameras: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(Tokens, coordinates) of each camera, from maps that are stacked camera by camera."""
        counts = [reducer.tokens_of(camera) for camera in cameras]
        if len({(count, reducer.region_of(camera)) for count, camera in zip(counts, cameras, strict=True)}) == 1:
            sampled = reducer(maps, context, counts[0], cameras[0])
            return list(sampled.tokens.chunk(len(cameras))), list(sampled.coordinates.chunk(len(cameras)))
        size = len(maps) // len(cameras)
        each = []
        for place, (camera, count) in enumerate(zip(cameras, counts, strict=True)):
            part = slice(place * size, (place + 1) * size)
            own = {name: value[part] for name, value in context.items()}
            each.append(reducer(maps[part], own, count, camera))
        return [sampled.tokens for sampled in each], [sampled.coordinates for sampled in each]

    def remember_coordinates(self) -> None:
        """From now on `coordinates` holds those of the last call, of each camera."""
        self.coordinates = []

    def _remember(self, coordinates: list[Tensor]) -> None:
        if self.coordinates is not None:
            self.coordinates = [camera.detach() for camera in coordinates]

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
    def share_vision(self) -> Iterator[None]:
        """In this block the images are encoded once; later calls must bring the same ones."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def _encode(self, encode: Callable[[Tensor], Tensor], images: list[Tensor]) -> Tensor:
        if self._kept:
            return self._kept[0]
        dense = encode(torch.cat(images))
        if self._kept is not None:
            self._kept.append(dense)
        return dense


def present_cameras(cameras: Iterable[str], batch: Mapping[str, Any]) -> list[int]:
    """Numbers of the cameras in a batch, in the order in which LeRobot stacks their images."""
    return [number for number, key in enumerate(cameras) if key in batch]


def gather_context(
    condition_on: Iterable[str],
    batch: Mapping[str, Tensor],
    *,
    embed_language: Callable[[Tensor], Tensor],
    state_width: int,
    cameras: list[int],
) -> dict[str, Tensor]:
    """Build a sampler's context for the images of several cameras, stacked camera by camera.

    Args:
        condition_on: Which entries to build.
        batch: The policy's batch: token ids [b, l] with their mask, state [b, s] or [b, steps, s].
        embed_language: The policy's embedding of token ids, [b, l] to [b, l, c].
        state_width: The state is padded with zeros to this many dimensions.
        cameras: Number of each camera whose images are stacked.

    Returns:
        "language" [cameras * b, c], the mean of the instruction's tokens; "state" [cameras * b, state_width];
        "camera" int64 [cameras * b].
    """
    context: dict[str, Tensor] = {}
    tokens = batch[OBS_LANGUAGE_TOKENS]
    if "language" in condition_on:
        context["language"] = masked_mean(embed_language(tokens).float(), batch[OBS_LANGUAGE_ATTENTION_MASK])
    if "state" in condition_on:
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim > 2 else state
        context["state"] = torch.nn.functional.pad(state, (0, state_width - state.shape[-1]))
    context = {name: value.repeat(len(cameras), 1) for name, value in context.items()}
    if "camera" in condition_on:
        # Filled on the device: a list of numbers would be copied there, and waited for.
        context["camera"] = torch.cat([tokens.new_full(tokens.shape[:1], number) for number in cameras])
    return context
