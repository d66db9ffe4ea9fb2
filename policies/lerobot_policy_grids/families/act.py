"""ACT: ResNet -> 1x1 convolution -> [latent, state, H x W cells of each camera] -> encoder -> decoder -> actions.

Modification, from outside, of `lerobot/policies/act`: `ACT.forward` first runs the ResNet and the convolution, once for
all cameras, and the reducer. LeRobot's own `forward` then runs on `_Reduced`, which stands for the model and answers
with what was read: `backbone` and `encoder_img_feat_input_proj` pass the tokens through, `encoder` and `decoder` get
the position of each token of each sample, where LeRobot has one for the whole batch.

A token has what lies between the sinusoidal positions of the cells around it. That is the default, "dense"; with
"consecutive" positions the tokens have those of the first cells. Positions give the coordinates no gradient.

A fast runtime acts in two phases (`ACT.phases`): a prefill up to the keys and values that the decoder reads, and the
decoder as the only step. Until it first reads them the decoder is the same for all observations: computed once.

LeRobot keeps the size of images, so the grid is that of the images in `input_features`: 15 x 20 for 480 x 640 pixels.
All cameras need one size. A cell of a ResNet sees a wide field, whose middle lies half a cell up and left of its own.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..errors import CheckpointError, TokenGridError, UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..reducers.interpolation import bilinear
from ..runtime import FastRuntime, Phases, UnavailableError
from ..runtime.convolutions import without_norms
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .seam import Seam

# Positions are read at whole 256ths of a cell, so that a cell's own centre is exactly that.
FRACTIONS = 256


class ACT(Family):
    """Action Chunking with Transformers (Zhao et al. 2023, arXiv 2304.13705)."""

    # Images are seen at the size at which they come.
    resolution_field = None
    extra = None
    position_ids = "dense"
    spares_cameras = False
    counted_on_meta = True
    # It denoises nothing.
    exports = False
    # Not repositories, but functions of torchvision that LeRobot calls.
    repositories: ClassVar = {"vision_backbone": frozenset(f"resnet{layers}" for layers in (18, 34, 50, 101, 152))}

    def layout(self, policy: DensePolicy) -> TokenLayout:
        config = policy.config
        sizes = {image_size(feature.shape) for feature in config.image_features.values()}
        if len(sizes) != 1:
            shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise UnsupportedPolicyError(
                f"cameras of different sizes ({shown} pixels), and ACT sees each at its own size; a reducer needs one "
                "token grid, so bring the cameras of the dataset to one size, or train with --tokens dense"
            )
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=_grid(policy.model.backbone, *sizes.pop()),
            width=config.dim_model,
            cameras=tuple(cameras),
            language_width=0,
            state_width=config.robot_state_feature.shape[0],
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("forward" in vars(policy.model))
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy.model.forward = partial(_forward, policy.model, seam, False)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        seam.remember_coordinates()
        policy.model.forward = partial(_forward, policy.model, seam, True)

    def detach(self, policy: Any) -> None:
        vars(policy.model).pop("forward", None)

    def feature_source(self, policy: Any) -> nn.Module:
        projection: nn.Module = policy.model.encoder_img_feat_input_proj
        return projection

    def change_features(self, policy: DensePolicy, features: Any, change: Any) -> Any:
        return change(features.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(features.shape)

    def image_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        return WHOLE

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        seam.runtime = runtime

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        model = policy.model
        _, _, dense_positions = model.forward.args
        unused = tuple(module for name, module in model.named_children() if name.startswith("vae_encoder"))
        return Phases(_Prefill(model, seam, cameras, dense_positions), _Decode(model), unused)

    def target(self, policy: DensePolicy) -> Target:
        # When it acts, and in a teacher, the latent is zero; so it is in a student, which otherwise reads the actions.
        return Target(policy.model.action_head, chunk_distance, noise=(policy.model.encoder_latent_input_proj, (0,)))

    def stages(self, policy: DensePolicy) -> Stages:
        return Stages(policy.model.backbone, policy.model.encoder_img_feat_input_proj, None, "encoder.forward")

    def prefix_length(self, prefix: Any) -> int:
        return len(prefix)

    def build(self, config: Any, *, fresh: bool = False, **kwargs: Any) -> Any:
        try:
            return super().build(config, fresh=fresh, **kwargs)
        except OSError as error:
            raise CheckpointError(
                f"the weights '{config.pretrained_backbone_weights}' of ACT's {config.vision_backbone} cannot be "
                f"downloaded ({error}); connect this machine to the network, or start without them: "
                "--base.pretrained_backbone_weights null (lerobot-train: "
                "--policy.base.pretrained_backbone_weights=null)"
            ) from error

    def without_download(self, config: Any) -> None:
        config.pretrained_backbone_weights = None

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        from lerobot.policies.act.configuration_act import ACTConfig

        # Cameras of robots are wider than high.
        wide = PolicyFeature(FeatureType.VISUAL, (3, size, size * 4 // 3))
        inputs = {name: wide if feature.type is FeatureType.VISUAL else feature for name, feature in inputs.items()}
        return ACTConfig(device="cpu", input_features=inputs, output_features=outputs)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.act.configuration_act import ACTConfig
        from lerobot.policies.act.modeling_act import ACTPolicy

        fields: dict[str, Any] = {
            "pretrained_backbone_weights": None,
            "chunk_size": 8,
            "n_action_steps": 8,
            "dim_model": 32,
            "n_heads": 2,
            "dim_feedforward": 64,
            "n_encoder_layers": 2,
            "n_vae_encoder_layers": 1,
            "latent_dim": 4,
            "dropout": 0.0,
        }
        with small_backbone():
            return ACTPolicy(
                ACTConfig(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
            )


FAMILIES = (
    ACT(
        "act",
        # LeRobot has no checkpoint of it to start from; only its ResNet is trained already.
        sources={"act": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=100_000, batch=8, micro_batch=8, lr=1e-5, warmup=0.005),
        image_size=480,
        language_tokens=0,
    ),
)


def chunk_distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean absolute distance of action chunks at steps within the episode, as ACT's own loss measures.

    Args:
        student: Actions [b, chunk_size, action_dim].
        teacher: The same shape.
        batch: Holds perhaps `action_is_pad` [b, chunk_size].
    """
    error = (student.float() - teacher.float()).abs().mean(-1)
    pad = batch.get("action_is_pad")
    inside = torch.ones_like(error) if pad is None else (~pad).to(error.dtype)
    return (error * inside).sum() / inside.sum().clamp_min(1)


