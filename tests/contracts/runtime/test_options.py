"""Runtime, precision and quantisation are options, and what cannot have them says so."""

from importlib.util import find_spec

import pytest
import torch

from driving import act, wrap
from fast_path import ROUNDING, apart
from lerobot_policy_grids import GridsConfig, compress
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.runtime import fast, quantised
from lerobot_policy_grids.runtime.precision import precisely


@pytest.mark.parametrize("name", ["eo1", "vla_jepa"])
def test_families_without_phases_say_so(family_row, name):
    policy = wrap(family_row(name).policy(), 4)
    with pytest.raises(UnsupportedPolicyError, match=f"not available for the '{name}' policy.*use runtime=eager"):
        policy.use_runtime("fast")
    # As it was before.
    assert policy.config.runtime == "auto"


def test_reducers_that_have_no_fast_path_say_so(pi0):
    policy, _ = pi0
    base = policy.detach()
    # One draws anew at each look, so that no two ways to act can be compared.
    for reducer in ("blind", "fastv", "random"):
        with pytest.raises(UnsupportedPolicyError, match="not available with reducer"):
            compress(base, None, reducer, runtime="fast")
        get_family(base.config.type).detach(base)


def test_runtime_is_an_option(family_row, tmp_path):
    base = family_row("tiny_smolvla").policy()
    policy = compress(base, 4, runtime="fast")
    assert policy.seam.runtime.name == "fast"
    policy.config.save_pretrained(tmp_path)
    assert GridsConfig.from_pretrained(tmp_path).runtime == "fast"
    with pytest.raises(GridsError, match="runtime 'quick' is unknown; choose one of auto, eager, fast, compiled"):
        policy.use_runtime("quick")


@pytest.fixture
def precision_of_a_new_process():
    """LeRobot sets another one, and leaves it, when it makes a policy that compiles itself."""
    with precisely("fp32"):
        yield


def seen_precision(policy, batch):
    """The precisions in which the sampler was called, and what the process has afterwards."""
    seen = []
    handle = policy.reducer.register_forward_hook(lambda *call: seen.append(torch.get_float32_matmul_precision()))
    act(policy, batch)
    act(policy, batch)
    handle.remove()
    return seen, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("precision", "inside", "bound"),
    [("own", "highest", 1e-4), ("fp32", "highest", 1e-4), ("tf32", "high", 2e-2), ("bf16", "high", 5e-2)],
)
@pytest.mark.usefixtures("precision_of_a_new_process")
def test_precision_of_products(pi0, precision, inside, bound):
    policy, batch = pi0
    policy.use_runtime("fast", precision=precision)
    assert policy.config.precision == precision
    # The eager path, against which the fast one is held, computes as float32.
    assert seen_precision(policy, batch) == (["highest", inside, inside], "highest")
    assert policy.seam.runtime._bound(torch.device("cpu")) == bound
    with precisely("tf32"):
        # Of the process: on a GPU "own" follows it.
        own = precision == "own"
        assert policy.seam.runtime._bound(torch.device("cuda")) == (2e-2 if own else bound)


def test_precision_that_is_none_or_has_no_runtime(pi0):
    policy, _ = pi0
    with pytest.raises(GridsError, match="precision 'fp8' is unknown; choose one of own, fp32, tf32, bf16"):
        policy.use_runtime("fast", precision="fp8")
    with pytest.raises(GridsError, match=r"precision=tf32 with runtime=eager.*give runtime=fast"):
        policy.use_runtime("eager", precision="tf32")


NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao: extra 'quantise' is not installed")


@NEEDS_TORCHAO
@pytest.mark.parametrize("quantisation", ["int8", "int8_dynamic"])
def test_weights_of_8_bits_act_nearly_as_the_policy(flowing, quantisation, capfd):
    policy, batch = flowing
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = act(policy, batch)
    policy.use_runtime("fast", quantisation)
    act(policy, batch)
    assert f"runtime=fast quantise={quantisation}: 2 cameras" in capfd.readouterr().err
    assert 10 * ROUNDING < apart(expected, act(policy, batch)) < fast.INT8_BOUND
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    policy.use_runtime("fast")
    act(policy, batch)
    assert policy.config.quantise == "none"
    assert apart(expected, act(policy, batch)) < ROUNDING


@NEEDS_TORCHAO
def test_weights_that_became_others_are_not_used(pi0, monkeypatch, caplog):
    policy, batch = pi0
    expected = act(policy, batch)
    own = quantised._quantised

    def wrong(linear, name):
        rolled = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        rolled.weight = torch.nn.Parameter(linear.weight.detach().roll(1, 0), requires_grad=False)
        rolled.register_parameter("bias", linear.bias)
        return own(rolled, name)

    monkeypatch.setattr(quantised, "_quantised", wrong)
    policy.use_runtime("fast", "int8")
    for _ in range(2):
        assert torch.equal(act(policy, batch), expected)
    assert "runtime=fast quantise=int8 is not used, the policy acts eagerly" in caplog.text


def test_quantisation_without_torchao_or_a_fast_runtime_says_so(pi0, monkeypatch, caplog):
    policy, batch = pi0
    with pytest.raises(GridsError, match=r"quantise=int8 with runtime=eager.*give runtime=fast"):
        policy.use_runtime("eager", "int8")
    with pytest.raises(GridsError, match="quantise 'int3' is unknown; choose one of none, int8, int8_dynamic"):
        policy.use_runtime("fast", "int3")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    expected = act(policy, batch)
    policy.use_runtime("fast", "int8")
    assert torch.equal(act(policy, batch), expected)
    assert "quantise=int8 needs torchao: pip install 'lerobot_policy_grids[quantise]'" in caplog.text
