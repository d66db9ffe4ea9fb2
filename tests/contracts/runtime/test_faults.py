"""A fast path that is wrong on purpose is found, and is not used."""

import sys

import pytest
import torch

from driving import act
from fast_path import FLOWS, small
from lerobot_policy_grids.families import acting
from lerobot_policy_grids.families.phases import act as act_phases
from lerobot_policy_grids.families.phases import evo1 as evo1_phases
from lerobot_policy_grids.families.phases import groot as groot_phases
from lerobot_policy_grids.families.phases import pi as pi_phases
from lerobot_policy_grids.families.phases import pi_fast, prompts
from lerobot_policy_grids.families.phases import smolvla as smolvla_phases
from lerobot_policy_grids.families.phases import xvla as xvla_phases
from lerobot_policy_grids.runtime import buckets, flow, layers
from lerobot_policy_grids.runtime.phases import Rotation

WRONG = {
    "positions": (layers, "rotate", lambda heads, rotation: heads),
    "mask": (layers, "score_mask", lambda visible, groups, dtype: torch.zeros(1, 1, 1, visible.shape[-1], dtype=dtype)),
    "times": (flow, "step_times", lambda steps, device: torch.linspace(0, 1, steps)),
    "steps": (flow, "integrate", lambda velocity, noise, numbers: noise - velocity(noise, numbers[:1])),
}
_keys_values, _to_bucket, _unrotated = layers.prefix_keys_values, buckets.to_bucket, layers.DecoderLayer._unrotated
_prefix, _prefix_of_smolvla = pi_phases.Prefill._prefix, smolvla_phases.Prefill._prefix


def _last_layer_of_the_first_input(every, hidden, rotation, mask, scales):
    *earlier, last = every
    return [
        *_keys_values(earlier, hidden, rotation, mask, scales),
        last.keys_values(hidden, rotation, layers.Norm()),
    ]


def _with_padding_read(tokens, mask):
    tokens, mask = _to_bucket(tokens, mask)
    return tokens, torch.ones_like(mask)


def _without_the_last_word(tokens, mask):
    tokens, mask = _to_bucket(tokens, mask)
    return tokens, mask & mask.roll(-1, 1)


def _projected_in_another_order(self, *given):
    handle = self.projector.register_forward_hook(lambda module, inputs, output: output.flip(1))
    try:
        return _prefix(self, *given)
    finally:
        handle.remove()


def _other_special_tokens(self, *given):
    self.special = self.special.roll(1)
    return _prefix_of_smolvla(self, *given)


# Of one family, where what is rewritten is shared by others.
WRONG_PI0 = {
    "last layer": (layers, "prefix_keys_values", _last_layer_of_the_first_input),
    "padding of the bucket": (buckets, "to_bucket", _with_padding_read),
    "length of the bucket": (buckets, "to_bucket", _without_the_last_word),
    "joined products": (layers.DecoderLayer, "_unrotated", lambda self, *given: _unrotated(self, *given).roll(1, 2)),
    "scaling": (layers, "attend", lambda queries, *more, own=layers.attend: own(queries * 2, *more)),
    "projector behind the sampler": (pi_phases.Prefill, "_prefix", _projected_in_another_order),
    "the state": (
        pi_phases.Prefill,
        "_embed_state",
        lambda self, state, own=pi_phases.Prefill._embed_state: own(self, state * 0),
    ),
    "what the state sees": (
        pi_phases.Prefill,
        "_visible_later",
        lambda self, seen: torch.cat([seen, seen.new_ones(len(seen), self._following)], dim=1)[:, None],
    ),
}
WRONG_SMOLVLA = {
    "last layer": WRONG_PI0["last layer"],
    "constant keys": (smolvla_phases._Projection, "forward", lambda self, keys_values: keys_values),
    "special tokens": (smolvla_phases.Prefill, "_prefix", _other_special_tokens),
}
WRONG_ACT = {
    "positions": (act_phases._Attention, "keys_values", lambda self, tokens, positions: self.project(tokens, 1, 2)),
    "queries": (act_phases.Decode, "_among_themselves", lambda self, number, hidden: hidden),
    "layers": (act_phases, "_feed_forward", lambda layer, hidden: hidden),
}
WRONG_XVLA = {
    "positions": (xvla_phases.Prefill, "_rows", lambda self, table, segments, like: torch.zeros_like(like)),
    "instruction": (xvla_phases.Prefill, "_read", lambda self, hidden, segments: hidden),
    "times": (xvla_phases, "_times", lambda steps: [1.0] * steps),
    "steps": (xvla_phases, "_refine", lambda space, predict, noise, at: space.postprocess(predict(noise, at[:1]))),
    "first layer": (xvla_phases, "_attend", lambda block, hidden, heads: hidden),
}
WRONG_PI0_FAST = {
    "positions": WRONG["positions"],
    "what is visible": (pi_fast, "score_mask", lambda visible, *more: torch.zeros(1, 1, *visible.shape[1:])),
    "written tokens": (pi_fast.Step, "forward", lambda self, cache, token, step: cache.extra[-1]),
    "order": (pi_fast, "Rotation", lambda cos, sin: Rotation(cos[:, :1] * 0, sin[:, :1] * 0)),
}
_observe_groot = groot_phases._observe


