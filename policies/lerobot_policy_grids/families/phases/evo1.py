"""EVO1: vision tower, sampler and Qwen2; then the action head on noisy actions.

All layers of the action head read images, words and the state, and their own actions never: keys and values are the
same at every step, so they are part of the prefill. What is added to the actions for the time is known before.

Visual tokens come first and words behind them, as `prompts` explains.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...runtime import UnavailableError
from ...runtime.buckets import bucket
from ...runtime.flow import integrate_forwards
from ...runtime.layers import DecoderLayer, Heads, Norm, normalise, require_plain, rotation_tables, score_mask
from ...runtime.phases import Rotation
from ...runtime.precision import in_bfloat16
from ..acting import Draws, Prepared
from ..positions import cell_numbers
from ..seam import Seam
from .prompts import visibility

# Of the prefill: see `runtime.Phases`.
VISION = ("tower",)
# Of the prompt, in the order of LeRobot's constants for them.
IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
# A layer of an MLP: weights [b, in, out] and biases [b, t or 1, out].
Layer = tuple[Tensor, Tensor]


class Asked(NamedTuple):
    """What LeRobot hands to the action head in the place of what the trunk made.

    Attributes:
        prepared: Images and batch.
        views: bool [b, v], as LeRobot marks which views are real.
        prompts: Instructions.
    """

    prepared: Prepared
    views: Tensor
    prompts: list[str]


class Seen(NamedTuple):
    """What the prefill gets.

    Attributes:
        images: [n * b, 3, height, width], prepared, camera by camera.
        tokens: int64 [b, l], the words of the prompt: all that is no image.
        images_before: int64 [b, l], how many views are in front of each, with those that the batch lacks.
        token_mask: bool [b, l], false for padding.
        instruction: int64 [b, l], for the sampler.
        instruction_mask: bool [b, l].
        state: [b, s], for the sampler.
        known_state: [b, s], as LeRobot gives it to the action head.
        kind: int64 [b], the kind of robot.
    """

    images: Tensor
    tokens: Tensor
    images_before: Tensor
    token_mask: Tensor
    instruction: Tensor
    instruction_mask: Tensor
    state: Tensor
    known_state: Tensor
    kind: Tensor


class Parts(NamedTuple):
    """Modules of a policy of which its phases are made: vision tower, projector, trunk and action head."""

    vision: Any
    projector: Any
    text: Any
    head: Any


class Prompt(NamedTuple):
    """How a policy writes its prompts and reads what the trunk makes of them.

    Attributes:
        views: v, how many there are, with those that the batch lacks.
        dense: Whether tokens have their positions among all visual tokens.
        pooled: Whether only what the trunk makes of the last word is read.
    """

    views: int
    dense: bool
    pooled: bool


class Known(NamedTuple):
    """What the prefill leaves for the steps.

    Attributes:
        keys_values: For each layer of the action head, keys and then values [b, 2 * h, p, d].
        mask: Added to the scores, [b, 1, 1, p].
        encode: Layers that make tokens of actions.
        decode: Layers that make velocities of the mean of the tokens.
    """

    keys_values: tuple[Tensor, ...]
    mask: Tensor
    encode: tuple[Layer, ...]
    decode: tuple[Layer, ...]


class _TowerLayer(nn.Module):
    """A layer of InternVL's vision tower, with queries, keys and values from one product."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.attention
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        for linear in projections:
            require_plain(linear)
        self.layer, self.heads = layer, attention.num_heads
        biases = [linear.bias for linear in projections if linear.bias is not None]
        self.weight = _fixed([linear.weight for linear in projections])
        self.bias = _fixed(biases) if biases else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[m, p, c] to the same shape."""
        layer, attention = self.layer, self.layer.attention
        heads = F.linear(layer.layernorm_before(hidden), self.weight, self.bias)
        queries, keys, values = heads.chunk(3, dim=-1)
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (attention.q_norm(queries), attention.k_norm(keys), values)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
        projected = attention.projection_layer(attended.transpose(1, 2).flatten(2))
        hidden = torch.addcmul(hidden, projected, layer.lambda_1)
        return torch.addcmul(hidden, layer.mlp(layer.layernorm_after(hidden)), layer.lambda_2)


def _fixed(weights: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat(weights).detach(), requires_grad=False)


class _Tower(nn.Module):
    """InternVL's vision tower."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.embeddings, self.norm = vision.embeddings, vision.layernorm
        self.layers = nn.ModuleList([_TowerLayer(layer) for layer in vision.encoder.layer])

    def forward(self, images: Tensor) -> Tensor:
        """Images [m, 3, height, width] to patches [m, rows, columns, c], without the class token."""
        hidden = self.embeddings(images)
        for layer in self.layers:
            hidden = layer(hidden)
        side = round((hidden.shape[1] - 1) ** 0.5)
        patches: Tensor = self.norm(hidden)[:, 1:].unflatten(1, (side, -1))
        return patches


