"""π0-FAST: Gemma writes action tokens behind the prefix. A step is Gemma on one token.

The keys and values of the tokens before it are in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime import Cache, Comparison, FastRuntime
from ...runtime.layers import Norm, normalise, score_mask
from ...runtime.phases import Rotation
from ..acting import Draws, Prepared, observe
from ..seam import Seam
from . import pi


class Prefill(pi.Prefill):
    """The prefill of π0, and the first token.

    The cache has room for their keys and values, and the scores [b, words] of the first token as its last tensor.
    """

    def __init__(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> None:
        super().__init__(policy, seam, cameras)
        trunk = policy.model.paligemma_with_expert.paligemma
        self.steps, self.eps, self.head = steps, trunk.model.language_model.norm.eps, trunk.lm_head
        self.begin = policy.model._paligemma_tokenizer.bos_token_id

    def forward(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Cache:
        """See `runtime.phases`."""
        begin = tokens.new_full((len(tokens), 1), self.begin)
        hidden, seen, rotation, later = self._prefix(images, image_mask, tokens, token_mask, state, begin)
        visible = score_mask(seen[:, None], self.heads.keys, self.dtype)
        *earlier, last = self.layers
        scales = self.scales.unbind()
        found = []
        for layer, scale in zip(earlier, scales, strict=False):
            hidden, own = layer(hidden, rotation, visible, Norm(), Norm(scale))
            found.append(own)
        # Of the last layer only the last token goes on.
        found.append(last.keys_values(hidden, rotation, Norm()))  # type: ignore[operator]
        at_end = Rotation(rotation.cos[:, -1:], rotation.sin[:, -1:])
        final, _ = last(hidden[:, -1:], at_end, visible, Norm(), Norm(scales[-2]), found[-1][:, :, :-1])
        room = found[-1].new_zeros(*found[-1].shape[:2], self.steps, found[-1].shape[-1])
        return Cache(
            tuple(torch.cat([own, room], dim=2) for own in found),
            score_mask(self._visible_later(seen), self.heads.keys, self.dtype),
            later,
            (_scores(self.head, normalise(final, Norm(scales[-1]), self.eps)),),
        )

    @property
    def _following(self) -> int:
        return self.steps

    def _visible_later(self, seen: Tensor) -> Tensor:
        """What each action token sees: the prefix, those before it, and itself, which comes last."""
        order = torch.arange(self.steps, device=seen.device)
        before = (order < order[:, None]).expand(len(seen), -1, -1)
        itself = before.new_ones(len(seen), self.steps, 1)
        return torch.cat([seen[:, None].expand(-1, self.steps, -1), before, itself], dim=2)


class Step(nn.Module):
    """Gemma on one action token, whose keys and values it writes into the cache."""

    scales: Tensor

    def __init__(self, policy: Any, steps: int) -> None:
        super().__init__()
        paligemma = policy.model.paligemma_with_expert.paligemma
        trunk = paligemma.model.language_model
        layers, _ = pi.decoder(trunk)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("scales", pi.later_scales(trunk), persistent=False)
        self.embed_tokens, self.head = trunk.get_input_embeddings(), paligemma.lm_head
        self.dtype, self.eps, self.steps = trunk.layers[0].self_attn.q_proj.weight.dtype, trunk.norm.eps, steps

    def forward(self, cache: Cache, token: Tensor, step: Tensor) -> Tensor:
        """Scores [b, words] of the token behind `token`, int64 [b, 1], which is the one with number `step`."""
        hidden = self.embed_tokens(token).to(self.dtype)
        rotation = Rotation(cache.rotation.cos.index_select(1, step), cache.rotation.sin.index_select(1, step))
        mask = cache.mask.index_select(2, step)
        *scales, last = self.scales.unbind()
        for layer, cached, scale in zip(self.layers, cache.keys_values, scales, strict=True):
            hidden, own = layer(hidden, rotation, mask, Norm(), Norm(scale), cached)
            cached.index_copy_(2, step + (cached.shape[2] - self.steps), own.to(cached.dtype))
        return _scores(self.head, normalise(hidden, Norm(last), self.eps))


def first_scores(cache: Cache, nothing: Tensor) -> Tensor:
    """Scores [b, words] of the first token, with which the steps start."""
    return cache.extra[-1]


def _scores(head: Any, hidden: Tensor) -> Tensor:
    """[b, 1, c] to [b, words], in the trunk's precision."""
    scores: Tensor = head(hidden.to(head.weight.dtype))
    return scores[:, -1]


