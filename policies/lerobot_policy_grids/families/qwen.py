"""What families on a Qwen-VL share: images are runs of placeholders in the token ids, with positions of three axes.

The pre-processor writes H x W placeholders for an image and its patches; the model fills them with the tower's features
and numbers them by their place (m-rope: time, row, column). Here `scatter` runs the tower and the reducer while the
whole batch is visible, cuts every run to k placeholders with all that goes along with the ids, and lets tokens travel
in the place of the patches and a `Placed` in the place of their grids. The model's own functions call
`get_image_features` and `get_rope_index`, which are replaced here: they know a `Placed`, and give everything else to
the originals.
- a token's position is the one of its place in the image, a fraction between two cells (m-rope goes through cosines of
  any real number), and the text behind stays where it was; this is `position_ids=dense`, the default;
- with `consecutive`, an image of k tokens is numbered as a smaller image of k cells would be.
At k = H x W both are the model's own numbers exactly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from ..errors import TokenGridError, UnsupportedPolicyError
from ..reducers.interpolation import bilinear
from .seam import Seam

# A kind of attention may name a repository on the Hub, whose code transformers runs.
ATTENTION: Mapping[str, frozenset[str | None]] = dict.fromkeys(
    ("attn_implementation", "_attn_implementation"), frozenset({None, "eager", "sdpa", "flash_attention_2"})
)
# Positions are read at whole 256ths of a cell, so that a cell's own centre is exactly that.
FRACTIONS = 256


@dataclass
class Placed:
    """Where tokens were read, in the place of `image_grid_thw`.

    Attributes:
        ids: Dense token ids [b, l].
        mask: Their attention mask, of the same shape.
        types: Which kind of token each is (`mm_token_type_ids`), of the same shape.
        grids: `image_grid_thw` of the patches, [b * cameras, 3].
        keep: Bool [b, l], the dense tokens that are left.
        is_image: Bool [b, l], the dense placeholders.
        token_grid: (H, W) of each image.
        coordinates: Of each camera float32 [b, k, 2]; none where all tokens were kept as they are.
        dense: Whether positions are those among all tokens.
        deepstack: Features that the model adds in later layers, [b * k, c] each.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    grids: Tensor
    keep: Tensor
    is_image: Tensor
    token_grid: tuple[int, int]
    coordinates: list[Tensor] | None = None
    dense: bool = True
    deepstack: list[Tensor] = field(default_factory=list)

    def cut(self, values: Tensor) -> Tensor:
        """What belongs to the tokens that are left, of values [..., b, l]."""
        return values[..., self.keep].unflatten(-1, (len(self.keep), -1))

    def number(self, positions: Tensor) -> Tensor:
        """Positions [3, b, l'] of the tokens that are left, of the dense ones [3, b, l]."""
        if self.coordinates is None:
            return positions
        height, width = self.token_grid
        cells, span, counts = height * width, max(height, width), [c.shape[1] for c in self.coordinates]
        scales = [1.0 if self.dense else math.sqrt(count / cells) for count in counts]
        moved = positions.new_tensor([0, *(span - math.ceil(span * scale) for scale in scales)]).cumsum(0)
        behind = (self.is_image.cumsum(1) - self.is_image.long()) // cells
        positions = (positions - moved[behind]).float()
        # Of the first cell of each image.
        first = positions[0][self.is_image].view(len(self.keep), -1, cells)[..., 0]
        places = []
        for camera, (coordinates, scale) in enumerate(zip(self.coordinates, scales, strict=True)):
            row, column = places_among(coordinates, self.token_grid, scale)
            places.append(torch.stack([torch.zeros_like(row), row, column]) + first[:, camera, None])
        images = self.cut(self.is_image).expand(3, -1, -1)
        return self.cut(positions).masked_scatter(images, torch.cat(places, dim=-1))


@dataclass(frozen=True)
class Names:
    """What a policy calls the inputs of its Qwen-VL.

    Attributes:
        types: Which kind of token each is.
        cut: Further inputs [b, l] that go along with the ids.
    """

    types: str = "mm_token_type_ids"
    cut: tuple[str, ...] = ()


def attach_model(core: Any) -> None:
    """From now on a Qwen-VL without its head takes what `scatter` gives, and whatever else it took before."""
    core.get_image_features = partial(_get_image_features, core)
    core.get_rope_index = partial(_get_rope_index, core)


def detach_model(core: Any) -> None:
    """Undo `attach_model`. Harmless when it was not done."""
    for name in ("get_image_features", "get_rope_index"):
        vars(core).pop(name, None)