class _Block(nn.Module):
    """A layer of the action head: attention to what is known, and an MLP.

    Args:
        block: LeRobot's.

    Raises:
        UnavailableError: If its attention does more than that.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attn
        plain = type(attention) is nn.MultiheadAttention and type(attention.out_proj) is NonDynamicallyQuantizableLinear
        if not plain or attention._forward_hooks or attention._forward_pre_hooks:
            raise UnavailableError(
                f"an attention of the action head is a {type(attention).__name__} with a "
                f"{type(attention.out_proj).__name__}, or has hooks, and only torch's own is taken apart"
            )
        self.attention, self.norm1, self.norm2, self.feed_forward = attention, block.norm1, block.norm2, block.ff

    def keys_values(self, tokens: Tensor) -> Tensor:
        """[b, p, c] to [b, 2 * h, p, d]."""
        attention, width = self.attention, tokens.shape[-1]
        both = F.linear(tokens, attention.in_proj_weight[width:], attention.in_proj_bias[width:])
        return both.unflatten(-1, (2 * attention.num_heads, -1)).transpose(1, 2)

    def forward(self, hidden: Tensor, keys_values: Tensor, mask: Tensor, shift: Tensor) -> Tensor:
        """Actions [b, t, c] through the layer, with `shift` [c] in the place of what the second norm adds."""
        attention, width = self.attention, hidden.shape[-1]
        queries = F.linear(self.norm1(hidden), attention.in_proj_weight[:width], attention.in_proj_bias[:width])
        queries = queries.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        keys, values = keys_values.chunk(2, dim=1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
        inner = F.layer_norm(hidden, (width,), self.norm2.weight, shift, self.norm2.eps)
        whole: Tensor = hidden + self.feed_forward(inner)
        return whole


class Prefill(nn.Module):
    """Vision tower, sampler, trunk, and what the action head makes of both before it sees an action.

    Args:
        parts: Of the policy.
        seam: Attached to it.
        cameras: Numbers of the cameras.
        prompt: How it is written and read.
        size: Dimensions of the robot's actions; those behind them stay zero.

    Raises:
        UnavailableError: If a layer does more than LeRobot's.
    """

    def __init__(self, parts: Parts, seam: Seam, cameras: list[int], prompt: Prompt, size: int) -> None:
        super().__init__()
        text, head = parts.text, parts.head
        self.seam, self.cameras, self.reducer, self.prompt = seam, cameras, seam.reducer, prompt
        self.tower, self.projector = _Tower(parts.vision), parts.projector
        self.token_dtype = next(parts.projector.parameters()).dtype
        self.embed_tokens, self.rotary = text.embed_tokens, text.rotary_emb
        layers = text.layers[: text.config.num_hidden_layers]
        sizes = text.config
        self.heads = Heads(sizes.num_attention_heads, sizes.num_key_value_heads, layers[0].self_attn.head_dim)
        self.layers = nn.ModuleList([_decoder(layer, self.heads) for layer in layers])
        norms = [*(layer.post_attention_layernorm for layer in layers), text.norm]
        self.scales: Tensor
        self.register_buffer("scales", torch.stack([norm.weight.detach().float() for norm in norms]), persistent=False)
        self.eps = text.norm.variance_epsilon
        self.head = head
        self.blocks: Any = nn.ModuleList([_Block(block) for block in head.transformer_blocks])
        for linear in _linears(head):
            require_plain(linear)
        self.acts: Tensor
        acts = torch.arange(head.per_action_dim, device=head.device) < size
        self.register_buffer("acts", acts.to(head.dtype), persistent=False)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        images_before: Tensor,
        token_mask: Tensor,
        instruction: Tensor,
        instruction_mask: Tensor,
        state: Tensor,
        known_state: Tensor,
        kind: Tensor,
    ) -> Known:
        """See `runtime.phases`."""
        batch = {
            OBS_LANGUAGE_TOKENS: instruction,
            OBS_LANGUAGE_ATTENTION_MASK: instruction_mask,
            OBS_STATE: state,
        }
        visual, places = self.seam.reduce(self.reducer, images, batch, self.cameras, self._encode, self.embed_tokens)
        counts = [camera.shape[1] for camera in visual]
        words = self.embed_tokens(tokens)
        hidden = torch.cat([torch.cat(visual, dim=1).to(words.dtype), words], dim=1)
        mask = score_mask(visibility(counts, images_before, token_mask), self.heads.keys, hidden.dtype)
        rotation = self._rotation(counts, places, images_before, hidden.dtype)
        *scales, last = self.scales.unbind()
        for layer, scale in zip(self.layers, scales, strict=True):
            hidden, _ = layer(hidden, rotation, mask, Norm(), Norm(scale))
        return self._known(normalise(hidden, Norm(last), self.eps), sum(counts), token_mask, known_state, kind)

    def _encode(self, images: Tensor) -> Tensor:
        """Images [m, 3, height, width] to visual tokens [m, H * W, c], each of some patches side by side."""
        patches = self.tower(images).to(self.token_dtype)
        (rows, columns), each = self.seam.layout.token_grid, patches.shape[1] // self.seam.layout.token_grid[0]
        blocks = patches.unflatten(2, (columns, each)).unflatten(1, (rows, each)).transpose(2, 3)
        tokens: Tensor = self.projector(blocks.flatten(3).flatten(1, 2))
        return tokens

    def _rotation(self, counts: list[int], places: list[Tensor], images_before: Tensor, dtype: torch.dtype) -> Rotation:
        grid, views = self.seam.layout.token_grid, self.prompt.views
        if self.prompt.dense:
            cells, virtual = [cell_numbers(place, grid) for place in places], [grid[0] * grid[1]] * views
        else:
            cells, virtual = [], counts + [max(counts)] * (views - len(counts))
        positions = _positions(counts, cells, virtual, images_before)
        # Not by the module itself: some checkpoints' reads the largest position back, to see if it is a long one.
        angles = positions[..., None] * self.rotary.inv_freq.float()
        both = torch.cat([angles, angles], dim=-1)
        scaling, heads = self.rotary.attention_scaling, self.heads
        cos, sin = ((table * scaling).to(dtype) for table in (both.cos(), both.sin()))
        return rotation_tables(cos, sin, heads.queries + heads.keys, heads.keys)

    def _known(self, hidden: Tensor, images: int, token_mask: Tensor, state: Tensor, kind: Tensor) -> Known:
        """Of all that the trunk made, float32 [b, p, c], behind so many visual tokens."""
        head, dtype = self.head, self.acts.dtype
        if self.prompt.pooled:
            order = torch.arange(token_mask.shape[1], device=token_mask.device)
            last = images + (token_mask * order).argmax(dim=1)
            hidden = hidden.take_along_dim(last[:, None, None], dim=1)
            real = torch.ones_like(token_mask[:, :1])
        else:
            real = F.pad(token_mask, (images, 0), value=True)
        embedded = head.state_encoder(state.to(dtype), kind)[:, None]
        context = torch.cat([hidden.to(dtype), embedded], dim=1)
        real = F.pad(real, (0, 1), value=True)
        weight, bias = _layer(head.mlp_head.fc2, kind)
        # A velocity of zero in all dimensions that the robot has not, whatever the action there.
        acts = self.acts.repeat(head.horizon)
        return Known(
            tuple(block.keys_values(context) for block in self.blocks),
            score_mask(real[:, None], 1, dtype),
            self._encode_actions(kind),
            (_layer(head.mlp_head.fc1, kind), (weight * acts, bias * acts)),
        )

    def _encode_actions(self, kind: Tensor) -> tuple[Layer, ...]:
        """The layers that make tokens of actions, without those that the robot has not."""
        encoder = self.head.action_encoder
        if encoder is None:
            weight, bias = _expanded(self.head.single_action_proj, len(kind))
            return ((weight * self.acts[:, None], bias),)
        (weight, bias), mix = _layer(encoder.W1, kind), _layer(encoder.W2, kind)
        places = encoder.pos_encoding(self.head.horizon).to(weight.dtype)
        return (weight * self.acts[:, None], bias), (mix[0], places @ mix[0] + mix[1]), _layer(encoder.W3, kind)


class Step(nn.Module):
    """The action head on noisy actions and what is known."""

    def __init__(self, head: Any, steps: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(block) for block in head.transformer_blocks])
        self.norm, self.pool = head.norm_out, head.seq_pool_proj if head.horizon > 1 else nn.Identity()
        times = head.time_pos_enc(1000)[0, _times(steps)].to(head.dtype)
        # What the second norms add at each step, [steps, layers, c].
        self.shifts: Tensor
        shifts = torch.stack([block.norm2.bias + times for block in head.transformer_blocks], dim=1)
        self.register_buffer("shifts", shifts.detach(), persistent=False)

    def forward(self, known: Known, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`; here the velocity leads from noise to actions."""
        hidden = _mlp(known.encode, x_t.to(self.shifts.dtype))
        shifts = self.shifts.index_select(0, step)[0].unbind()
        for block, keys_values, shift in zip(self.blocks, known.keys_values, shifts, strict=True):
            hidden = block(hidden, keys_values, known.mask, shift)
        pooled = self.pool(self.norm(hidden).flatten(1))
        return _mlp(known.decode, pooled[:, None]).view(x_t.shape)