def sample_tokens(
    policy: Any,
    seam: Seam,
    runtime: FastRuntime,
    reduce: Callable[[Prepared], list[Tensor]],
    prepared: Any,
    masks: list[Tensor],
    tokens: Tensor,
    token_mask: Tensor,
    max_decoding_steps: int | None = None,
    temperature: float = 0.0,
) -> Tensor:
    """In place of the `sample_actions_fast_kv_cache` of π0-FAST's model, whose arguments follow `reduce`.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        runtime: Has its phases.
        reduce: Prepared images to the tokens that LeRobot's own loop gets.
        prepared: Images and batch, or images alone where they are reduced already.
        masks: bool [b] of each image, whether it is real.
        tokens: int64 [b, l], the instruction.
        token_mask: bool [b, l].
        max_decoding_steps: Action tokens at most; None for the configuration's number.
        temperature: Of the draws; 0 takes the likeliest.

    Returns:
        Action tokens int64 [b, steps].
    """
    model = policy.model

    def own(images: list[Tensor]) -> Tensor:
        found: Tensor = type(model).sample_actions_fast_kv_cache(
            model, images, masks[: len(images)], tokens, token_mask, max_decoding_steps, temperature
        )
        return found

    if not isinstance(prepared, Prepared):
        return own(prepared)
    draws = Draws(tokens.device)

    # What the slow way wrote when the fast one is held against it, and how far that was from what the fast one prefers.
    written: list[Tensor] = []
    behind: list[float] = []

    def eager() -> Tensor:
        draws.again()
        written.append(own(reduce(prepared)))
        return written[-1]

    def loop(step: Any, scores: Tensor, numbers: Tensor) -> Tensor:
        draws.again()
        if written and temperature == 0:
            behind.append(_behind(step, scores, numbers, written[-1], end))
            return written[-1]
        return _write(step, scores, numbers, temperature, end)

    def share(found: Tensor, expected: Tensor) -> float:
        return behind[-1] if behind else float((found != expected).any())

    end = model._paligemma_tokenizer.convert_tokens_to_ids("|")
    cameras = seam.cameras_of(prepared.batch)
    observation = observe(prepared, masks, cameras, tokens, token_mask)
    steps = max_decoding_steps or model.config.max_action_tokens
    # A token, as which the steps take what they are given.
    nothing = tokens.new_zeros(len(tokens), 1)
    compare = Comparison("scores of the tokens", share)
    return runtime.chunk(observation, nothing, cameras=cameras, steps=steps, eager=eager, loop=loop, compare=compare)


def _behind(step: Any, scores: Tensor, numbers: Tensor, written: Tensor, end: int) -> float:
    """How far the tokens that were written are from the likeliest ones, at most, as a share of the range of the scores.

    Two tokens may be so close that rounding decides. All that follows would then differ, and show nothing.

    Args:
        step: As in `_write`.
        scores: As in `_write`.
        numbers: As in `_write`.
        written: Tokens int64 [b, steps], which are given to the steps.
        end: As in `_write`.
    """
    finished, worst = torch.zeros_like(written[:, 0], dtype=torch.bool), 0.0
    for index, number in enumerate(numbers.split(1), 1):
        token = written[:, index - 1 : index]
        best = scores.amax(-1)
        share = (best - scores.gather(1, token)[:, 0]) / (best - scores.amin(-1))
        worst = max(worst, float(share.masked_fill(finished, 0).max()))
        finished = finished | (token[:, 0] == end)
        if index == len(numbers) or bool(finished.all()):
            break
        scores = step(token, number)
    return worst


def _write(step: Any, scores: Tensor, numbers: Tensor, temperature: float, end: int) -> Tensor:
    """Action tokens int64 [b, steps], one by one, as LeRobot chooses them.

    Args:
        step: (token int64 [b, 1], its number) to the scores of the next token.
        scores: Of the first token, [b, words].
        numbers: int64 [steps].
        temperature: Of the draws; 0 takes the likeliest.
        end: After this token nothing is read; decoding stops when all have written it, unless it draws.
    """
    written = torch.zeros(len(scores), len(numbers), dtype=torch.int64, device=scores.device)
    finished = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for index, number in enumerate(numbers.split(1), 1):
        if temperature > 0:
            token = torch.multinomial(torch.softmax(scores / temperature, dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
            finished |= token[:, 0] == end
        written[:, index - 1] = token[:, 0]
        if index == len(numbers) or (temperature == 0 and bool(finished.all())):
            break
        scores = step(token, number)
    return written
