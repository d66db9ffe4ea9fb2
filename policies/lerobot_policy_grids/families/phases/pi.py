"""π0 and π0.5: vision tower, sampler, projector and Gemma; then the action expert on noisy actions.

Gemma's layers and the action expert's are `runtime.layers`. π0 gives the time to the expert's input and π0.5 to its
norms; both are known for each step.
"""

from importlib import import_module
from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ...runtime import Cache
from ...runtime.flow import NoisyActions, step_times
from ...runtime.layers import DecoderLayer, Heads, Norm, normalise, prefix_keys_values, rotation_tables, score_mask
from ...runtime.phases import Rotation
from ..positions import dense_positions, numbering_of
from ..seam import Sampling, Seam
from ..tower import run_between


def decoder(model: Any) -> tuple[list[DecoderLayer], Heads]:
    """The layers of Gemma or of the action expert, and their heads."""
    config = model.config
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    layers = [
        DecoderLayer(layer, heads, layer.input_layernorm.eps, scale=_scale(layer.input_layernorm))
        for layer in model.layers
    ]
    return layers, heads


def _scale(norm: Any) -> Tensor | None:
    """Scale float32 [c] of a norm; None if it depends on time."""
    return 1.0 + norm.weight.float() if norm.dense is None else None


def later_scales(model: Any) -> Tensor:
    """Scales float32 [layers + 1, c] of the norms before the MLPs, and of the last."""
    norms = [*(layer.post_attention_layernorm for layer in model.layers), model.norm]
    return torch.stack([1.0 + norm.weight.float() for norm in norms])


def _embedded_times(policy: Any, steps: int) -> Tensor:
    """Times float32 [steps, c], as LeRobot embeds them."""
    project, config = policy.model.action_in_proj, policy.config
    times = step_times(steps, project.weight.device)
    modeling = import_module(f"lerobot.policies.{config.type}.modeling_{config.type}")
    embedded: Tensor = modeling.create_sinusoidal_pos_embedding(
        times, project.out_features, min_period=config.min_period, max_period=config.max_period, device=times.device
    )
    return embedded.to(times.dtype)


# Of the prefill: see `runtime.Phases`.
VISION = ("embed_patches", "encoder", "tower_norm")


