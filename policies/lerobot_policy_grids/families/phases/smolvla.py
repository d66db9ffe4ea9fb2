"""SmolVLA: vision tower, connector, sampler and trunk; then the action expert on noisy actions.

The layers of the trunk and the action expert's are `runtime.layers`. Half of the expert's layers attend to the prefix
alone, through projections of the trunk's keys and values that are the same at every step, so they are part of the
prefill.
"""

from importlib import import_module
from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ...reducers.blocks import join
from ...runtime import Cache
from ...runtime.flow import NoisyActions, step_times
from ...runtime.layers import DecoderLayer, Heads, Norm, normalise, prefix_keys_values, rotation_tables, score_mask
from ...runtime.phases import Rotation
from ..positions import dense_positions, numbering_of
from ..seam import Sampling, Seam
from ..tower import run_between


def _heads(vlm: Any) -> Heads:
    """Those of the trunk, which the expert's equal."""
    return Heads(vlm.num_attention_heads, vlm.num_key_value_heads, vlm.vlm.config.text_config.head_dim)


def _decoders(vlm: Any) -> tuple[list[Any], list[Any]]:
    """Layers of the trunk, and for each the expert's that reads it, or None."""
    trunk, expert = vlm.get_model_layers([vlm.get_vlm_model().text_model, vlm.lm_expert])
    return trunk, expert


def _attends_itself(vlm: Any, number: int) -> bool:
    """Whether the tokens of the expert's layer with this number attend to each other, too."""
    every = vlm.self_attn_every_n_layers
    return "cross" not in vlm.attention_mode or (every > 0 and number % every == 0)


def _decoder(layer: Any, heads: Heads, own_keys: bool = True) -> DecoderLayer:
    """A layer of the trunk or of the expert."""
    norm = layer.input_layernorm
    return DecoderLayer(layer, heads, norm.variance_epsilon, scale=norm.weight.float(), own_keys=own_keys)


def _later_scales(layers: list[Any]) -> Tensor:
    """Scales float32 [layers, c] of the norms before the MLPs."""
    return torch.stack([layer.post_attention_layernorm.weight.float() for layer in layers])


def _rotation(positions: Tensor, heads: Heads, rotated: int, plain: int) -> Rotation:
    """Tables float32 of `apply_rope` at positions [b, t]."""
    half = heads.width // 2
    exponents = (2.0 / heads.width) * torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() / 10_000**exponents
    both = torch.cat([angles, angles], dim=-1)
    return rotation_tables(both.cos(), both.sin(), rotated, plain)


