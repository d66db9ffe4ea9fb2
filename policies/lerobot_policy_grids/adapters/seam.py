"""The seam: what an attached policy asks at each call, the same for every family."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .context import gather_context, present_cameras
from .layout import TokenLayout


class Seam:
    """Turns a policy's images into the visual tokens its trunk gets.

    Args:
        get_reducer: Gives the reducer, or None for all tokens. Asked at each call: PEFT puts a trainable copy in the
            reducer's place, and a policy may look everywhere for a while.
        layout: The policy's visual tokens.
    """

    def __init__(self, get_reducer: Callable[[], nn.Module | None], layout: TokenLayout) -> None:
        self._get_reducer = get_reducer
        self.layout = layout
        self._kept: list[Tensor] | None = None
        # Of each camera in the last call, where somebody wants to know; a list from then on.
        self.coordinates: list[Tensor] | None = None
        # By how much dense position ids grew in the last prefix, which what is denoised after it follows.
        self.moved: Tensor | float = 0.0

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
        cameras = present_cameras(self.layout.cameras, batch)
        images = images[: len(cameras)]
        reducer: Any = self._get_reducer()
        self._remember([])
        if reducer is not None and reducer.num_tokens == 0:
            self._remember([image.new_zeros(len(image), 0, 2) for image in images])
            return [image.new_zeros(len(image), 0, self.layout.width) for image in images]
        dense = self._encode(encode, images)
        if reducer is None or reducer.in_trunk:
            return list(dense.chunk(len(cameras)))
        maps = dense.unflatten(1, self.layout.token_grid)
        context = gather_context(
            reducer.condition_on,
            batch,
            embed_language=embed_language,
            state_width=self.layout.state_width,
            cameras=cameras,
        )
        counts = [reducer.tokens_of(camera) for camera in cameras]
        if len(set(counts)) == 1:
            sampled = reducer(maps, context, counts[0])
            self._remember(list(sampled.coordinates.chunk(len(cameras))))
            return list(sampled.tokens.chunk(len(cameras)))
        size = len(images[0])
        contexts = [
            {name: value[i * size : (i + 1) * size] for name, value in context.items()} for i in range(len(counts))
        ]
        each = [
            reducer(part, its_context, count)
            for part, its_context, count in zip(maps.split(size), contexts, counts, strict=True)
        ]
        self._remember([sampled.coordinates for sampled in each])
        return [sampled.tokens for sampled in each]

    def _remember(self, coordinates: list[Tensor]) -> None:
        if self.coordinates is not None:
            self.coordinates = [camera.detach() for camera in coordinates]

    @property
    def full_layers(self) -> int | None:
        """Layers of the trunk that see every token, if a reducer that sits inside the trunk was told."""
        reducer: Any = self._get_reducer()
        layers: int | None = reducer.layers
        return layers

    def prune(self, prefix: Any, cameras: int) -> Any:
        """What a reducer inside the trunk keeps of a `reducers.trunk.Prefix`; None for everything."""
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
