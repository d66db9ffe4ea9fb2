"""Tampering takes an input away from the policy, that input only, and only while the evaluation runs."""

import json

import pytest
import torch

from lerobot_grids.choices import TAMPERINGS
from lerobot_grids.evaluation.rollouts import evaluate
from lerobot_grids.evaluation.tampering import (
    mean_state,
    other_instructions,
    parse_tamperings,
    shuffle_patches,
    tamper,
)
from lerobot_grids.policies import load
from lerobot_grids.simulation.environments import make_env_config
from lerobot_policy_grids.errors import SimulationError


def observation():
    torch.manual_seed(0)
    return {"observation.image": torch.rand(2, 3, 96, 96), "observation.state": torch.rand(2, 4), "task": ["push"] * 2}


@pytest.fixture(params=["grids", "dense"])
def loaded(request, grids_checkpoint, dense_checkpoint):
    return load(str(grids_checkpoint if request.param == "grids" else dense_checkpoint))


def spoiled(loaded, name, seed=0):
    with tamper([name], loaded.policy, loaded.preprocessor, "pull", seed) as spoil:
        return spoil(observation())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("image", ["observation.image"]),
        ("patches", ["observation.image"]),
        ("tokens", []),
        ("state", ["observation.state"]),
        ("instruction", ["task"]),
    ],
)
def test_one_input_is_spoiled_and_the_others_stay(grids_checkpoint, name, changed):
    before, after = observation(), spoiled(load(str(grids_checkpoint)), name)
    for key, value in before.items():
        same = value == after[key] if isinstance(value, list) else torch.equal(value, after[key])
        assert same == (key not in changed)


def test_what_is_put_in_its_place(loaded):
    assert spoiled(loaded, "image")["observation.image"].abs().max() == 0
    assert spoiled(loaded, "instruction")["task"] == ["pull", "pull"]
    # The mean state is what normalisation turns into zero.
    batch = loaded.preprocessor(spoiled(loaded, "state"))
    assert batch["observation.state"].abs().max() < 1e-5
    assert loaded.preprocessor(observation())["observation.state"].abs().max() > 0.1


def test_patches_change_places_and_nothing_else():
    images = torch.arange(2 * 3 * 20 * 33.0).view(2, 3, 20, 33)
    shuffled = shuffle_patches(images, torch.Generator().manual_seed(0))
    # 8 x 8 patches of 2 x 4 pixels; what is left over stays.
    assert torch.equal(shuffled[..., 16:, :], images[..., 16:, :])
    assert torch.equal(shuffled[..., 32:], images[..., 32:])

    def patches(batch):
        return {
            batch[0, 0, y : y + 2, x : x + 4].flatten().tolist().__repr__()
            for y in range(0, 16, 2)
            for x in range(0, 32, 4)
        }

    assert patches(shuffled) == patches(images)
    moved = (shuffled != images)[0, 0, :16:2, :32:4].sum()
    assert moved > 50
    again = shuffle_patches(images, torch.Generator().manual_seed(0))
    assert torch.equal(again, shuffled)


def test_tokens_are_shuffled_before_they_are_sampled(loaded):
    """The feature map in another order, and back to what it was afterwards."""
    policy = loaded.policy
    from lerobot_policy_grids.families import get_family

    base = getattr(policy, "base", policy)
    source = get_family(base.config.type).feature_source(base)
    maps = []
    # Runs before the tampering's hook, then after it.
    source.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))

    def act():
        policy.reset()
        torch.manual_seed(0)
        with torch.inference_mode():
            return policy.select_action(loaded.preprocessor(observation()))

    plain = act()
    with tamper(["tokens"], policy, loaded.preprocessor, "", 3):
        source.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))
        tampered = act()
    assert torch.equal(act(), plain)
    assert not torch.equal(tampered, plain)
    _, before, after = maps[:3]
    order = torch.randperm(144, generator=torch.Generator().manual_seed(3))
    assert torch.equal(after, before[:, order])


def test_the_next_different_instruction_is_taken():
    assert other_instructions(["a", "b", "b", "c"]) == ["b", "c", "c", "a"]
    with pytest.raises(SimulationError, match="every task here says 'a'"):
        other_instructions(["a", "a"])


def test_errors():
    assert parse_tamperings(None) == []
    assert parse_tamperings("image, state,image") == ["image", "state"]
    with pytest.raises(SimulationError, match="'smell' is unknown; choose from image, patches"):
        parse_tamperings("smell")

    class Nothing:
        steps = ()

    with pytest.raises(SimulationError, match="holds none"):
        mean_state(Nothing())


@pytest.mark.parametrize("name", TAMPERINGS)
def test_an_evaluation_is_tampered_with_and_says_so(grids_checkpoint, tmp_path, name):
    loaded = load(str(grids_checkpoint))
    config = make_env_config("metaworld", "push-v3,coffee-push-v3", {"max_steps": 2}, look_every=8)
    batches = []
    original = loaded.preprocessor
    loaded.preprocessor = type("Watched", (), {"steps": original.steps, "__call__": lambda s, o: watch(o)})()

    def watch(seen):
        batches.append(seen)
        return original(seen)

    evaluate(loaded, config, episodes=1, tampering=[name]).save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["tamper"] == [name]
    words = [batch["task"][0] for batch in batches]
    assert (words[0] == "Push a mug under a coffee machine") == (name == "instruction")
    assert (words[-1] == "Push the puck to a goal") == (name == "instruction")
    assert (batches[0]["observation.image"].max() == 0) == (name == "image")
    states = torch.cat([batch["observation.state"] for batch in batches])
    assert torch.equal(states[0], states[-1]) == (name == "state")
