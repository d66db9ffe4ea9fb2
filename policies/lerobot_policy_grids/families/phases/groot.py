"""GR00T N1.7: vision tower, sampler and Qwen3-VL; then the action transformer on noisy actions.

Every other layer of the action transformer reads images or words alone, whose keys and values are the same at every
step, so they are part of the prefill. What its norms scale and shift by depends on the time alone.

The trunk tells tokens apart by their positions and by what they see, and not by their order: here visual tokens come
first and words behind them, whatever the prompt's order, so that nothing has to be put in its place.
"""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...runtime import UnavailableError
from ...runtime.buckets import bucket
from ...runtime.flow import integrate_forwards
from ...runtime.layers import DecoderLayer, Heads, Norm, require_plain, rotate, rotation_tables
from ...runtime.phases import Rotation
from ...runtime.precision import in_bfloat16
from ..acting import Draws
from ..qwen import Placed, places_among, read_at, require_grid
from ..seam import Seam
from .prompts import visibility


class Seen(NamedTuple):
    """What the prefill gets.

    Attributes:
        patches: [n * b, p, d], the pixels of each image, camera by camera.
        tokens: int64 [b, l], the words of the prompt: all that is no image.
        images_before: int64 [b, l], how many images are in front of each.
        token_mask: bool [b, l], false for padding.
        token_exists: bool [b, l], false for padding that LeRobot does not have: part of what it has is read.
        state: [b, h, s], of the robot.
        embodiment: int64 [b], the kind of robot.
    """

    patches: Tensor
    tokens: Tensor
    images_before: Tensor
    token_mask: Tensor
    token_exists: Tensor
    state: Tensor
    embodiment: Tensor


class Parts(NamedTuple):
    """Modules of a policy of which its phases are made: vision tower, trunk and action head."""

    visual: Any
    text: Any
    head: Any


class Known(NamedTuple):
    """What the prefill leaves for the steps.

    Attributes:
        keys_values: For each layer of the action transformer that reads images or words, keys and then values
            [b, 2 * h, p, d].
        word_mask: bool [b, 1, 1, l], which words are read.
        state: The token of the state, [b, 1, c].
        embed: Embeds actions of this kind of robot: weights [b, a, c] and biases [b, 1, c].
        mix: Mixes them with the time: weights [b, c, c], and what becomes of the times of all steps [b, steps, c].
        finish: And makes tokens of that: weights [b, c, c], and biases with positions [b, t, c].
        decode: Weights and biases of the two layers that decode tokens.
    """

    keys_values: tuple[Tensor, ...]
    word_mask: Tensor
    state: Tensor
    embed: tuple[Tensor, Tensor]
    mix: tuple[Tensor, Tensor]
    finish: tuple[Tensor, Tensor]
    decode: tuple[Tensor, Tensor, Tensor, Tensor]


