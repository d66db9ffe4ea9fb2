"""ACT: ResNet -> 1x1 convolution -> [latent, state, H x W cells of each camera] -> encoder -> decoder -> actions.

Modification, from outside, of `lerobot/policies/act`: `ACT.forward` first runs the ResNet and the convolution, once for
all cameras, and the reducer. LeRobot's own `forward` then runs on `_Reduced`, which stands for the model and answers
with what was read: `backbone` and `encoder_img_feat_input_proj` pass the tokens through, `encoder` and `decoder` get
the position of each token of each sample, where LeRobot has one for the whole batch.

A token has what lies between the sinusoidal positions of the cells around it. That is the default, "dense"; with
"consecutive" positions the tokens have those of the first cells. Positions give the coordinates no gradient.

A fast runtime acts in two phases, of which the second is a single step: `phases.act`.

LeRobot keeps the size of images, so the grid is that of the images in `input_features`: 15 x 20 for 480 x 640 pixels.
All cameras need one size. A cell of a ResNet sees a wide field, whose middle lies half a cell up and left of its own.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from torch import Tensor, nn

from ..errors import CheckpointError, TokenGridError, UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..runtime import FastRuntime, Phases
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .distances import mean_where
from .phases.act import VISION, Decode, Prefill, Seen, decode_once
from .position_embeddings import embeddings_of_tokens
from .seam import Seam


class ACT(Family):
    """Action Chunking with Transformers (Zhao et al. 2023, arXiv 2304.13705)."""

    # Images are seen at the size at which they come.
    resolution_field = None
    extra = None
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
        _, _, at_places = model.forward.args
        dense = _dense_positions(model, seam.layout.token_grid, model.encoder_latent_input_proj.bias)
        unused = tuple(module for name, module in model.named_children() if name.startswith("vae_encoder"))
        return Phases(Prefill(model, seam, cameras, dense, at_places), Decode(model), unused, vision=VISION)

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
    return mean_where(error, inside)


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
        loop=decode_once,
    )
    return chunk, (None, None)


def _forward_eagerly(model: Any, seam: Seam, dense_positions: bool, batch: dict[str, Any]) -> Any:
    tokens = seam.tokens(batch[OBS_IMAGES], batch, partial(_encode, model, seam), None)
    # Nothing where every token was kept.
    coordinates = (seam.coordinates or None) if dense_positions else None
    positions = embeddings_of_tokens(_dense_positions(model, seam.layout.token_grid, tokens[0]), tokens, coordinates)
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