def _positions_of_patches(vision: Any, height: int, width: int) -> Tensor:
    """What the vision tower adds to the patches of an image, [1, patches, c], by its own rule."""
    embeddings, seen = vision.embeddings, []
    handle = embeddings.position_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    weight = embeddings.position_embedding.weight
    try:
        pixels = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
        side = vision.patch_size
        mask = torch.ones(1, height // side, width // side, dtype=torch.bool, device=weight.device)
        embeddings(pixel_values=pixels, patch_attention_mask=mask)
    finally:
        handle.remove()
    added: Tensor = seen[0]
    return added


class _Projection(nn.Module):
    """Keys and values of the trunk, as a layer of the expert sees them.

    Args:
        attention: The layer's.
        heads: Its heads.
    """

    def __init__(self, attention: Any, heads: Heads) -> None:
        super().__init__()
        self.projections: Any = nn.ModuleList([attention.k_proj, attention.v_proj])
        self.heads = heads

    def forward(self, keys_values: Tensor) -> Tensor:
        """[b, 2 * g, p, d] to the same shape."""
        parts = keys_values.transpose(1, 2).chunk(2, dim=2)
        projected = [
            project(part.flatten(2).to(project.weight.dtype)).unflatten(-1, (-1, self.heads.width))
            for project, part in zip(self.projections, parts, strict=True)
        ]
        return torch.cat(projected, dim=2).transpose(1, 2)


# Of the prefill: see `runtime.Phases`.
VISION = ("embed_patches", "encoder", "tower_norm", "connector")


class Prefill(nn.Module):
    """Vision tower, connector, sampler, trunk, and what the expert makes of the trunk's keys and values.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        cameras: Numbers of the cameras.
        around: Tokens in front of and behind each camera's visual tokens in the prefix.
    """

    scales: Tensor
    patch_positions: Tensor
    special: Tensor
    state_proj: Any
    connector: Any

    def __init__(self, policy: Any, seam: Seam, cameras: list[int], around: tuple[int, int]) -> None:
        super().__init__()
        model = policy.model
        vlm = model.vlm_with_expert
        inner = vlm.get_vlm_model()
        vision = inner.vision_model
        self.seam, self.cameras, self.reducer = seam, cameras, seam.reducer
        self.embed_patches, self.encoder, self.tower_norm = (
            vision.embeddings.patch_embedding,
            vision.encoder,
            vision.post_layernorm,
        )
        self.connector = inner.connector
        self.token_dtype = next(inner.connector.parameters()).dtype
        self.embed_tokens, self.state_proj = inner.text_model.get_input_embeddings(), model.state_proj
        self.heads = _heads(vlm)
        trunk, expert = _decoders(vlm)
        self.layers = nn.ModuleList([_decoder(layer, self.heads) for layer in trunk])
        self.register_buffer("scales", _later_scales(trunk), persistent=False)
        self.projections: Any = nn.ModuleList(
            [
                nn.Identity()
                if layer is None or _attends_itself(vlm, number)
                else _Projection(layer.self_attn, self.heads)
                for number, layer in enumerate(expert)
            ]
        )
        self.read = [number for number, layer in enumerate(expert) if layer is not None]
        self.numbering = numbering_of(vlm)
        self.dtype = trunk[0].self_attn.q_proj.weight.dtype
        self.expert_dtype = next(layer for layer in expert if layer is not None).self_attn.q_proj.weight.dtype
        self.chunk_size = policy.config.chunk_size
        self.before, self.after = around
        special = torch.cat([model.global_image_start_token, model.image_end_token])
        self.register_buffer("special", special.to(self.embed_tokens.weight.device), persistent=False)
        height, width = seam.layout.token_grid
        cell = vision.patch_size * vlm.config.scale_factor
        added = _positions_of_patches(vision, height * cell, width * cell)
        self.register_buffer("patch_positions", added, persistent=False)

    def forward(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Cache:
        """See `runtime.phases`."""
        batch = {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: token_mask, OBS_STATE: state}
        visual, coordinates = self.seam.reduce(
            self.reducer, images, batch, self.cameras, self._encode, self.embed_tokens
        )
        hidden, seen = self._prefix(visual, image_mask, tokens, token_mask, state)
        positions = seen.cumsum(1) - 1
        following = seen.sum(1, keepdim=True) + torch.arange(self.chunk_size, device=seen.device)
        if self.numbering is not None and coordinates:
            grid = self.seam.layout.token_grid
            positions, moved = dense_positions(positions, coordinates, grid, self.before, self.after)
            following = following + moved

        # The state, which comes last, sees everything, and is seen by the actions alone.
        last = torch.arange(seen.shape[1], device=seen.device) == seen.shape[1] - 1
        visible = score_mask(seen[:, None] & (~last | last[:, None]), self.heads.keys, self.dtype)
        rotation = self._rotate_all(positions)
        keys_values = prefix_keys_values(self.layers, hidden, rotation, visible, self.scales)

        order = torch.arange(self.chunk_size, device=seen.device)
        causal = (order <= order[:, None]).expand(len(seen), -1, -1)
        visible = torch.cat([seen[:, None].expand(-1, self.chunk_size, -1), causal], dim=2)
        # Layers that see the prefix alone count the actions from 0.
        alone = _rotation(order[None], self.heads, self.heads.queries, 0)
        return Cache(
            tuple(self.projections[number](keys_values[number]).to(self.expert_dtype) for number in self.read),
            score_mask(visible, self.heads.keys, self.expert_dtype),
            self._rotate_all(following),
            (score_mask(seen[:, None], self.heads.keys, self.expert_dtype), *alone),
        )

    def _encode(self, images: Tensor, sample: Sampling | None = None) -> Tensor:
        patches = self.embed_patches(images.to(self.tower_norm.weight.dtype)).flatten(2).transpose(1, 2)
        patches = patches + self.patch_positions.to(patches.dtype)
        tokens: Tensor
        if sample is None:
            patches = self.encoder(inputs_embeds=patches).last_hidden_state
            tokens = self.connector(self.tower_norm(patches))
        else:
            patches = self.tower_norm(run_between(self.encoder, self.seam.after, sample, patches))
            tokens = self.connector.modality_projection(join(patches, self.connector.scale_factor))
        return tokens.to(self.token_dtype)

    def _prefix(
        self, visual: list[Tensor], image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Tokens [b, p, c] of the trunk, which of them are real, bool [b, p])."""
        size, project = len(tokens), self.state_proj
        special = self.embed_tokens(self.special).expand(size, -1, -1)
        always = token_mask.new_ones(size, max(self.before, self.after, 1))
        parts, seen = [], []
        for mask, camera in zip(image_mask.split(1, 1), visual, strict=True):
            scaled = camera * camera.shape[-1] ** 0.5
            parts += [special[:, : self.before], scaled, special[:, special.shape[1] - self.after :]]
            seen += [always[:, : self.before], mask.expand(-1, camera.shape[1]), always[:, : self.after]]
        language = self.embed_tokens(tokens)
        padded = nn.functional.pad(state, (0, project.in_features - state.shape[-1]))
        parts += [language * language.shape[-1] ** 0.5, project(padded.to(project.weight.dtype))[:, None]]
        return torch.cat(parts, dim=1), torch.cat([*seen, token_mask, always[:, :1]], dim=1)

    def _rotate_all(self, positions: Tensor) -> Rotation:
        return _rotation(positions, self.heads, self.heads.queries + self.heads.keys, self.heads.keys)


class Step(nn.Module):
    """The action expert on noisy actions."""

    scales: Tensor
    last_scale: Tensor

    def __init__(self, policy: Any, steps: int) -> None:
        super().__init__()
        model, config = policy.model, policy.config
        vlm = model.vlm_with_expert
        _, expert = _decoders(vlm)
        numbers = [number for number, layer in enumerate(expert) if layer is not None]
        layers = [expert[number] for number in numbers]
        self.attends_itself = [_attends_itself(vlm, number) for number in numbers]
        pairs = zip(layers, self.attends_itself, strict=True)
        self.layers = nn.ModuleList([_decoder(layer, _heads(vlm), itself) for layer, itself in pairs])
        self.register_buffer("scales", _later_scales(layers), persistent=False)
        self.register_buffer("last_scale", vlm.lm_expert.norm.weight.detach().float(), persistent=False)
        self.eps = vlm.lm_expert.norm.variance_epsilon
        times = step_times(steps, self.scales.device)
        embedded = import_module("lerobot.policies.smolvla.modeling_smolvla").create_sinusoidal_pos_embedding(
            times, vlm.expert_hidden_size, config.min_period, config.max_period, device=times.device
        )
        self.actions = NoisyActions(
            model.action_in_proj, model.action_time_mlp_in, model.action_time_mlp_out, embedded.to(times.dtype)
        )
        self.project_out = model.action_out_proj

    def forward(self, cache: Cache, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`."""
        prefix_mask, *alone = cache.extra
        hidden = self.actions(x_t, step)
        layers = zip(self.layers, self.attends_itself, cache.keys_values, self.scales.unbind(), strict=True)
        for layer, itself, cached, scale in layers:
            rotation, mask = (cache.rotation, cache.mask) if itself else (Rotation(*alone), prefix_mask)
            hidden, _ = layer(hidden, rotation, mask, Norm(), Norm(scale), cached)
        velocity: Tensor = self.project_out(normalise(hidden, Norm(self.last_scale), self.eps))
        return velocity