def scatter(
    seam: Seam,
    core: Any,
    batch: Mapping[str, Any],
    inputs: dict[str, Any],
    *,
    dense: bool,
    hidden: tuple[int, ...] = (),
    names: Names = Names(),
    see: Callable[[Tensor, Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Encode and reduce the images of a prompt, and cut the prompt.

    Args:
        seam: Reduces them.
        core: The Qwen-VL without its head.
        batch: The policy's batch, of which the reducer reads the state.
        inputs: `input_ids` and `attention_mask` [b, l], `pixel_values` [patches, d] and `image_grid_thw`
            [b * cameras, 3], sample by sample, and what `names` names.
        dense: Whether tokens have their positions among all tokens.
        hidden: Token ids that are no words of the instruction.
        names: What the inputs are called.
        see: Patches and their grids to the output of the vision tower, whose `pooler_output` has each image's tokens;
            `get_image_features` of the core if None.

    Returns:
        The inputs, with tokens [b * k, c] of all cameras as `pixel_values`, and a `Placed` as `image_grid_thw`.

    Raises:
        TokenGridError: If the images have other grids than the policy's configuration says.
    """
    layout, ids, mask = seam.layout, inputs["input_ids"], inputs["attention_mask"]
    cells, cameras, grids = layout.num_dense_tokens, layout.cameras, inputs["image_grid_thw"]
    require_grid(layout, core, grids, len(ids))
    images = list(inputs["pixel_values"].unflatten(0, (len(ids), len(cameras), -1)).unbind(1))
    is_image = ids == core.config.image_token_id
    # The instruction is behind the images.
    said = mask.bool() & (is_image.cumsum(1) == is_image.sum(1, keepdim=True)) & ~is_image
    for number in hidden:
        said &= ids != number
    known = {**dict.fromkeys(cameras, ids), **batch}
    known |= {OBS_LANGUAGE_TOKENS: ids, OBS_LANGUAGE_ATTENTION_MASK: said}
    see = see or partial(type(core).get_image_features, core, return_dict=True)
    tokens = seam.tokens(images, known, partial(_encode, see, seam, grids), core.get_input_embeddings())
    deepstack = seam.take_aside()
    placed = Placed(
        ids, mask, inputs[names.types], grids, torch.ones_like(is_image), is_image, layout.token_grid, dense=dense
    )
    if seam.reducer is not None:
        limits = torch.tensor([camera.shape[1] for camera in tokens], device=ids.device)
        order = is_image.cumsum(1) - 1
        keep = ~is_image | (order % cells < limits[(order // cells).clamp(0, len(cameras) - 1)])
        placed = replace(placed, keep=keep, coordinates=seam.coordinates)
        deepstack = [_read(features, placed) for features in deepstack]
    else:
        deepstack = [_by_sample(list(features.chunk(len(cameras)))) for features in deepstack]
    placed.deepstack = deepstack
    cut = ("input_ids", "attention_mask", names.types, *names.cut)
    return {
        **inputs,
        **{name: placed.cut(inputs[name]) for name in cut},
        "pixel_values": _by_sample(tokens),
        "image_grid_thw": placed,
    }


def made_up_prompt(
    layout: Any, sizes: Any, count: int, words: int, device: torch.device, behind: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """What a pre-processor would write of images and an instruction, to measure a policy with.

    Args:
        layout: The policy's visual tokens.
        sizes: The configuration of its Qwen-VL.
        count: Prompts.
        words: Tokens of the instruction.
        device: Where the patches are. What is counted stays on the CPU if that is "meta", where nothing has a value.
        behind: Tokens behind the instruction.

    Returns:
        `input_ids`, `attention_mask` and `mm_token_type_ids` [count, l]; `pixel_values`, `image_grid_thw`.
    """
    height, width = layout.token_grid
    vision, place = sizes.vision_config, torch.device("cpu") if device.type == "meta" else device
    image = [sizes.vision_start_token_id, *[sizes.image_token_id] * (height * width), sizes.vision_end_token_id]
    ids = torch.tensor([[*image * len(layout.cameras), *[7] * words, *behind]] * count, device=place)
    merge, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    images = count * len(layout.cameras)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == sizes.image_token_id).int(),
        "pixel_values": torch.rand(images * height * width * merge**2, patch, device=device),
        "image_grid_thw": torch.tensor([[1, height * merge, width * merge]] * images, device=place),
    }


def no_training_step(policy_type: str, *args: Any, **kwargs: Any) -> Any:
    """In the place of `forward` of a policy on the meta device.

    Raises:
        UnsupportedPolicyError: Always.
    """
    raise UnsupportedPolicyError(
        f"a training step of the '{policy_type}' policy cannot be predicted: the values of its prompt decide which "
        "operations run"
    )


def image_grid(
    shapes: Mapping[str, tuple[int, int]], vision: Any, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The grid of tokens that Qwen's image processor gives every camera.

    Args:
        shapes: Height and width of each camera's images.
        vision: Configuration of the vision tower.
        min_pixels: Of the resized image, at least.
        max_pixels: At most.

    Raises:
        UnsupportedPolicyError: If cameras have different grids.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    cell = vision.patch_size * vision.spatial_merge_size
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    grids = {}
    for name, (height, width) in shapes.items():
        resized = smart_resize(height, width, cell, **{k: v for k, v in limits.items() if v is not None})
        grids[name] = (resized[0] // cell, resized[1] // cell)
    if len(set(grids.values())) != 1:
        seen = ", ".join(f"'{name}' {h} x {w}" for name, (h, w) in grids.items())
        raise UnsupportedPolicyError(
            f"cameras with different grids of tokens, {seen}; record them at one size, or leave cameras out"
        )
    return next(iter(grids.values()))


def require_grid(layout: Any, core: Any, grids: Tensor, samples: int) -> None:
    """Refuse a prompt whose images have other grids of patches than the policy's configuration says.

    Args:
        layout: The policy's visual tokens.
        core: The Qwen-VL without its head.
        grids: int64 [samples * cameras, 3].
        samples: Prompts.

    Raises:
        TokenGridError: If they have.
    """
    merge = core.config.vision_config.spatial_merge_size
    expected = [1, *(side * merge for side in layout.token_grid)]
    found = [list(grid) for grid in {tuple(grid) for grid in grids.tolist()}]
    if found != [expected] or len(grids) != samples * len(layout.cameras):
        raise TokenGridError(
            f"{samples} samples of {len(layout.cameras)} cameras have {len(grids)} images with the grids of patches "
            f"{found}, expected {expected}; send images of the size that input_features says"
        )


def places_among(coordinates: Tensor, token_grid: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Rows and columns, float32 [b, k] each, of where tokens were read, as fractions of cells.

    Args:
        coordinates: float32 [b, k, 2], (x, y) in [0, 1].
        token_grid: Rows and columns of the image.
        scale: As many times as many rows and columns are numbered.
    """
    height, width = token_grid
    column, row = (
        _to_fraction(coordinates[..., axis] * (size * scale)).clamp(0, max(size * scale - 1, 0))
        for axis, size in enumerate((width, height))
    )
    return row, column


def read_at(features: Tensor, coordinates: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Features [b, H * W, c] where tokens were read, [b, k, c]; coordinates float32 [b, k, 2]."""
    height, width = token_grid
    pixels = _to_fraction(torch.stack([coordinates[..., 0] * width, coordinates[..., 1] * height], dim=-1))
    return bilinear(features.unflatten(1, token_grid), pixels).to(features.dtype)


def _to_fraction(edges: Tensor) -> Tensor:
    """Places counted in cells from the border to places counted from the centre of the first cell, at whole 256ths."""
    return ((edges - 0.5) * FRACTIONS).round() / FRACTIONS


def _by_sample(tokens: list[Tensor]) -> Tensor:
    """[b * k, c] of all cameras' tokens [b, k, c], as their placeholders follow each other."""
    return torch.cat(tokens, dim=1).flatten(0, 1)


def _encode(see: Callable[[Tensor, Tensor], Any], seam: Seam, grids: Tensor, images: Tensor) -> Tensor:
    """Patches [cameras * b, p, d] to tokens [cameras * b, H * W, c]; features for later layers lie aside.

    The tower sees them sample by sample, as in the dense policy: in another order bfloat16 would round otherwise.
    """
    cameras = len(seam.layout.cameras)
    patches = images.unflatten(0, (cameras, -1)).transpose(0, 1).flatten(0, 2)
    output = see(patches, grids)

    def by_camera(features: Tensor) -> Tensor:
        return features.unflatten(0, (-1, cameras)).transpose(0, 1).flatten(0, 1)

    deepstack = getattr(output, "deepstack_features", None) or ()
    seam.aside = [by_camera(features.unflatten(0, (len(images), -1))) for features in deepstack]
    return by_camera(torch.stack(list(output.pooler_output)))


def _read(features: Tensor, placed: Placed) -> Tensor:
    """Features [cameras * b, H * W, c] where tokens were read, [b * k, c]."""
    cameras = features.chunk(len(placed.coordinates or []))
    pairs = zip(cameras, placed.coordinates or [], strict=True)
    return _by_sample([read_at(camera, places, placed.token_grid) for camera, places in pairs])


def _get_image_features(core: Any, pixel_values: Tensor, image_grid_thw: Any = None, **kwargs: Any) -> Any:
    if not isinstance(image_grid_thw, Placed):
        return type(core).get_image_features(core, pixel_values, image_grid_thw, **kwargs)
    return _Features((pixel_values,), image_grid_thw.deepstack)


@dataclass
class _Features:
    """As much of the output of `get_image_features` as the model reads."""

    pooler_output: tuple[Tensor, ...]
    deepstack_features: list[Tensor]


def _get_rope_index(
    core: Any,
    input_ids: Tensor,
    *args: Any,
    image_grid_thw: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    placed = image_grid_thw
    if not isinstance(placed, Placed):
        return type(core).get_rope_index(
            core, input_ids, *args, image_grid_thw=image_grid_thw, attention_mask=attention_mask, **kwargs
        )
    mask = placed.mask
    if attention_mask is not None:
        # The policy may have masked more in the meantime.
        mask = mask.masked_scatter(placed.keep, attention_mask.to(mask.dtype))
    positions, _ = type(core).get_rope_index(
        core, placed.ids, mm_token_type_ids=placed.types, image_grid_thw=placed.grids, attention_mask=mask
    )
    positions = placed.number(positions)
    left = placed.cut(mask.bool())
    longest = positions.masked_fill(~left, 0).amax((0, 2)) + 1
    return positions, (longest - left.sum(-1)).long()[:, None]