def _decoder(layer: Any, heads: Heads) -> DecoderLayer:
    norm = layer.input_layernorm
    return DecoderLayer(layer, heads, norm.variance_epsilon, scale=norm.weight.float())


def _expanded(linear: nn.Linear, size: int) -> Layer:
    return linear.weight.t().expand(size, -1, -1), linear.bias.expand(size, 1, -1)


def _layer(linear: Any, kind: Tensor) -> Layer:
    """A linear layer of LeRobot's, of these kinds of robots."""
    if linear.num_categories <= 1:
        return _expanded(linear.linear, len(kind))
    return linear.weight[kind], linear.bias[kind][:, None]


def _linears(head: Any) -> list[Any]:
    """Linear layers of the action head whose weights are multiplied without them, where all robots share them."""
    encoder, decoder = head.action_encoder, head.mlp_head
    inner = [] if encoder is None else [encoder.W1, encoder.W2, encoder.W3]
    shared = [layer.linear for layer in (*inner, decoder.fc1, decoder.fc2) if layer.num_categories <= 1]
    return shared if inner else [head.single_action_proj, *shared]


def _mlp(layers: tuple[Layer, ...], hidden: Tensor) -> Tensor:
    *earlier, (weight, bias) = layers
    for inner, inner_bias in earlier:
        hidden = F.relu(torch.baddbmm(inner_bias, hidden, inner))
    return torch.baddbmm(bias, hidden, weight)