class _Tower(nn.Module):
    """Qwen3-VL's vision tower on images of one size, whose positions are then always the same.

    Args:
        visual: The policy's.
        token_grid: Rows and columns of what becomes of an image.
    """

    def __init__(self, visual: Any, token_grid: tuple[int, int]) -> None:
        super().__init__()
        self.visual = visual
        merge = visual.spatial_merge_size
        grid = torch.tensor([[1, *(side * merge for side in token_grid)]])
        angles = visual.rot_pos_emb(grid)
        both = torch.cat([angles, angles], dim=-1)[None]
        self.positions: Tensor
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("positions", visual.fast_pos_embed_interpolate(grid).detach(), persistent=False)
        cos, sin = rotation_tables(both.cos().float(), both.sin().float(), 1, 0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for block in visual.blocks:
            require_plain(block.attn.qkv)

    def forward(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patches [m, p, d] to tokens [m, H * W, c], and features of earlier layers of the same shape."""
        visual, count = self.visual, len(patches)
        embed = visual.patch_embed.proj
        hidden = F.linear(patches.to(embed.weight.dtype), embed.weight.flatten(1), embed.bias)
        hidden = hidden + self.positions.to(hidden.dtype)
        earlier = []
        for number, block in enumerate(visual.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if number in visual.deepstack_visual_indexes:
                merge = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                earlier.append(merge(hidden).unflatten(0, (count, -1)))
        return visual.merger(hidden).unflatten(0, (count, -1)), earlier

    def _attend(self, attention: Any, inner: Tensor) -> Tensor:
        heads = attention.qkv(inner).unflatten(-1, (3 * attention.num_heads, -1))
        rotated, values = heads.split([2 * attention.num_heads, attention.num_heads], dim=2)
        queries, keys = rotate(rotated, Rotation(self.cos, self.sin)).chunk(2, dim=2)
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values)
        projected: Tensor = attention.proj(attended.transpose(1, 2).flatten(2))
        return projected


class _TrunkLayer(DecoderLayer):
    """A layer of the trunk, which norms its queries and keys head by head."""

    def __init__(self, layer: Any, heads: Heads) -> None:
        norm, attention = layer.input_layernorm, layer.self_attn
        super().__init__(layer, heads, norm.variance_epsilon, scale=norm.weight.float())
        scales = [attention.q_norm.weight.expand(heads.queries, -1), attention.k_norm.weight.expand(heads.keys, -1)]
        self.head_scale: Tensor
        self.register_buffer("head_scale", torch.cat(scales).detach().float(), persistent=False)

    def _project(self, hidden: Tensor, rotation: Rotation, before: Norm, first: int) -> Tensor:
        heads = self._unrotated(hidden, before, first)
        rotated, values = heads.split([heads.shape[2] - self.heads.keys, self.heads.keys], dim=2)
        normed = F.rms_norm(rotated.float(), (self.heads.width,), None, self.eps) * self.head_scale[first:]
        return torch.cat([rotate(normed.to(heads.dtype), rotation), values], dim=2)


class _Block(nn.Module):
    """A layer of diffusers' transformer: attention, and an MLP.

    Args:
        block: LeRobot's.
        reads: Whether its attention is to others, whose keys and values come from `keys_values`.

    Raises:
        UnavailableError: If it does more than that.
    """

    def __init__(self, block: Any, reads: bool = False) -> None:
        super().__init__()
        attention = block.attn1
        projections = [attention.to_q, *([] if reads else [attention.to_k, attention.to_v])]
        for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            require_plain(linear)
        unusual = [
            name for name in ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm") if _has(attention, name)
        ]
        if (
            unusual
            or block.pos_embed is not None
            or attention.residual_connection
            or attention.rescale_output_factor != 1
        ):
            raise UnavailableError(
                f"an attention of the action head has {', '.join(unusual) or 'positions, a residual or a factor'}, "
                "which N1.7's have not"
            )
        self.attention, self.heads = attention, attention.heads
        self.norm, self.feed_forward = block.norm3, block.ff
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", _joined([linear.weight for linear in projections]), persistent=False)
        biased = attention.to_q.bias is not None
        bias = _joined([linear.bias for linear in projections]) if biased else None
        self.register_buffer("bias", bias, persistent=False)

    def keys_values(self, tokens: Tensor) -> Tensor:
        """[b, p, c] to [b, 2 * h, p, d]."""
        both = torch.cat([self.attention.to_k(tokens), self.attention.to_v(tokens)], dim=-1)
        return both.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2)

    def forward(
        self, hidden: Tensor, inner: Tensor, keys_values: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Tokens [b, t, c], and the same normed, through the layer."""
        heads = F.linear(inner, self.weight, self.bias).unflatten(-1, (-1, self.weight.shape[1] // self.heads))
        heads = heads.transpose(1, 2)
        keys, values = (heads[:, self.heads :] if keys_values is None else keys_values).chunk(2, dim=1)
        attended = F.scaled_dot_product_attention(heads[:, : self.heads], keys, values, attn_mask=mask)
        hidden = hidden + self.attention.to_out[0](attended.transpose(1, 2).flatten(2))
        whole: Tensor = hidden + self.feed_forward(self.norm(hidden))
        return whole


# Of the prefill: see `runtime.Phases`.
VISION = ("tower",)


class Prefill(nn.Module):
    """Vision tower, sampler, trunk, and what the action transformer makes of both before it sees an action.

    Args:
        parts: Of the policy.
        seam: Attached to it.
        cameras: Numbers of the cameras.
        steps: Of the denoising.
        dense: Whether visual tokens have their positions among all of them.

    Raises:
        UnavailableError: If an attention does more than N1.7's.
    """

    def __init__(self, parts: Parts, seam: Seam, cameras: list[int], steps: int, dense: bool) -> None:
        super().__init__()
        text, head = parts.text, parts.head
        self.seam, self.cameras, self.reducer, self.dense = seam, cameras, seam.reducer, dense
        self.tower = _Tower(parts.visual, seam.layout.token_grid)
        self.token_dtype = self.tower.positions.dtype
        self.embed_tokens, self.rotary = text.embed_tokens, text.rotary_emb
        sizes = text.config
        self.heads = Heads(sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim)
        self.layers = nn.ModuleList([_TrunkLayer(layer, self.heads) for layer in text.layers])
        scales = torch.stack([layer.post_attention_layernorm.weight.detach().float() for layer in text.layers])
        self.scales: Tensor
        self.register_buffer("scales", scales, persistent=False)
        self.norm = head.vlln
        alone = getattr(head.vl_self_attention, "transformer_blocks", ())
        self.norms = nn.ModuleList([block.norm1 for block in alone])
        self.blocks = nn.ModuleList([_Block(block) for block in alone])
        self.readers: Any = nn.ModuleList([_Block(block, reads=True) for block in head.model.transformer_blocks[::2]])
        self.head = head
        self.times: Tensor
        times = head.action_encoder.pos_encoding(_times(head, steps)).to(head.dtype)
        self.register_buffer("times", times, persistent=False)

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        images_before: Tensor,
        token_mask: Tensor,
        token_exists: Tensor,
        state: Tensor,
        embodiment: Tensor,
    ) -> Known:
        """See `runtime.phases`."""
        # The instruction is behind the images.
        said = token_mask & (images_before == len(self.cameras))
        batch = {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: said, OBS_STATE: state[:, -1]}
        earlier: list[Tensor] = []
        visual, places = self.seam.reduce(
            self.reducer, patches, batch, self.cameras, partial(self._encode, earlier), self.embed_tokens
        )
        counts = [camera.shape[1] for camera in visual]
        words = self.embed_tokens(tokens)
        hidden = torch.cat([torch.cat(visual, dim=1).to(words.dtype), words], dim=1)
        visible = visibility(counts, images_before, token_mask).repeat_interleave(
            self.heads.keys, dim=0, output_size=len(tokens) * self.heads.keys
        )[:, None]
        positions = _positions(counts, places, self.seam.layout.token_grid, images_before, token_mask, self.dense)
        cos, sin = self.rotary(hidden, positions)
        rotation = rotation_tables(cos, sin, 1, 0)
        added = self._added(earlier, places, tokens.shape[1])
        for number, (layer, scale) in enumerate(zip(self.layers, self.scales.unbind(), strict=True)):
            hidden, _ = layer(hidden, rotation, visible, Norm(), Norm(scale))
            if number < len(added):
                hidden = hidden + added[number]
        return self._known(hidden, sum(counts), token_mask, token_exists, state, embodiment)

    def _encode(self, earlier: list[Tensor], patches: Tensor) -> Tensor:
        tokens, features = self.tower(patches)
        earlier += [feature.to(self.token_dtype) for feature in features]
        return tokens.to(self.token_dtype)

    def _added(self, earlier: list[Tensor], places: list[Tensor], words: int) -> tuple[Tensor, ...]:
        """What the first layers of the trunk get from the tower's, [b, p, c] each, zero at the words.

        Args:
            earlier: Features [n * b, H * W, c] of layers of the tower.
            places: Where tokens were read, [b, k, 2] of each camera; none where all cells were kept.
            words: How many there are.
        """
        if not earlier:
            return ()
        cameras = torch.cat(earlier, dim=-1).chunk(len(self.cameras))
        if places:
            grid = self.seam.layout.token_grid
            cameras = tuple(read_at(camera, place, grid) for camera, place in zip(cameras, places, strict=True))
        return F.pad(torch.cat(cameras, dim=1), (0, 0, 0, words)).chunk(len(earlier), dim=-1)

    def _known(
        self, hidden: Tensor, images: int, token_mask: Tensor, token_exists: Tensor, state: Tensor, embodiment: Tensor
    ) -> Known:
        hidden = self.norm(hidden)
        # LeRobot lets padding be read here.
        exists = F.pad(token_exists, (images, 0), value=True)[:, None, None]
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = block(hidden, norm(hidden), mask=exists)
        seen, read = hidden[:, :images], hidden[:, images:]
        head, size = self.head, len(state)
        encoder, decoder = head.action_encoder, head.action_decoder
        width = self.times.shape[-1]
        mix, finish = encoder.W2.W[embodiment], encoder.W3.b[embodiment][:, None].expand(-1, head.action_horizon, -1)
        if head.config.add_pos_embed:
            finish = finish + head.position_embedding.weight[: head.action_horizon]
        return Known(
            tuple(
                reader.keys_values(read if reads_words(head.model, 2 * number) else seen)
                for number, reader in enumerate(self.readers)
            ),
            token_mask[:, None, None],
            head.state_encoder(state.reshape(size, 1, -1).to(self.times.dtype), embodiment),
            (encoder.W1.W[embodiment], encoder.W1.b[embodiment][:, None]),
            (mix[:, :width], self.times @ mix[:, width:] + encoder.W2.b[embodiment][:, None]),
            (encoder.W3.W[embodiment], finish),
            (
                *(decoder.layer1.W[embodiment], decoder.layer1.b[embodiment][:, None]),
                *(decoder.layer2.W[embodiment], decoder.layer2.b[embodiment][:, None]),
            ),
        )


class Step(nn.Module):
    """The action transformer on noisy actions and what is known."""

    def __init__(self, head: Any, steps: int) -> None:
        super().__init__()
        transformer = head.model
        blocks = transformer.transformer_blocks
        self.blocks = nn.ModuleList([_Block(block, number % 2 == 0) for number, block in enumerate(blocks)])
        self.words = [reads_words(transformer, number) for number in range(len(blocks))]
        self.project, self.horizon = transformer.proj_out_2, head.action_horizon
        self.eps = [*(block.norm1.norm.eps for block in blocks), transformer.norm_out.eps]
        condition = F.silu(transformer.timestep_encoder(_times(head, steps)))
        pairs = [block.norm1.linear(condition).chunk(2, dim=-1) for block in blocks]
        shift, scale = transformer.proj_out_1(condition).chunk(2, dim=-1)
        scales, shifts = (torch.stack(parts, dim=1) for parts in zip(*pairs, (scale, shift), strict=True))
        # Scale and shift of each norm at each step, [steps, 2, layers + 1, c].
        self.modulations: Tensor
        self.register_buffer("modulations", torch.stack([1 + scales, shifts], dim=1), persistent=False)

    def forward(self, known: Known, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`; here the velocity leads from noise to actions."""
        weight, bias = known.embed
        embedded = torch.baddbmm(bias, x_t.to(weight.dtype), weight)
        mix, of_time = known.mix
        embedded = F.silu(torch.baddbmm(of_time.index_select(1, step), embedded, mix))
        finish, start = known.finish
        hidden = torch.cat([known.state, torch.baddbmm(start, embedded, finish)], dim=1)
        scales, shifts = (part.unbind() for part in self.modulations.index_select(0, step)[0].unbind())
        read = iter(known.keys_values)
        for number, (block, words) in enumerate(zip(self.blocks, self.words, strict=True)):
            inner = F.layer_norm(hidden, hidden.shape[-1:], scales[number], shifts[number], self.eps[number])
            if number % 2:
                hidden = block(hidden, inner)
            else:
                hidden = block(hidden, inner, next(read), known.word_mask if words else None)
        last = F.layer_norm(hidden[:, -self.horizon :], hidden.shape[-1:], scales[-1], shifts[-1], self.eps[-1])
        first, first_bias, second, second_bias = known.decode
        decoded = F.relu(torch.baddbmm(first_bias, self.project(last), first))
        return torch.baddbmm(second_bias, decoded, second)


def reads_words(transformer: Any, number: int) -> bool:
    """Whether a layer of the action transformer, if it reads images or words, reads words."""
    reads: bool = number % (2 * transformer.attend_text_every_n_blocks) == 0
    return reads


def _has(attention: Any, name: str) -> bool:
    return getattr(attention, name, None) is not None


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors as one; a single one is not copied."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).detach()


def parts_of(policy: Any) -> Parts:
    """The modules of a policy, in the precision in which LeRobot multiplies their weights.

    Raises:
        UnavailableError: If its action head is another than N1.7's.
    """
    model = policy._groot_model
    core, head = model.backbone.model.model, model.action_head
    if not head.config.use_alternate_vl_dit:
        raise UnavailableError(
            "use_alternate_vl_dit=false makes another action transformer than N1.7's, without phases"
        )
    parts = Parts(core.visual, core.language_model, head)
    if policy.config.use_bf16 and model.dtype != torch.bfloat16:
        # LeRobot's autocast makes such copies, too, for each chunk anew.
        return Parts(*map(in_bfloat16, parts))
    return parts


def _times(head: Any, steps: int) -> Tensor:
    """Of the steps, int64 [steps], by LeRobot's rule."""
    numbers = [int(step / float(steps) * head.num_timestep_buckets) for step in range(steps)]
    return torch.tensor(numbers, device=head.device)


def _positions(
    counts: list[int],
    places: list[Tensor],
    token_grid: tuple[int, int],
    images_before: Tensor,
    token_mask: Tensor,
    dense: bool,
) -> Tensor:
    """Positions float32 [3, b, p] of visual tokens and words, as `qwen.Placed` numbers them.

    Args:
        counts: Visual tokens of each camera.
        places: Where they were read, [b, k, 2] each; none where all cells were kept.
        token_grid: Rows and columns of an image.
        images_before: Of `Seen`.
        token_mask: Of `Seen`.
        dense: Whether visual tokens have their positions among all of them.
    """
    height, width = token_grid
    scales = [1.0 if dense or not places else math.sqrt(count / (height * width)) for count in counts]
    spans = [math.ceil(max(height, width) * scale) for scale in scales]
    words = token_mask.cumsum(1) - 1
    found = []
    for camera, (scale, span) in enumerate(zip(scales, spans, strict=True)):
        if places:
            row, column = places_among(places[camera], token_grid, scale)
        else:
            cell = torch.arange(height * width, device=words.device).expand(len(words), -1)
            row, column = (cell // width).float(), (cell % width).float()
        first = (token_mask & (images_before <= camera)).sum(1) + sum(spans[:camera])
        found.append(torch.stack([torch.zeros_like(row), row, column]) + first[:, None])
        words = words + span * (images_before > camera)
    return torch.cat([*found, (words * token_mask).float().expand(3, -1, -1)], dim=-1)


def get_action(
    policy: Any,
    seam: Seam,
    reduce: Callable[[dict[str, Any]], dict[str, Any]],
    inputs: dict[str, Any],
    options: dict[str, Any] | None = None,
) -> Any:
    """In place of `GR00TN17.get_action`, whose arguments follow `reduce`.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        reduce: Inputs with all tokens to what LeRobot's own loop gets in their place.
        inputs: All of the prompt, or what `reduce` made of it.
        options: Of real-time chunking, whose last actions are then among the inputs.

    Returns:
        {"action_pred": actions [b, t, a]}.
    """
    model, runtime = policy._groot_model, seam.runtime
    own = partial(type(model).get_action, model)
    if runtime is None or isinstance(inputs["image_grid_thw"], Placed):
        return own(inputs, options)
    prepared, _ = model.prepare_input(inputs)
    head, like = model.action_head, prepared["state"]
    draws = Draws(like.device)
    noise = torch.randn(
        (len(like), head.config.action_horizon, head.action_dim),
        dtype=_dtype_of_actions(policy),
        device=like.device,
    )

    def eager() -> Tensor:
        # LeRobot draws the noise itself: the same once more.
        draws.again()
        with torch.autocast(like.device.type, torch.bfloat16, enabled=policy.config.use_bf16):
            actions: Tensor = own(reduce(inputs), options)["action_pred"]
        return actions

    loop: Any = integrate_forwards if options is None else partial(_guided, head, draws, prepared, options)
    # What LeRobot does under autocast the phases do with weights in bfloat16.
    with torch.autocast(like.device.type, enabled=False):
        actions = runtime.chunk(
            _observe(model, seam, prepared),
            noise,
            cameras=list(range(len(seam.layout.cameras))),
            steps=head.num_inference_timesteps,
            eager=eager,
            loop=loop,
        )
    return {"action_pred": actions}


def _dtype_of_actions(policy: Any) -> torch.dtype:
    """Of the noise that LeRobot draws: that of what the norm in front of the action head makes."""
    model = policy._groot_model
    width = model.config.backbone_embedding_dim
    features = torch.zeros(1, width, dtype=model.dtype, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=policy.config.use_bf16):
        normed: Tensor = model.action_head.vlln(features)
    return normed.dtype


def _observe(model: Any, seam: Seam, prepared: Any) -> Seen:
    """What the prefill gets of LeRobot's inputs; the words of the prompt are filled up to a bucket."""
    ids, mask, layout = prepared["input_ids"], prepared["attention_mask"].bool(), seam.layout
    core, cameras = model.backbone.model.model, len(layout.cameras)
    require_grid(layout, core, prepared["image_grid_thw"], len(ids))
    is_image = ids == core.config.image_token_id
    count = ids.shape[1] - cameras * layout.num_dense_tokens
    words = is_image.int().argsort(dim=1, stable=True)[:, :count]
    images_before = is_image.cumsum(1) // layout.num_dense_tokens
    more = (0, bucket(count) - count)
    patches = prepared["pixel_values"].unflatten(0, (len(ids), cameras, -1)).transpose(0, 1).flatten(0, 1)
    return Seen(
        patches,
        F.pad(ids.gather(1, words), more),
        F.pad(images_before.gather(1, words), more, value=cameras),
        F.pad(mask.gather(1, words), more),
        F.pad(torch.ones_like(words, dtype=torch.bool), more),
        prepared["state"],
        prepared["embodiment_id"],
    )


def _guided(
    head: Any, draws: Draws, prepared: Any, options: dict[str, Any], velocity: Any, noise: Tensor, numbers: Tensor
) -> Tensor:
    """LeRobot's own loop, with the actions of the last chunk, in which the velocities are ours."""
    steps = iter(numbers.split(1))
    own = SimpleNamespace(
        config=SimpleNamespace(action_horizon=noise.shape[1], add_pos_embed=False, use_alternate_vl_dit=False),
        action_dim=noise.shape[2],
        action_horizon=noise.shape[1],
        num_inference_timesteps=len(numbers),
        num_timestep_buckets=head.num_timestep_buckets,
        action_encoder=lambda actions, *more: actions,
        model=lambda hidden_states, **more: velocity(hidden_states, next(steps)),
        action_decoder=lambda predicted, *more: predicted,
    )
    # It draws the noise itself: the same once more.
    draws.again()
    guided = type(head).get_action_with_features(
        own,
        backbone_features=noise,
        state_features=noise[:, :0],
        embodiment_id=None,
        backbone_output=None,
        action_input=prepared,
        options=options,
    )
    actions: Tensor = guided["action_pred"]
    return actions