# The seam.


def _grid(backbone: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the map that a backbone makes of an image of this size in pixels."""
    weights = {name: torch.empty_like(value, device="meta") for name, value in backbone.state_dict().items()}
    image = torch.empty(1, 3, height, width, device="meta", dtype=next(iter(weights.values())).dtype)
    rows, columns = torch.func.functional_call(backbone, weights, (image,))["feature_map"].shape[-2:]
    return rows, columns


def _forward(model: Any, seam: Seam, dense_positions: bool, batch: dict[str, Any]) -> Any:
    """In place of `ACT.forward`, whose last argument and results these are."""
    eager = partial(_forward_eagerly, model, seam, dense_positions, batch)
    if seam.runtime is None or not seam.acts_in_phases:
        return eager()
    images, state = batch[OBS_IMAGES], batch[OBS_STATE]
    environment = batch[OBS_ENV_STATE] if model.config.env_state_feature else state.new_zeros(len(state), 0)
    # It starts from no noise.
    nothing = state.new_zeros(len(state), model.config.chunk_size, model.config.action_feature.shape[0])
    chunk = seam.runtime.chunk(
        Seen(torch.cat(images), state, environment),
        nothing,
        cameras=seam.cameras_of(batch),
        steps=1,
        eager=lambda: eager()[0],
        loop=_decode_once,
    )
    return chunk, (None, None)


def _forward_eagerly(model: Any, seam: Seam, dense_positions: bool, batch: dict[str, Any]) -> Any:
    tokens = seam.tokens(batch[OBS_IMAGES], batch, partial(_encode, model, seam), None)
    # Nothing where every token was kept.
    coordinates = (seam.coordinates or None) if dense_positions else None
    positions = _positions(_dense_positions(model, seam.layout.token_grid, tokens[0]), tokens, coordinates)
    cells = [camera.transpose(1, 2)[..., None] for camera in tokens]
    return type(model).forward(_Reduced(model, positions), {**batch, OBS_IMAGES: cells})


def _encode(model: Any, seam: Seam, images: Tensor) -> Tensor:
    """Tokens [n, h * w, c] of images [n, 3, height, width]."""
    cells = model.encoder_img_feat_input_proj(model.backbone(images)["feature_map"])
    if tuple(cells.shape[-2:]) != seam.layout.token_grid:
        rows, columns = cells.shape[-2:]
        raise TokenGridError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels give {rows} x {columns} tokens, and the policy "
            f"has {' x '.join(map(str, seam.layout.token_grid))}; set the cameras to the size of the training data"
        )
    tokens: Tensor = cells.flatten(2).transpose(1, 2)
    return tokens


def _dense_positions(model: Any, token_grid: tuple[int, int], like: Tensor) -> Tensor:
    """Positions float32 [1, c, H, W] of all cells, on the device of a tensor."""
    # The embedding reads of its input only the size and the device.
    dense: Tensor = model.encoder_cam_feat_pos_embed(like.new_zeros(1, 1, *token_grid, dtype=torch.float32))
    return dense


def _positions(dense: Tensor, tokens: list[Tensor], coordinates: list[Tensor] | None) -> Tensor:
    """Positions float32 [tokens of all cameras, 1 or b, c] of a batch's visual tokens.

    Args:
        dense: Those of all cells, [1, c, H, W].
        tokens: [b, k, c] of each camera.
        coordinates: Where they were read, float32 [b, k, 2] of each camera; None for the places of the first cells.
    """
    height, width = dense.shape[-2:]
    if coordinates is None:
        return torch.cat([dense.flatten(2).permute(2, 0, 1)[: camera.shape[1]] for camera in tokens])
    table = dense.permute(0, 2, 3, 1)
    cells = [torch.stack([places[..., 0] * width, places[..., 1] * height], dim=-1) - 0.5 for places in coordinates]
    rows = [bilinear(table.expand(len(tokens[0]), -1, -1, -1), (at * FRACTIONS).round() / FRACTIONS) for at in cells]
    return torch.cat(rows, dim=1).transpose(0, 1)


@dataclass
class _Reduced:
    """The model, as its own `forward` sees it, once the tokens of the images are there.

    Attributes:
        model: LeRobot's.
        positions: Of the visual tokens of all cameras, float32 [n, 1 or b, c].
    """

    model: Any
    positions: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def backbone(self, cells: Tensor) -> dict[str, Tensor]:
        return {"feature_map": cells}

    def encoder_img_feat_input_proj(self, cells: Tensor) -> Tensor:
        return cells

    def encoder_cam_feat_pos_embed(self, cells: Tensor) -> Tensor:
        """In the place of each visual token, which `_join` fills."""
        return torch.zeros_like(cells[:1])

    def encoder(self, tokens: Tensor, pos_embed: Tensor) -> Any:
        return self.model.encoder(tokens, pos_embed=self._join(pos_embed))

    def decoder(self, *args: Any, encoder_pos_embed: Tensor, **kwargs: Any) -> Any:
        return self.model.decoder(*args, encoder_pos_embed=self._join(encoder_pos_embed), **kwargs)

    def _join(self, positions: Tensor) -> Tensor:
        """The positions [s, 1, c] that LeRobot stacked, with those of the visual tokens, which come last."""
        first = positions[: len(positions) - len(self.positions)]
        return torch.cat([first.expand(-1, self.positions.shape[1], -1), self.positions.to(first.dtype)])


# The phases.


class Seen(NamedTuple):
    """What the prefill gets.

    Attributes:
        images: float32 [n * b, 3, height, width], camera by camera.
        state: float32 [b, s], of the robot.
        environment: float32 [b, e], of what surrounds it; e is 0 where the policy does not read it.
    """

    images: Tensor
    state: Tensor
    environment: Tensor


class Memory(NamedTuple):
    """What the prefill leaves for the decoder.

    Attributes:
        keys_values: For each of its layers, keys and then values, [b, 2 * h, p, d].
    """

    keys_values: tuple[Tensor, ...]


class _Attention(nn.Module):
    """torch's attention with one product for queries and keys, fused scores, and the batch in front.

    Args:
        attention: torch's.

    Raises:
        UnavailableError: If its weights are not all that it does.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        plain = type(attention) is nn.MultiheadAttention and attention.in_proj_bias is not None
        if not plain or attention._forward_hooks or attention._forward_pre_hooks:
            raise UnavailableError(
                f"an attention is a {type(attention).__name__} or has hooks, and only torch's own is rewritten; merge "
                "low-rank matrices into the weights"
            )
        self.attention, self.heads = attention, attention.num_heads

    def project(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Queries (0), keys (1), values (2), from the first to the last of these, of [b, p, c]: [b, ... * h, p, d]."""
        attention, width = self.attention, self.attention.embed_dim
        rows = slice(first * width, (last + 1) * width)
        projected = F.linear(tokens, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        return projected.unflatten(-1, ((last + 1 - first) * self.heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[b, 2 * h, p, d]; positions belong to the keys."""
        return torch.cat([self.project(tokens + positions, 1, 1), self.project(tokens, 2, 2)], dim=1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[b, h, t, d] to [b, t, c]."""
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return F.linear(
            attended.transpose(1, 2).flatten(2), self.attention.out_proj.weight, self.attention.out_proj.bias
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [b, t, c] that attend to each other; positions belong to queries and keys."""
        queries, keys = self.project(tokens + positions, 0, 1).chunk(2, dim=1)
        return self.attend(queries, keys, self.project(tokens, 2, 2))


class _Encode(nn.Module):
    """A layer of the encoder."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.attention = layer, _Attention(layer.self_attn)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[b, p, c], with positions [1 or b, p, c]."""
        layer = self.layer
        if layer.pre_norm:
            hidden = hidden + self.attention(layer.norm1(hidden), positions)
            return hidden + _feed_forward(layer, layer.norm2(hidden))
        hidden = layer.norm1(hidden + self.attention(hidden, positions))
        last: Tensor = layer.norm2(hidden + _feed_forward(layer, hidden))
        return last


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    inner: Tensor = layer.linear2(layer.activation(layer.linear1(hidden)))
    return inner


class _Prefill(nn.Module):
    """ResNet, sampler, encoder, and the keys and values that the decoder reads."""

    def __init__(self, model: Any, seam: Seam, cameras: list[int], dense_positions: bool) -> None:
        super().__init__()
        self.seam, self.cameras, self.reducer = seam, cameras, seam.reducer
        self.at_places = dense_positions
        self.backbone, self.projection = without_norms(model.backbone), model.encoder_img_feat_input_proj
        self.state, self.norm = model.encoder_robot_state_input_proj, model.encoder.norm
        self.environment = model.encoder_env_state_input_proj if model.config.env_state_feature else None
        self.layers = nn.ModuleList([_Encode(layer) for layer in model.encoder.layers])
        self.readers = nn.ModuleList([_Attention(layer.multihead_attn) for layer in model.decoder.layers])
        self.latent: Tensor
        self.first: Tensor
        self.dense: Tensor
        # The latent is zero when it acts.
        self.register_buffer("latent", model.encoder_latent_input_proj.bias.detach().clone(), persistent=False)
        self.register_buffer("first", model.encoder_1d_feature_pos_embed.weight.detach().clone(), persistent=False)
        self.register_buffer("dense", _dense_positions(model, seam.layout.token_grid, self.latent), persistent=False)

    def forward(self, images: Tensor, state: Tensor, environment: Tensor) -> Memory:
        """See `runtime.phases`."""
        visual, coordinates = self.seam.reduce(
            self.reducer, images, {OBS_STATE: state}, self.cameras, self._encode, None
        )
        places = _positions(self.dense, visual, (coordinates or None) if self.at_places else None).transpose(0, 1)
        positions = torch.cat([self.first.expand(len(places), -1, -1), places.to(self.first.dtype)], dim=1)
        numbers = [self.latent.expand(len(state), -1), self.state(state)]
        if self.environment is not None:
            numbers.append(self.environment(environment))
        hidden = torch.cat([torch.stack(numbers, dim=1), *visual], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        hidden = self.norm(hidden)
        return Memory(tuple(reader.keys_values(hidden, positions) for reader in self.readers))  # type: ignore[operator]

    def _encode(self, images: Tensor) -> Tensor:
        cells: Tensor = self.projection(self.backbone(images)["feature_map"])
        return cells.flatten(2).transpose(1, 2)


class _Decode(nn.Module):
    """The decoder: its queries are learned, so they are the same for all observations until they read the memory."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.norm, self.head = model.decoder.layers, model.decoder.norm, model.action_head
        self.own: Any = nn.ModuleList([_Attention(layer.self_attn) for layer in self.layers])
        self.readers: Any = nn.ModuleList([_Attention(layer.multihead_attn) for layer in self.layers])
        self.positions: Tensor
        self.start: Tensor
        self.register_buffer("positions", model.decoder_pos_embed.weight.detach()[None].clone(), persistent=False)
        self.register_buffer("start", self._among_themselves(0, torch.zeros_like(self.positions)), persistent=False)

    def forward(self, memory: Memory, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`."""
        hidden = self.start.expand(len(x_t), -1, -1)
        for number, (layer, reader) in enumerate(zip(self.layers, self.readers, strict=True)):
            if number:
                hidden = self._among_themselves(number, hidden)
            inner = layer.norm2(hidden) if layer.pre_norm else hidden
            queries = reader.project(inner + self.positions, 0, 0)
            hidden = hidden + reader.attend(queries, *memory.keys_values[number].chunk(2, dim=1))
            hidden = hidden if layer.pre_norm else layer.norm2(hidden)
            hidden = hidden + _feed_forward(layer, layer.norm3(hidden) if layer.pre_norm else hidden)
            hidden = hidden if layer.pre_norm else layer.norm3(hidden)
        actions: Tensor = self.head(self.norm(hidden))
        return actions

    def _among_themselves(self, number: int, hidden: Tensor) -> Tensor:
        """The first part of a layer, in which queries attend to each other."""
        layer = self.layers[number]
        if layer.pre_norm:
            return hidden + self.own[number](layer.norm1(hidden), self.positions)
        normed: Tensor = layer.norm1(hidden + self.own[number](hidden, self.positions))
        return normed


def _decode_once(decode: Any, nothing: Tensor, numbers: Tensor) -> Tensor:
    # On a GPU the next chunk overwrites what the step returns.
    actions: Tensor = decode(nothing, numbers[:1]).clone()
    return actions


# Small sizes. torchvision's ResNets have 512 channels at least, so a smaller one of its blocks takes the place of one.


@contextmanager
def small_backbone() -> Iterator[None]:
    """In this block an ACT policy is constructed with a ResNet of a few thousand parameters, and cells of 8 pixels."""
    import torchvision

    with replaced(torchvision.models, resnet18=_small_resnet):
        yield


def _small_resnet(norm_layer: Any, weights: Any = None, **options: Any) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, conv1x1

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), norm_layer(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm_layer)

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 4, stride=4, bias=False),
            layer1=block(8, 8, 1),
            layer4=block(8, 24, 2),
            fc=nn.Linear(24, 1),
        )
    )