def _times(steps: int) -> list[int]:
    """Rows of the table of times, of the steps, by LeRobot's rule."""
    return [min(int(step / steps * 999), 999) for step in range(steps)]


def _positions(counts: list[int], cells: list[Tensor], virtual: list[int], images_before: Tensor) -> Tensor:
    """Positions float32 [b, p] of visual tokens and words, as `families.evo1.scattered_positions` numbers them.

    Args:
        counts: Visual tokens of each camera.
        cells: float32 [b, k] of each camera, which of the tokens of its view each is; none for the first ones.
        virtual: How many tokens each view is to have, also those that the batch lacks.
        images_before: Of `Seen`.
    """
    words = torch.arange(images_before.shape[1], device=images_before.device)
    found = []
    for view, count in enumerate(counts):
        first = (images_before <= view).sum(1, keepdim=True) + sum(virtual[:view])
        found.append(first + (cells[view] if cells else torch.arange(count, device=words.device)))
    for view, count in enumerate(virtual):
        words = words + count * (images_before > view)
    return torch.cat([*found, words], dim=1).float()


def parts_of(policy: Any) -> Parts:
    """The modules of a policy, in the precision in which LeRobot multiplies their weights.

    Raises:
        UnavailableError: If it reads another layer of the vision tower than the last.
    """
    vlm = policy.model.embedder.model
    read = vlm.config.vision_feature_layer, vlm.config.vision_feature_select_strategy
    if read != (-1, "default"):
        raise UnavailableError(
            f"it reads {read[1]} tokens of layer {read[0]} of its vision tower, and phases those of the last without "
            "the class token"
        )
    parts = Parts(vlm.vision_tower, vlm.multi_modal_projector, vlm.language_model, policy.model.action_head)
    if not policy._amp_enabled:
        return parts
    # LeRobot's autocast makes such copies, too, for each chunk anew.
    half = (next(part.parameters()).dtype == torch.bfloat16 for part in parts)
    return Parts(*(part if there else in_bfloat16(part) for part, there in zip(parts, half, strict=True)))


