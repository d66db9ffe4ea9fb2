"""Token schedules over training."""

import math
import statistics

import pytest
from lerobot.configs import FeatureType, PolicyFeature

from driving import config_of
from lerobot_policy_grids import GridsPolicy, TinySmolVLAConfig
from lerobot_policy_grids.errors import BudgetError
from lerobot_policy_grids.schedule import TokenSchedule

FEATURES = {
    "input_features": {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (4,))},
}


def test_constant():
    assert {TokenSchedule("constant", 144, 16).at(step) for step in range(100)} == {16}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_going_down(schedule):
    budget = TokenSchedule(schedule, 144, 16, steps=1000)
    curve = [budget.at(step) for step in range(1000)]
    assert set(curve[:101]) == {144}
    assert set(curve[600:]) == {16}
    assert curve == sorted(curve, reverse=True)
    middle = {"linear": 80, "cosine": 80, "exponential": round(math.sqrt(144 * 16))}[schedule]
    assert abs(curve[350] - middle) <= 1
    quarter = {"linear": 112, "cosine": 144 - 128 * (1 - math.cos(math.pi / 4)) / 2, "exponential": 144 / 9**0.25}
    assert abs(curve[225] - quarter[schedule]) <= 1


def test_at_k_equal_n_every_schedule_that_goes_down_changes_nothing():
    for schedule in ("linear", "cosine", "exponential"):
        assert {TokenSchedule(schedule, 144, 144, steps=50).at(step) for step in range(60)} == {144}


def test_steps():
    budget = TokenSchedule("steps:0=144,500=64,1000=16", 144, 16)
    assert [budget.at(step) for step in (0, 499, 500, 999, 1000, 10**6)] == [144, 144, 64, 64, 16, 16]


def test_elastic_is_a_function_of_the_step_and_even_in_the_logarithm():
    one, two = TokenSchedule("elastic", 144, 16), TokenSchedule("elastic", 144, 16)
    drawn = [one.at(step) for step in range(4000)]
    assert drawn == [two.at(step) for step in range(4000)]
    assert (min(drawn), max(drawn)) == (1, 144)
    # log(K) of a log-uniform K: half of the draws lie below the square root of the range.
    assert statistics.median(drawn) == pytest.approx(math.sqrt(144), abs=1.5)
    assert {TokenSchedule("elastic:4,9", 144, 16).at(step) for step in range(100)} == {4, 9}
    between = {TokenSchedule("elastic:4-6", 144, 16).at(step) for step in range(200)}
    assert between == {4, 5, 6}


@pytest.mark.parametrize(
    "text",
    ["", "quadratic", "linear:3", "steps", "steps:500=16", "steps:0=x", "elastic:x", "elastic:4-", "constant:4"],
)
def test_what_cannot_be_read_is_refused_with_the_grammar(text):
    with pytest.raises(BudgetError, match=r"cannot be read|is unknown"):
        TokenSchedule(text, 144, 16)


@pytest.mark.parametrize("text", ["elastic:4,145", "elastic:0-9", "steps:0=145"])
def test_budgets_out_of_reach_are_refused(text):
    with pytest.raises(BudgetError, match=r"choose from 1 \.\. 144"):
        TokenSchedule(text, 144, 16)


@pytest.mark.parametrize(
    "text", ["constant", "linear", "cosine", "exponential", "steps:0=144,90=64", "elastic:4,9", "elastic:4-9"]
)
def test_all_budgets_of_a_run_are_known_without_running_it(text):
    budget = TokenSchedule(text, 144, 16, steps=700)
    assert budget.budgets() == {budget.at(step) for step in range(700)}


def test_the_budgets_of_the_longest_run_are_known_at_once():
    assert TokenSchedule("cosine", 144, 16, steps=10**9).budgets() == set(range(16, 145))
    with pytest.raises(BudgetError, match=r"over 1000000000000 steps; give 0 \.\. 1000000000"):
        TokenSchedule("cosine", 144, 16, steps=10**12)


def test_a_schedule_without_the_length_of_the_run_says_so_in_training():
    with pytest.raises(BudgetError, match="schedule_steps"):
        TokenSchedule("cosine", 144, 16).at(0)


def policy_of(**options):
    base = TinySmolVLAConfig(device="cpu", **FEATURES)
    return GridsPolicy(config_of(base, num_tokens=4, num_tokens_max=36, device="cpu", **options))


def test_lerobots_update_moves_the_budget_in_training_only():
    policy = policy_of(schedule="steps:0=36,2=9,3=4")
    assert policy.num_tokens == 4  # not in training yet
    policy.train()
    seen = []
    for _ in range(4):
        seen.append(policy.num_tokens)
        policy.update()
    assert seen == [36, 36, 9, 4]
    policy.eval()
    assert policy.num_tokens == 4


def test_the_step_is_saved_and_training_goes_on_from_it(tmp_path):
    policy = policy_of(schedule="steps:0=36,2=9,3=4").train()
    policy.update()
    policy.update()
    policy.save_pretrained(tmp_path)
    loaded = GridsPolicy.from_pretrained(tmp_path)
    assert loaded.num_tokens == 4
    assert loaded.train().num_tokens == 9


def test_camera_limits_that_make_no_sense_are_refused():
    base = TinySmolVLAConfig(device="cpu", **FEATURES)
    with pytest.raises(BudgetError, match="the policy's cameras are"):
        GridsPolicy(config_of(base, num_tokens=4, camera_tokens={"observation.images.none": 2}))
    name = next(iter(base.image_features))
    with pytest.raises(BudgetError, match="at least 1"):
        GridsPolicy(config_of(base, num_tokens=4, camera_tokens={name: 0}))


def test_budgets_that_could_do_nothing_are_refused():
    base = TinySmolVLAConfig(device="cpu", **FEATURES)
    with pytest.raises(BudgetError, match="nothing to come down from"):
        GridsPolicy(config_of(base, num_tokens=4, schedule="linear"))
    with pytest.raises(BudgetError, match="a blind policy, which has no visual tokens"):
        config_of(base, reducer="blind", schedule="elastic")