def _all_visible(counts, before, mask):
    length = sum(counts) + mask.shape[1]
    return mask.new_ones(len(mask), length, length)


def _with_padding_for_words(*given):
    seen = _observe_groot(*given)
    return seen._replace(token_exists=torch.ones_like(seen.token_exists))


WRONG_GROOT = {
    "padding": (groot_phases, "_observe", _with_padding_for_words),
    "positions": (groot_phases, "_positions", lambda counts, *more: torch.zeros(3, 1, sum(counts) + 16)),
    "what is visible": (prompts, "visibility", _all_visible),
    "features of earlier layers": (groot_phases.Prefill, "_added", lambda self, *more: ()),
    "images for words": (groot_phases, "reads_words", lambda transformer, number: number > 0),
    "times": (groot_phases, "_times", lambda head, steps: torch.zeros(steps, dtype=torch.int64)),
    "steps": (flow, "integrate_forwards", lambda velocity, noise, numbers: noise + velocity(noise, numbers[:1])),
}
_observe_evo1 = evo1_phases._observe


def _changed(**changes):
    """EVO1's observation with some of it changed."""

    def observe(*given):
        seen = _observe_evo1(*given)
        return seen._replace(**{name: change(getattr(seen, name)) for name, change in changes.items()})

    return observe


_known, _mlp, _of_context = evo1_phases.Prefill._known, evo1_phases._mlp, evo1_phases._Block.keys_values


def _for_other_actions(self, *given):
    self.acts = torch.ones_like(self.acts)
    return _known(self, *given)


WRONG_EVO1 = {
    "padding": (evo1_phases, "_observe", _changed(token_mask=torch.ones_like)),
    "the state": (evo1_phases, "_observe", _changed(known_state=lambda state: state + 10)),
    "positions": (
        evo1_phases,
        "_positions",
        lambda counts, cells, virtual, before: torch.zeros(len(before), sum(counts) + before.shape[1]),
    ),
    "what is visible": WRONG_GROOT["what is visible"],
    "values for keys": (evo1_phases._Block, "keys_values", lambda self, tokens: _of_context(self, tokens).flip(1)),
    "times": (evo1_phases, "_times", lambda steps: [0] * steps),
    "steps": WRONG_GROOT["steps"],
    "hidden layers": (evo1_phases, "_mlp", lambda layers, hidden: _mlp((layers[0], *layers[-1:]), hidden)),
    "dimensions of the robot": (evo1_phases.Prefill, "_known", _for_other_actions),
}
FAULTS = [(name, fault) for name in FLOWS for fault in WRONG.items()]
FAULTS += [("pi0", fault) for fault in WRONG_PI0.items()]
FAULTS += [("tiny_smolvla", fault) for fault in WRONG_SMOLVLA.items()]
FAULTS += [("act", fault) for fault in WRONG_ACT.items()]
FAULTS += [("evo1", fault) for fault in WRONG_EVO1.items()]
FAULTS += [("groot", fault) for fault in WRONG_GROOT.items()]
FAULTS += [("pi0_fast", fault) for fault in WRONG_PI0_FAST.items()]
FAULTS += [("xvla", fault) for fault in WRONG_XVLA.items()]
# Without which a policy does not do what goes wrong.
OPTIONS = {"special tokens": {"add_image_special_tokens": True}}


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_wrong_fast_path_is_found_and_not_used(family_row, name, fault, monkeypatch, caplog):
    policy, batch = small(family_row(name), **OPTIONS.get(fault[0], {}))
    expected = act(policy, batch)
    module, attribute, wrong = fault[1]
    policy.use_runtime("fast")
    with monkeypatch.context() as patch:
        phases = [module for name, module in sys.modules.items() if ".families.phases." in name]
        for place in (module, acting, sys.modules[type(policy.family).__module__], *phases):
            patch.setattr(place, attribute, wrong, raising=False)
        for _ in range(2):
            assert torch.equal(act(policy, batch), expected)
    (found,) = policy.seam.runtime.differences.values()
    assert "of the range of the" in found
    assert caplog.text.count("is not used, the policy acts eagerly") == 1
