"""X-VLA: vision tower, sampler and BART; then the action transformer on noisy actions.

All tokens attend to each other, so no keys and values can be kept between steps but those of the first layer, whose
input is the same in all. The last layer makes the actions alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...runtime import FastRuntime
from ...runtime.layers import require_plain
from ..acting import Draws, Prepared
from ..position_embeddings import BART_OFFSET, dense_rows, places_of_views
from ..seam import Seam


class Seen(NamedTuple):
    """What the prefill gets.

    Attributes:
        images: float32 [n * b, 3, height, width], camera by camera.
        tokens: int64 [b, l], the instruction; padding is read, too.
        token_mask: bool [b, l], false for padding.
        state: float32 [b, s], the robot's.
        domain: int64 [b], the kind of robot.
    """

    images: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    domain: Tensor


class Known(NamedTuple):
    """What the prefill leaves for the steps.

    Attributes:
        context: What the actions are among, [b, p, c].
        queries_keys_values: Of the context in the first layer, [b, p, 3 * c].
        start: What is added to embedded actions at all steps, [b, t, c].
        of_time: And at each step, [b, steps, c].
        embed: Embeds actions of this kind of robot, [b, a, c].
        decode: And decodes them, [b, c, a].
        bias: [b, 1, a].
    """

    context: Tensor
    queries_keys_values: Tensor
    start: Tensor
    of_time: Tensor
    embed: Tensor
    decode: Tensor
    bias: Tensor


# Of the prefill: see `runtime.Phases`.
VISION = ("tower",)


class Prefill(nn.Module):
    """Vision tower, sampler, BART, and what the action transformer makes of both before it sees an action.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        cameras: Numbers of the cameras.
        steps: Of the denoising.
        project: (Florence-2's projector, a map [n, c, h, w]) to the mean of its cells and the cells [n, t, c], and
            (projector, such tokens) to projected ones.
    """

    def __init__(
        self,
        policy: Any,
        seam: Seam,
        cameras: list[int],
        steps: int,
        project: Callable[[Any, Tensor], Tensor],
    ) -> None:
        from lerobot.policies.xvla.soft_transformer import timestep_embedding

        super().__init__()
        model = policy.model
        self.seam, self.cameras, self.reducer = seam, cameras, seam.reducer
        self.project, self.tower = project, model.vlm.vision_tower
        self.vlm, self.transformer, self.space = model.vlm, model.transformer, model.action_space
        self.empty = max(0, (policy.config.num_image_views or 0) - len(cameras))
        # `keep_positions` was there.
        self.at_places = "forward" in vars(model.transformer)
        self.dtype, self.chunk_size = model._get_target_dtype(), model.chunk_size
        self.times: Tensor
        times = torch.tensor(_times(steps), dtype=self.dtype, device=model.transformer.pos_emb.device)
        self.register_buffer("times", timestep_embedding(times, model.transformer.dim_time), persistent=False)

    def forward(self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, domain: Tensor) -> Known:
        """See `runtime.phases`."""
        vlm, grid = self.vlm, self.seam.layout.token_grid
        batch = {OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: token_mask, OBS_STATE: state}
        embed = vlm.get_input_embeddings()
        views, coordinates = self.seam.reduce(self.reducer, images, batch, self.cameras, self._encode, embed)
        counts = [view.shape[1] for view in views]
        first, *others = self.project(vlm.multi_modal_projector, torch.cat(views, dim=1)).split(counts, dim=1)
        words: int = tokens.shape[1]
        segments: list[int | Tensor] = []
        if self.at_places and coordinates:
            main, *aside = places_of_views(coordinates, self.empty, max(counts), grid)
            segments = [main, words, *aside]
        read = self._read(torch.cat([first, embed(tokens)], dim=1), segments[:2])
        blank = first.new_zeros(len(first), self.empty * max(counts), first.shape[-1])
        return self._known(read, torch.cat([*others, blank], dim=1), segments, state.to(self.dtype), domain)

    def _encode(self, images: Tensor) -> Tensor:
        cells = self.tower(images.to(next(self.tower.parameters()).dtype)).last_hidden_state
        return self.project(self.vlm.multi_modal_projector, cells.to(self.dtype))

    def _read(self, hidden: Tensor, segments: list[int | Tensor]) -> Tensor:
        """View 0 and the instruction, [b, l, c], through BART."""
        encoder = self.vlm.language_model.encoder
        hidden = encoder.layernorm_embedding(
            hidden + self._rows(encoder.embed_positions.weight[BART_OFFSET:], segments, hidden)
        )
        for layer in encoder.layers:
            hidden = layer(hidden, None)
        return hidden

    def _rows(self, table: Tensor, segments: Sequence[int | Tensor], like: Tensor) -> Tensor:
        """Rows of a table of positions for tokens [b, l, c]."""
        if not segments:
            return table[None, : like.shape[1]]
        return dense_rows(table, segments, self.seam.layout.token_grid, len(like))

    def _known(self, read: Tensor, aside: Tensor, segments: list[int | Tensor], state: Tensor, domain: Tensor) -> Known:
        transformer, size = self.transformer, len(read)
        projections = (transformer.vlm_proj, transformer.aux_visual_proj)
        more = (domain,) if transformer.use_hetero_proj else ()
        context = torch.cat(
            [project(part, *more) for project, part in zip(projections, (read, aside), strict=True)], dim=1
        )
        chunk = context.new_zeros(size, self.chunk_size, context.shape[-1])
        segments = [self.chunk_size, *segments] if segments else []
        rows = self._rows(transformer.pos_emb[0], segments, torch.cat([chunk, context], dim=1))
        context = context + rows[:, self.chunk_size :]
        if transformer.len_soft_prompts > 0:
            prompts = transformer.soft_prompt_hub(domain).view(size, transformer.len_soft_prompts, -1)
            context = torch.cat([context, prompts], dim=1)

        encoder, decoder = transformer.action_encoder, transformer.action_decoder
        state, _ = self.space.preprocess(state, chunk[..., : transformer.dim_action])
        weight = encoder.fc(domain).view(size, encoder.input_size, encoder.output_size)
        embed, of_state, of_time = weight.split([transformer.dim_action, state.shape[-1], transformer.dim_time], dim=1)
        start = encoder.bias(domain)[:, None] + state[:, None] @ of_state + rows[:, : self.chunk_size]
        block = transformer.blocks[0]
        return Known(
            context,
            block.attn.qkv(block.norm1(context)),
            start,
            self.times @ of_time,
            embed,
            decoder.fc(domain).view(size, decoder.input_size, decoder.output_size),
            decoder.bias(domain)[:, None],
        )


class Step(nn.Module):
    """The action transformer on noisy actions and what is known."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks, self.norm, self.space = model.transformer.blocks, model.transformer.norm, model.action_space
        for block in (self.blocks[0], self.blocks[-1]):
            require_plain(block.attn.qkv)
            require_plain(block.attn.proj)

    def forward(self, known: Known, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`; the actions themselves, [b, t, a]."""
        _, noisy = self.space.preprocess(x_t, x_t)
        length = x_t.shape[1]
        start = known.start + known.of_time.index_select(1, step)
        actions = torch.baddbmm(start, noisy, known.embed)
        first, *middle = self.blocks
        heads = torch.cat([first.attn.qkv(first.norm1(actions)), known.queries_keys_values], dim=1)
        hidden = torch.cat([actions, known.context], dim=1)
        if not middle:
            return self._decode(known, _attend(first, hidden[:, :length], heads))
        hidden = _attend(first, hidden, heads)
        *middle, last = middle
        for block in middle:
            hidden = block(hidden)
        return self._decode(known, _attend(last, hidden[:, :length], last.attn.qkv(last.norm1(hidden))))

    def _decode(self, known: Known, hidden: Tensor) -> Tensor:
        return torch.baddbmm(known.bias, self.norm(hidden), known.decode)


def _attend(block: Any, hidden: Tensor, heads: Tensor) -> Tensor:
    """A block of the action transformer.

    Args:
        block: LeRobot's.
        hidden: Its first tokens, [b, t, c]: only these are gone on with.
        heads: Queries, keys and values of all its tokens, [b, p, 3 * c].

    Returns:
        [b, t, c].
    """
    attention = block.attn
    queries, keys, values = heads.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = attention.q_norm(queries[:, :, : hidden.shape[1]]), attention.k_norm(keys)
    attended = F.scaled_dot_product_attention(queries, keys, values)
    hidden = hidden + attention.proj(attended.transpose(1, 2).flatten(2))
    whole: Tensor = hidden + block.mlp(block.norm2(hidden))
    return whole


def generate_actions(
    policy: Any,
    seam: Seam,
    runtime: FastRuntime,
    reduce: Callable[[Prepared], Any],
    input_ids: Tensor,
    image_input: Any,
    image_mask: Tensor,
    domain_id: Tensor,
    proprio: Tensor,
    steps: int,
) -> Tensor:
    """In place of `XVLAModel.generate_actions`, whose arguments follow `reduce`.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        runtime: Has its phases.
        reduce: Prepared images to what LeRobot's own loop gets in their place.
        input_ids: int64 [b, l], the instruction.
        image_input: Images and batch, or what `reduce` makes of them where that was done already.
        image_mask: bool [b, views], which are real.
        domain_id: int64 [b], the kind of robot.
        proprio: float32 [b, s], the robot's state.
        steps: Of the denoising.

    Returns:
        Actions [b, t, a].
    """
    model = policy.model

    def own(views: Any) -> Tensor:
        actions: Tensor = type(model).generate_actions(model, input_ids, views, image_mask, domain_id, proprio, steps)
        return actions

    if not isinstance(image_input, Prepared):
        return own(image_input)
    model.eval()
    draws = Draws(proprio.device)
    shape = (len(input_ids), model.chunk_size, model.dim_action)
    noise = torch.randn(shape, device=proprio.device, dtype=model._get_target_dtype())

    def eager() -> Tensor:
        # LeRobot draws the noise itself: the same once more.
        draws.again()
        return own(reduce(image_input))

    cameras = seam.cameras_of(image_input.batch)
    real = image_input.batch.get(OBS_LANGUAGE_ATTENTION_MASK)
    real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.bool()
    return runtime.chunk(
        Seen(torch.cat(image_input.images[: len(cameras)]), input_ids, real, proprio, domain_id),
        noise,
        cameras=cameras,
        steps=max(1, int(steps)),
        eager=eager,
        loop=partial(_refine, model.action_space),
    )


def _refine(space: Any, predict: Any, noise: Tensor, numbers: Tensor) -> Tensor:
    """Predict the actions, each time from noise that has more of the last prediction in it."""
    x_t = actions = noise
    for index, number in enumerate(numbers.split(1), 1):
        actions = predict(x_t, number)
        share = 1 - index / len(numbers)
        x_t = noise * share + actions * (1 - share)
    # It may write to the actions, which on a GPU the next chunk overwrites, too.
    refined: Tensor = space.postprocess(actions.clone())
    return refined


def _times(steps: int) -> list[float]:
    """Of the steps, from 1 (noise)."""
    return [(steps - step) / steps for step in range(steps)]
