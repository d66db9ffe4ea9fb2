"""The fast path of a policy of full depth acts as LeRobot's own loop does, with a third of its operations."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart
from lerobot_grids.profiling.operations import count_operations
from lerobot_policy_grids.families import get_family

# Operations of one action chunk with 2 cameras and 10 steps, at most. LeRobot's own loop has 10 453 to 11 717.
OPERATIONS = {"pi0": 3400, "pi05": 3950, "smolvla": 2900}
IMAGE, LONGEST = 112, 200


class Narrow:
    """A policy of full depth and few channels, wrapped with all its tokens at most."""

    def __init__(self, name, folder, cameras=2, **options):
        inputs = {
            f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)) for i in range(cameras)
        }
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        torch.manual_seed(0)
        self.dense = get_family(name).narrow(inputs, outputs, folder, **options).eval()
        self.most = get_family(name).layout(self.dense).num_dense_tokens
        self.policy = train_offsets(wrap(self.dense, 4, num_tokens_max=self.most))
        self.noise = torch.randn(2, 50, self.dense.config.max_action_dim)

    def batch(self, words, missing=()):
        """Two observations, with instructions of so many tokens."""
        torch.manual_seed(words)
        batch = {key: torch.rand(2, 3, IMAGE, IMAGE) for key in self.dense.config.image_features}
        batch["observation.state"] = torch.randn(2, 4)
        batch["observation.language.tokens"] = torch.randint(5, 90, (2, LONGEST))
        batch["observation.language.attention_mask"] = torch.arange(LONGEST).expand(2, -1) < torch.tensor(
            [[words], [3]]
        )
        return {name: value for number, (name, value) in enumerate(batch.items()) if number not in missing}

    def act(self, batch, **options):
        return self.policy.predict_action_chunk(dict(batch), noise=self.noise.clone(), **options)

    def both(self, batch):
        """(Actions of the slow path, which acts first, and of the fast path)."""
        self.policy.use_runtime("fast")
        return self.act(batch), self.act(batch)


@pytest.fixture(params=OPERATIONS, scope="module")
def narrow(request, tmp_path_factory):
    return Narrow(request.param, tmp_path_factory.mktemp("vlm") / "vlm")


@pytest.mark.parametrize(("k", "words", "missing"), [(1, 3, ()), (5, 20, (0,)), (None, 200, ())])
def test_fast_path_acts_as_the_slow_one(narrow, k, words, missing, capfd):
    narrow.policy.num_tokens = k or narrow.most
    batch = narrow.batch(words, missing)
    expected, found = narrow.both(batch)
    assert 0 < apart(expected, found) < ROUNDING
    assert "differs from the eager one by" in capfd.readouterr().err
    # What makes no difference would prove nothing.
    for name in ("observation.images.1", "observation.language.tokens"):
        changed = batch | {name: (batch[name] * 0.5).to(batch[name].dtype)}
        assert apart(expected, narrow.act(changed)) > 10 * ROUNDING, name


# Operations of one action chunk of the fast path, at most, and what LeRobot's own loop has, at least.
COUNTS = {"groot": (2500, 4500), "evo1": (3700, 6900)}


@pytest.mark.parametrize("name", COUNTS)
def test_others_act_with_fewer_operations(tmp_path, name):
    if name == "groot":
        pytest.importorskip("tree", reason="GR00T needs dm-tree")
    family = get_family(name)
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)) for i in range(2)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    policy = train_offsets(wrap(family.narrow(inputs, outputs, tmp_path).eval(), 4))
    seen = {key: torch.rand(1, 3, IMAGE, IMAGE) for key in policy.base.config.image_features}
    seen |= {"observation.state": torch.randn(1, 4), "observation.language.tokens": torch.full((1, 20), 7)}
    batch = family.complete(policy.base, seen)
    counts, chunks = {}, {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        act(policy, batch)
        with count_operations() as operations:
            chunks[runtime] = act(policy, batch)
        counts[runtime] = operations.total()
    assert 0 < apart(chunks["eager"], chunks["fast"]) < ROUNDING
    most, least = COUNTS[name]
    assert counts["fast"] < most
    assert counts["eager"] > least


def test_fast_path_has_a_third_of_the_operations(narrow):
    narrow.policy.num_tokens = 4
    batch = {name: value[:1] for name, value in narrow.batch(30).items()}
    narrow.noise = narrow.noise[:1]
    counts = {}
    for runtime in ("eager", "fast"):
        narrow.policy.use_runtime(runtime)
        narrow.act(batch)
        with count_operations() as operations:
            narrow.act(batch)
        counts[runtime] = operations.total()
    assert counts["fast"] < OPERATIONS[narrow.dense.config.type]
    assert counts["eager"] > 2.5 * counts["fast"]