def get_action(policy: Any, seam: Seam, reduce: Callable[[Prepared], list[Tensor]], asked: Any, **given: Any) -> Tensor:
    """In place of `FlowmatchingActionHead.get_action`, whose arguments follow `reduce`.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        reduce: Prepared images to the tokens that LeRobot's own loop gets.
        asked: `Asked`, or what LeRobot's own trunk made.
        **given: LeRobot's other arguments.

    Returns:
        Actions [b, t * a].
    """
    head, runtime = policy.model.action_head, seam.runtime
    own = partial(type(head).get_action, head)
    if runtime is None or not isinstance(asked, Asked):
        actions: Tensor = own(asked, **given)
        return actions
    state, draws = given["state"], Draws(given["state"].device)
    shape = (len(state), head.horizon, head.per_action_dim)
    noise = torch.rand(len(state), head.action_dim, device=state.device, dtype=state.dtype) * 2 - 1
    noise = noise.view(shape) * given["action_mask"][:, None].to(noise.dtype)

    def eager() -> Tensor:
        # LeRobot draws the noise itself: the same once more.
        draws.again()
        with policy._maybe_autocast():
            tokens, mask = policy._compute_fused_tokens(asked.prompts, reduce(asked.prepared), asked.views)
            chunk: Tensor = own(tokens, **given | {"context_mask": mask})
        return chunk.view(shape)

    if any(IMAGE in prompt for prompt in asked.prompts):
        # LeRobot refuses it.
        return eager()
    cameras = seam.cameras_of(asked.prepared.batch)
    # It checks the kinds of robots.
    _, _, kind = head._prepare_context(state[:, None, :0], None, given["embodiment_id"], None)
    seen = _observe(policy, seam, asked, cameras, state, kind)
    guided = given["rtc_processor"] is not None
    # What LeRobot does under its own autocast the phases do with weights in bfloat16.
    plain = torch.autocast(state.device.type, enabled=False) if policy._amp_enabled else nullcontext()
    with plain:
        chunk = runtime.chunk(
            seen,
            noise,
            cameras=cameras,
            steps=head.num_inference_timesteps,
            eager=eager,
            loop=partial(_guided, head, draws, given) if guided else integrate_forwards,
        )
    return chunk.flatten(1)


def _observe(policy: Any, seam: Seam, asked: Asked, cameras: list[int], state: Tensor, kind: Tensor) -> Seen:
    """What the prefill gets; the words of the prompt, and of the instruction, are filled up to a bucket."""
    embedder, layout, batch = policy.model.embedder, seam.layout, asked.prepared.batch
    views, budget = asked.views.shape[1], seam.budget(cameras)
    visual = len(cameras) * layout.num_dense_tokens if budget is None else sum(budget[1])
    words = embedder.tokenizer(
        embedder._build_multimodal_prompts([[0] * views] * len(asked.prompts), asked.prompts),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=max(1, embedder.max_text_length - visual),
    )
    ids, mask = words["input_ids"], words["attention_mask"].bool()
    is_start = ids == embedder.tokenizer.convert_tokens_to_ids(START)
    begun = is_start.cumsum(1)
    # The token in front of a view's is not behind it. What looks like one later is text.
    images_before = begun.clamp(max=views) - (is_start & (begun <= views)).long()
    instruction = batch[OBS_LANGUAGE_TOKENS]
    size = bucket(max(ids.shape[1], instruction.shape[1]))
    more, device = (0, size - ids.shape[1]), state.device
    further = (0, size - instruction.shape[1])
    own = batch[OBS_STATE]
    return Seen(
        torch.cat(asked.prepared.images),
        F.pad(ids, more).to(device),
        F.pad(images_before, more, value=views).to(device),
        F.pad(mask, more).to(device),
        F.pad(instruction, further),
        F.pad(batch[OBS_LANGUAGE_ATTENTION_MASK], further),
        (own[:, -1] if own.ndim > 2 else own).to(device),
        state,
        kind,
    )


def _guided(head: Any, draws: Draws, given: dict[str, Any], velocity: Any, noise: Tensor, numbers: Tensor) -> Tensor:
    """LeRobot's own loop, with real-time chunking, in which the velocities are ours."""
    steps = iter(numbers.split(1))
    own = SimpleNamespace(
        action_dim=head.action_dim,
        per_action_dim=head.per_action_dim,
        horizon=head.horizon,
        num_inference_timesteps=len(numbers),
        dtype=noise.dtype,
        time_pos_enc=lambda length: noise.new_zeros(1, length, 1),
        transformer_blocks=(),
        norm_out=lambda hidden: hidden,
        seq_pool_proj=lambda pooled: pooled,
        mlp_head=lambda pooled, kind: pooled,
        _prepare_context=lambda *context: (noise, None, None),
        _expand_action_mask=head._expand_action_mask,
        _project_actions=lambda actions, kind: velocity(actions, next(steps)),
    )
    # It draws the noise itself: the same once more.
    draws.again()
    actions: Tensor = type(head).get_action(own, noise, **given)
    return actions.view(noise.shape)