class Prefill(nn.Module):
    """Vision tower, sampler, projector and Gemma."""

    scales: Tensor
    projector: Any
    state_proj: Any

    def __init__(self, policy: Any, seam: Seam, cameras: list[int]) -> None:
        super().__init__()
        model = policy.model.paligemma_with_expert
        paligemma = model.paligemma.model
        trunk = paligemma.language_model
        # π0-FAST has no expert, and what follows runs through the trunk.
        following = model.gemma_expert.model if hasattr(model, "gemma_expert") else trunk
        tower = getattr(paligemma.vision_tower, "vision_model", paligemma.vision_tower)
        self.seam, self.cameras, self.reducer = seam, cameras, seam.reducer
        self.embed_patches, self.encoder, self.tower_norm = tower.embeddings, tower.encoder, tower.post_layernorm
        self.token_dtype = tower.post_layernorm.weight.dtype
        self.projector, self.embed_tokens = paligemma.multi_modal_projector, trunk.get_input_embeddings()
        layers, self.heads = decoder(trunk)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("scales", later_scales(trunk), persistent=False)
        self.rotary, self.later_rotary = trunk.rotary_emb, following.rotary_emb
        self.numbering = numbering_of(model)
        self.dtype = trunk.layers[0].self_attn.q_proj.weight.dtype
        self.chunk_size, self.state_proj = policy.config.chunk_size, getattr(policy.model, "state_proj", None)

    def forward(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Cache:
        """See `runtime.phases`."""
        hidden, seen, rotation, later = self._prefix(images, image_mask, tokens, token_mask, state)
        visible = score_mask(seen[:, None], self.heads.keys, self.dtype)
        return Cache(
            tuple(prefix_keys_values(self.layers, hidden, rotation, visible, self.scales)),
            score_mask(self._visible_later(seen), self.heads.keys, self.dtype),
            later,
            () if self.state_proj is None else (self._embed_state(state),),
        )

    def _prefix(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
        last: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Rotation, Rotation]:
        """(Tokens [b, p, c] of the trunk, which of them are real, their rotation, that of the tokens that follow).

        Args:
            images: As those further on, of an `Observation`.
            image_mask: Of an observation.
            tokens: Of an observation.
            token_mask: Of an observation.
            state: Of an observation.
            last: A token int64 [b, 1] behind the instruction, which is no part of it for the sampler.
        """
        batch = {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: token_mask, OBS_STATE: state}
        visual, coordinates = self.seam.reduce(
            self.reducer, images, batch, self.cameras, self._encode, self.embed_tokens
        )
        if last is not None:
            tokens = torch.cat([tokens, last], dim=1)
            token_mask = torch.cat([token_mask, torch.ones_like(last, dtype=torch.bool)], dim=1)
        images = torch.cat(visual, dim=1)
        if not self.seam.layout.projected:
            images = self.projector(images)
        hidden = torch.cat([images, self.embed_tokens(tokens)], dim=1)
        hidden = hidden.to(self.dtype)
        real = [mask.expand(-1, camera.shape[1]) for mask, camera in zip(image_mask.split(1, 1), visual, strict=True)]
        seen = torch.cat([*real, token_mask], dim=1)

        positions = seen.cumsum(1) - 1
        following = seen.sum(1, keepdim=True) + torch.arange(self._following, device=seen.device)
        if self.numbering is not None and coordinates:
            grid = self.seam.layout.token_grid
            positions, moved = dense_positions(positions, coordinates, grid, 0, 0)
            following = following + moved
        rotation = self._rotation(self.rotary, hidden, positions)
        return hidden, seen, rotation, self._rotation(self.later_rotary, hidden, following)

    def _encode(self, images: Tensor, sample: Sampling | None = None) -> Tensor:
        states = self.embed_patches(images)
        if sample is None:
            states = self.encoder(inputs_embeds=states).last_hidden_state
        else:
            states = run_between(self.encoder, self.seam.after, sample, states)
        normed: Tensor = self.tower_norm(states)
        tokens = normed.to(self.token_dtype)
        return self.projector(tokens) if self.seam.layout.projected else tokens

    @property
    def _following(self) -> int:
        """Tokens of the action expert."""
        return self.chunk_size + (self.state_proj is not None)

    def _rotation(self, rotary: Any, hidden: Tensor, positions: Tensor) -> Rotation:
        cos, sin = rotary(hidden, positions)
        return rotation_tables(cos, sin, self.heads.queries + self.heads.keys, self.heads.keys)

    def _visible_later(self, seen: Tensor) -> Tensor:
        """What the expert's tokens see: all that is real, but the state's token sees no action."""
        own = seen.new_ones(len(seen), self._following)
        visible = torch.cat([seen, own], dim=1)[:, None]
        if self.state_proj is None:
            return visible
        number = torch.arange(visible.shape[-1], device=seen.device)
        is_state = torch.arange(self._following, device=seen.device)[:, None] == 0
        return visible & ~(is_state & (number > seen.shape[1]))

    def _embed_state(self, state: Tensor) -> Tensor:
        project = self.state_proj
        padded = nn.functional.pad(state, (0, project.in_features - state.shape[-1]))
        embedded: Tensor = project(padded.to(project.weight.dtype))
        return embedded[:, None]


class _Step(nn.Module):
    """The action expert on noisy actions."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        expert = policy.model.paligemma_with_expert.gemma_expert.model
        layers, _ = decoder(expert)
        self.layers = nn.ModuleList(layers)
        self.dtype, self.eps = expert.layers[0].self_attn.q_proj.weight.dtype, expert.norm.eps
        self.project_out, self.chunk_size = policy.model.action_out_proj, policy.config.chunk_size

    def run(self, cache: Cache, hidden: Tensor, before: list[Norm], after: list[Norm]) -> Tensor:
        """Tokens [b, t, c] through all layers, to the velocity of the actions.

        Args:
            cache: Of the prefill.
            hidden: The tokens.
            before: Norms before the attentions.
            after: Norms before the MLPs, and the last.
        """
        hidden = hidden.to(self.dtype)
        for layer, cached, first, second in zip(self.layers, cache.keys_values, before, after[:-1], strict=True):
            hidden, _ = layer(hidden, cache.rotation, cache.mask, first, second, cached)
        velocity: Tensor = self.project_out(normalise(hidden[:, -self.chunk_size :], after[-1], self.eps))
        return velocity


class StepTimedByInput(_Step):
    """π0's: the time is part of what each action is embedded as."""

    scales: Tensor

    def __init__(self, policy: Any, steps: int) -> None:
        super().__init__(policy)
        model = policy.model
        times = _embedded_times(policy, steps)
        self.actions = NoisyActions(model.action_in_proj, model.action_time_mlp_in, model.action_time_mlp_out, times)
        self.register_buffer("scales", later_scales(model.paligemma_with_expert.gemma_expert.model), persistent=False)

    def forward(self, cache: Cache, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`."""
        hidden = torch.cat([cache.extra[0], self.actions(x_t, step)], dim=1)
        return self.run(cache, hidden, [Norm()] * len(self.layers), [Norm(scale) for scale in self.scales.unbind()])


class StepTimedByNorms(_Step):
    """π0.5's: the time sets scale, shift and gate of each norm."""

    tables: tuple[str, ...] = ("scales", "shifts", "biases", "gates")
    scales: Tensor
    shifts: Tensor
    biases: Tensor
    gates: Tensor

    def __init__(self, policy: Any, steps: int) -> None:
        super().__init__(policy)
        model = policy.model
        self.project = model.action_in_proj
        hidden = nn.functional.silu(model.time_mlp_in(_embedded_times(policy, steps)))
        condition = nn.functional.silu(model.time_mlp_out(hidden))
        expert = model.paligemma_with_expert.gemma_expert.model
        norms = [*(layer.input_layernorm for layer in expert.layers)]
        norms += [*(layer.post_attention_layernorm for layer in expert.layers), expert.norm]
        modulations = [norm.dense(condition.to(norm.dense.weight.dtype)).float().chunk(3, dim=-1) for norm in norms]
        scales, shifts, gates = (torch.stack(parts, dim=1) for parts in zip(*modulations, strict=True))
        first: Any = self.layers
        pairs = zip(shifts.to(self.dtype).unbind(1), first, strict=False)
        biases = torch.stack([nn.functional.linear(shift, layer.weight, layer.bias) for shift, layer in pairs], dim=1)
        values = {"scales": 1 + scales, "shifts": shifts, "biases": biases, "gates": gates.to(self.dtype)}
        for name in self.tables:
            self.register_buffer(name, values[name], persistent=False)

    def forward(self, cache: Cache, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`."""
        rows = (getattr(self, name).index_select(0, step)[0].unbind() for name in self.tables)
        scales, shifts, biases, gates = rows
        count = len(biases)
        before = [Norm(scales[i], bias=biases[i], gate=gates[i]) for i in range(count)]
        after = [Norm(scales[i], shifts[i], gate=gates[i]) for i in range(count, len(scales))]
        return self.run(cache, self.project(x_t), before, after)
