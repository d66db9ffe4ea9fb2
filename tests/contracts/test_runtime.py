"""The fast path acts as the slow one does, says how far it is off, and steps back where it is not the same."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from driving import act, train_offsets, wrap
from lerobot_grids.profiling.operations import count_operations
from lerobot_policy_grids import GridsConfig, compress
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import acting, get_family
from lerobot_policy_grids.families import seam as seams
from lerobot_policy_grids.families.phases import act as act_phases
from lerobot_policy_grids.families.phases import pi_fast
from lerobot_policy_grids.families.phases import xvla as xvla_phases
from lerobot_policy_grids.runtime import buckets, fast, flow, graphs, layers, program, quantised
from lerobot_policy_grids.runtime.phases import Rotation
from lerobot_policy_grids.runtime.precision import precisely

# Share of the range of the actions. Both paths are float32 and round in other places; 2e-7 was measured.
ROUNDING = 3e-6
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


def apart(one, other):
    """Largest difference as a share of the range."""
    return float((one - other).abs().max() / (one.max() - one.min()))


@pytest.fixture(params=OPERATIONS, scope="module")
def narrow(request, tmp_path_factory):
    return Narrow(request.param, tmp_path_factory.mktemp("vlm") / "vlm")


def small(row):
    """A small policy, and a batch."""
    policy = row.policy(2)
    # ACT's biases and the statistics of its norms start at what makes no difference.
    for name, value in [*policy.model.named_parameters(), *policy.model.named_buffers()] * (row.policy_type == "act"):
        if name.endswith(("bias", "running_mean", "running_var")):
            value.data += 0.3 * torch.rand_like(value)
    return train_offsets(wrap(policy, 5)), row.batch(policy)


FLOWS = ("pi0", "pi05", "tiny_smolvla")


@pytest.fixture(params=[*FLOWS, "act", "xvla", "pi0_fast"])
def phased(request, family_row):
    """A small policy whose family has phases, and a batch."""
    return small(family_row(request.param))


@pytest.fixture(params=FLOWS)
def flowing(request, family_row):
    """The same, of a family whose phases are of LeRobot's common loop."""
    return small(family_row(request.param))


@pytest.fixture
def pi0(family_row):
    """One of them, where one is enough."""
    return small(family_row("pi0"))


@pytest.fixture
def built(monkeypatch):
    """Collects (phases, observation, noise) of each program."""
    found = []
    make = program.Program.__init__

    def spy(self, phases, steps, observation, noise, **options):
        found.append((phases, observation, noise))
        make(self, phases, steps, observation, noise, **options)

    monkeypatch.setattr(program.Program, "__init__", spy)
    return found


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


WRONG = {
    "positions": (layers, "rotate", lambda heads, rotation: heads),
    "mask": (layers, "score_mask", lambda visible, groups, dtype: torch.zeros(1, 1, 1, visible.shape[-1], dtype=dtype)),
    "times": (flow, "step_times", lambda steps, device: torch.linspace(0, 1, steps)),
    "steps": (flow, "integrate", lambda velocity, noise, numbers: noise - velocity(noise, numbers[:1])),
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
FAULTS = [(name, fault) for name in FLOWS for fault in WRONG.items()]
FAULTS += [("act", fault) for fault in WRONG_ACT.items()]
FAULTS += [("pi0_fast", fault) for fault in WRONG_PI0_FAST.items()]
FAULTS += [("xvla", fault) for fault in WRONG_XVLA.items()]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_wrong_fast_path_is_found_and_not_used(family_row, name, fault, monkeypatch, caplog):
    policy, batch = small(family_row(name))
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


def test_one_check_for_each_shape(flowing):
    policy, batch = flowing
    policy.use_runtime("fast")
    checked = policy.seam.runtime.differences
    language = "observation.language.tokens", "observation.language.attention_mask"

    def of_length(length):
        return {name: batch[name].repeat(1, 40)[:, :length] for name in language}

    for change, count in (
        ({}, 1),
        (of_length(7), 1),
        (of_length(16), 1),
        (of_length(17), 2),
        (of_length(32), 2),
        ({"observation.images.1": None}, 3),
    ):
        given = {name: value for name, value in (batch | change).items() if value is not None}
        act(policy, given)
        assert len(checked) == count, change
    policy.num_tokens = 3
    act(policy, batch)
    assert len(checked) == 4
    assert all(isinstance(found, float) for found in checked.values())


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (48, 48), (129, 200), (201, 256)])
def test_buckets(length, size):
    tokens = torch.arange(1, 301).expand(2, -1)
    mask = torch.arange(300).expand(2, -1) < torch.tensor([[length], [1]])
    cut, cut_mask = buckets.to_bucket(tokens, mask)
    assert cut.shape == cut_mask.shape == (2, size)
    assert torch.equal(cut[:, :length], tokens[:, :length])
    assert cut_mask.sum() == length + 1
    padded, _ = buckets.to_bucket(tokens[:, :length], mask[:, :length])
    assert padded.shape == (2, size)


def change_in_place(policy):
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if any(part in name for part in ("q_proj", "layernorm", "in_proj", "norm1")):
                weight.mul_(1.5)


def load_others(policy):
    policy.load_state_dict(
        {name: value * 1.2 if "proj" in name else value for name, value in policy.state_dict().items()}
    )


def replace_data(policy):
    for weight in policy.parameters():
        weight.data = weight.data * 1.1


def train_a_step(policy):
    policy.train()
    change_in_place(policy)
    policy.eval()


@pytest.mark.parametrize("change", [change_in_place, load_others, replace_data, train_a_step])
def test_weights_that_changed_are_noticed(phased, change):
    policy, batch = phased
    policy.use_runtime("fast")
    before = [act(policy, batch) for _ in range(2)][1]
    change(policy)
    after = [act(policy, batch) for _ in range(2)][1]
    policy.use_runtime("eager")
    expected = act(policy, batch)
    assert apart(expected, after) < ROUNDING
    assert apart(expected, before) > 10 * ROUNDING


def test_without_noticing_old_weights_would_act(pi0, monkeypatch):
    policy, batch = pi0
    policy.use_runtime("fast")
    act(policy, batch)
    monkeypatch.setattr(fast, "mark", lambda *modules: ())
    act(policy, batch)
    change_in_place(policy)
    found = act(policy, batch)
    policy.use_runtime("eager")
    assert apart(act(policy, batch), found) > 10 * ROUNDING


class NoReading(TorchDispatchMode):
    """Fails where a value is read back, or a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


def run_phases(phases, observation, noise, wrapped=lambda phase, *inputs: phase):
    """(Cache, velocity), each phase wrapped with its inputs."""
    number = torch.tensor([1])
    cache = wrapped(phases.prefill, *observation)(*observation)
    return cache, wrapped(phases.denoise_step, cache, noise, number)(cache, noise, number)


def exported(phase, *inputs):
    return torch.export.export(phase, inputs, strict=False).module()


def compiled(phase, *inputs):
    return torch.compile(phase, fullgraph=True, dynamic=False, backend="eager")


@torch.no_grad()
def test_phases_read_nothing_back_and_are_whole_graphs(phased, built):
    policy, batch = phased
    policy.use_runtime("fast")
    act(policy, batch)
    ((phases, observation, noise),) = built
    with NoReading():
        cache, velocity = run_phases(phases, observation, noise)
    for wrapped in (exported, compiled):
        torch.compiler.reset()
        other_cache, other = run_phases(phases, observation, noise, wrapped)
        assert torch.equal(other, velocity)
        assert all(map(torch.equal, tree_leaves(other_cache), tree_leaves(cache)))


@torch.no_grad()
def test_a_phase_that_reads_a_value_is_found(pi0, built, monkeypatch):
    policy, batch = pi0
    policy.use_runtime("fast")
    act(policy, batch)
    ((phases, observation, noise),) = built
    gather = seams.gather_context

    def reading(condition_on, batch, **options):
        assert float(batch["observation.state"].abs().max()) >= 0
        return gather(condition_on, batch, **options)

    monkeypatch.setattr(seams, "gather_context", reading)
    torch.compiler.reset()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        run_phases(phases, observation, noise)
    for wrapped in (exported, compiled):
        with pytest.raises(Exception, match=r"data-dependent|scalar|Unsupported"):
            run_phases(phases, observation, noise, wrapped)


def test_queues_and_noise_are_lerobots(phased):
    policy, batch = phased
    runs = {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        policy.warm_up(batch)
        policy.reset()
        torch.manual_seed(5)
        steps = policy.config.n_action_steps + 2
        runs[runtime] = torch.stack([policy.select_action(dict(batch)) for _ in range(steps)])
    assert apart(runs["eager"], runs["fast"]) < ROUNDING


def test_warming_up_draws_nothing(pi0):
    policy, batch = pi0
    policy.use_runtime("fast")
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    policy.warm_up(batch)
    assert len(policy.seam.runtime.differences) == 1
    assert torch.equal(torch.rand(3), expected)


def test_real_time_chunking_guides_the_fast_velocities(flowing):
    policy, batch = flowing
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    policy.init_rtc_processor()
    left_over = torch.randn(len(batch["observation.state"]), 6, policy.base.config.max_action_dim)
    found = {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        for _ in range(2):
            torch.manual_seed(4)
            found[runtime] = policy.predict_action_chunk(
                dict(batch), inference_delay=1, prev_chunk_left_over=left_over, execution_horizon=4
            )
    torch.manual_seed(4)
    free = policy.predict_action_chunk(dict(batch))
    assert isinstance(next(iter(policy.seam.runtime.differences.values())), float)
    assert apart(found["eager"], found["fast"]) < ROUNDING
    assert apart(free, found["fast"]) > 10 * ROUNDING


@pytest.mark.parametrize("situation", ["dense position ids", "every token", "detached", "copied"])
def test_fast_path_in_other_situations(phased, family_row, situation):
    policy, batch = phased
    if situation == "dense position ids":
        policy = train_offsets(wrap(policy.detach(), 5, position_ids="dense"))
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    if situation == "every token":
        with policy.looking_everywhere():
            found = [act(policy, batch) for _ in range(2)][1]
            policy.use_runtime("eager")
            assert apart(act(policy, batch), found) < ROUNDING
        assert apart(expected, found) > 10 * ROUNDING
    elif situation == "detached":
        base = policy.detach()
        assert "sample_actions" not in vars(base.model)
        act(base, batch)
    elif situation == "copied":
        try:
            twin = copy.deepcopy(policy)
        except AttributeError:
            pytest.skip("LeRobot's class of this policy holds classes defined in functions, so no copy can be made")
        change_in_place(twin)
        assert apart(expected, [act(twin, batch) for _ in range(2)][1]) > 10 * ROUNDING
        assert apart(expected, act(policy, batch)) < ROUNDING
    else:
        assert apart(expected, act(policy, batch)) < ROUNDING


@torch.no_grad()
def test_fast_path_samples_inside_the_tower_too(tower_family, built):
    policy = tower_family.policy(2)
    batch = tower_family.batch(policy)
    policy = train_offsets(wrap(policy, 4, sample_after_layer=1))
    expected = act(policy, batch)
    try:
        policy.use_runtime("fast")
    except UnsupportedPolicyError:
        return
    act(policy, batch)
    assert apart(expected, act(policy, batch)) < ROUNDING
    ((phases, observation, noise),) = built
    with NoReading():
        _, velocity = run_phases(phases, observation, noise)
    torch.compiler.reset()
    assert torch.equal(run_phases(phases, observation, noise, compiled)[1], velocity)
    assert torch.equal(run_phases(phases, observation, noise, exported)[1], velocity)


VARIANTS = {
    "special tokens": {"add_image_special_tokens": True},
    "layers that all attend to the actions": {"attention_mode": "self_attn"},
    "layers that attend to the prefix alone": {"self_attn_every_n_layers": 0},
    "fewer layers in the expert": {"num_expert_layers": 1},
    "half precision in the trunk": {},
    "a masked image": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_one_family(family_row, variant):
    row = family_row("tiny_smolvla")
    base = row.policy(2, **VARIANTS[variant])
    policy, batch, bound = train_offsets(wrap(base, 5)), row.batch(base), ROUNDING
    if variant == "half precision in the trunk":
        base.model.vlm_with_expert.vlm.to(torch.bfloat16)
        bound = fast.BOUNDS[torch.bfloat16] / 2
    if variant == "a masked image":
        unmasked = act(policy, batch)
        batch["observation.images.1_padding_mask"] = torch.tensor([True, False, True])
        assert apart(unmasked, act(policy, batch)) > 10 * ROUNDING
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    assert all(isinstance(found, float) for found in policy.seam.runtime.differences.values())
    assert apart(expected, act(policy, batch)) < bound


VARIANTS_OF_XVLA = {
    "an empty view": {"num_image_views": 3},
    "projections of each kind of robot": {"use_hetero_proj": True},
    "positions of the first tokens": {},
    "no state": {"use_proprio": False},
    "one layer": {"depth": 1},
    "one step": {"num_denoising_steps": 1},
    "a gripper": {"action_mode": "joint", "max_state_dim": 14},
    "half precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", ["draws", "an end", "half precision", "dense position ids"])
def test_variants_of_pi0_fast(family_row, variant, monkeypatch):
    row = family_row("pi0_fast")
    base = row.policy(2, temperature=0.7 if variant == "draws" else 0.0, max_decoding_steps=9)
    options = {"position_ids": "dense"} if variant == "dense position ids" else {}
    policy, batch = train_offsets(wrap(base, 5, **options)), row.batch(base)
    written, decode = [], base.model.sample_actions_fast_kv_cache
    monkeypatch.setattr(base, "detokenize_actions", lambda tokens, **shape: written.append(tokens) or tokens * 1.0)
    if variant == "half precision":
        base.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    assert decode.__func__ is type(base.model).sample_actions_fast_kv_cache
    act(policy, batch)
    if variant == "an end":
        # A token that it did not write before.
        batch = {name: value[:1] for name, value in batch.items()}
        row = written[0][0].tolist()
        stop = next(place for place in range(1, 9) if row[place] not in row[:place])
        tokenizer = base.model._paligemma_tokenizer
        monkeypatch.setattr(tokenizer, "convert_tokens_to_ids", lambda word: row[stop], raising=False)
        written.clear()
        act(policy, batch)
        assert written[0][0, stop] == row[stop]
        assert not written[0][0, stop + 1 :].any()
    policy.use_runtime("fast")
    after = []
    for _ in range(2):
        act(policy, batch)
        after.append(torch.rand(1))
    (found,) = policy.seam.runtime.differences.values()
    # In half precision rounding decides between tokens; what the slow path wrote must still be nearly the likeliest.
    assert found < fast.BOUNDS[torch.bfloat16] if variant == "half precision" else found == 0
    assert torch.equal(written[0], written[1])
    assert variant == "half precision" or torch.equal(written[0], written[2])
    assert torch.equal(*after)
    assert (written[0] != 0).sum() > 1


@pytest.mark.parametrize("variant", VARIANTS_OF_XVLA)
def test_variants_of_xvla(family_row, variant):
    row = family_row("xvla")
    base = row.policy(2, **VARIANTS_OF_XVLA[variant])
    options = {"position_ids": "consecutive"} if variant == "positions of the first tokens" else {}
    policy, batch = train_offsets(wrap(base, 5, **options)), row.batch(base) | {"domain_id": torch.tensor([1, 0, 1])}
    other = batch | {"domain_id": torch.tensor([0, 0, 0])}
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    bound = fast.BOUNDS[torch.bfloat16] / 2 if variant == "half precision" else ROUNDING
    assert found < bound
    assert apart(expected, act(policy, batch)) < bound
    assert apart(expected, act(policy, other)) > 10 * ROUNDING


@pytest.mark.parametrize("reducer", ["grids", "mean", "uniform", "pool", "tome", "random"])
def test_every_reducer_before_the_trunk(pi0, reducer):
    policy, batch = pi0
    options = {"camera_tokens": {"observation.images.1": 2}} if reducer == "grids" else {}
    policy = train_offsets(wrap(policy.detach(), 4, reducer, **options))
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    if reducer == "random":
        # It draws anew at each look, so no two ways to act can be compared.
        assert "more than" in found
    else:
        assert found < ROUNDING
        assert apart(expected, act(policy, batch)) < ROUNDING


def test_a_watched_sampler_is_called(pi0, caplog):
    policy, batch = pi0
    seen = []
    policy.reducer.register_forward_hook(lambda *call: seen.append(call))
    policy.use_runtime("fast")
    for count in (2, 3):
        act(policy, batch)
        assert len(seen) == count
    policy.use_runtime("compiled")
    act(policy, batch)
    assert "a hook, which neither" in caplog.text


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_bfloat16_stays_within_its_bound(family_row, name):
    row = family_row(name)
    policy = train_offsets(wrap(row.policy(2, **row.bfloat16), 5))
    batch = row.batch(policy.base)
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    assert apart(expected, act(policy, batch)) < fast.BOUNDS[torch.bfloat16] / 2


def test_what_the_fast_path_does_not_follow_is_done_eagerly(pi0, caplog):
    policy, batch = pi0
    policy.use_runtime("fast")
    policy.train()
    act(policy, batch)
    policy.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        act(policy, batch)
    assert not policy.seam.runtime.differences
    assert "it is being trained" in caplog.text
    assert "autocast is on" in caplog.text


def test_a_failure_to_build_is_said(pi0, monkeypatch, caplog):
    policy, batch = pi0
    expected = act(policy, batch)
    layer = next(module for module in policy.base.modules() if hasattr(module, "o_proj"))
    layer.q_proj.register_forward_hook(lambda module, inputs, output: output * 1.0)
    policy.use_runtime("fast")
    for _ in range(2):
        torch.testing.assert_close(act(policy, batch), expected)
    assert "only plain linear layers are joined" in caplog.text


@pytest.mark.parametrize("name", ["evo1", "eo1"])
def test_families_without_phases_say_so(family_row, name):
    policy = wrap(family_row(name).policy(), 4)
    with pytest.raises(UnsupportedPolicyError, match=f"not available for a '{name}' policy.*use runtime=eager"):
        policy.use_runtime("fast")
    assert policy.config.runtime == "eager"


def test_reducers_that_have_no_fast_path_say_so(pi0):
    policy, _ = pi0
    base = policy.detach()
    for reducer in ("blind", "fastv"):
        with pytest.raises(UnsupportedPolicyError, match="not available with reducer"):
            compress(base, None, reducer, runtime="fast")
        get_family(base.config.type).detach(base)


def test_runtime_is_an_option(family_row, tmp_path):
    base = family_row("tiny_smolvla").policy()
    policy = compress(base, 4, runtime="fast")
    assert policy.seam.runtime.name == "fast"
    policy.config.save_pretrained(tmp_path)
    assert GridsConfig.from_pretrained(tmp_path).runtime == "fast"
    with pytest.raises(GridsError, match="runtime 'quick' is unknown; choose one of eager, fast, compiled"):
        policy.use_runtime("quick")


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
    [("own", "highest", 1e-4), ("fp32", "highest", 1e-4), ("tf32", "high", 2e-2), ("bf16", "medium", 5e-2)],
)
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


class Overwriting:
    """`RecordedFunction` without a GPU: inputs and outputs stay at their places, and each call overwrites them."""

    def __init__(self, function, fixed, examples):
        self.places = tree_map(torch.clone, examples)
        self.run = lambda: function(*fixed, *self.places)
        self.result = tree_map(torch.clone, self.run())

    def __call__(self, *arguments):
        for place, value in zip(tree_leaves(self.places), tree_leaves(arguments), strict=True):
            place.copy_(value)
        for place, value in zip(tree_leaves(self.result), tree_leaves(self.run()), strict=True):
            place.copy_(value)
        return self.result


@pytest.mark.parametrize("guided", [False, True])
def test_results_that_the_next_call_overwrites_are_used_before(phased, guided, monkeypatch):
    policy, batch = phased
    other = batch | {"observation.images.1": batch["observation.images.1"] * 0.5}
    other["observation.state"] = batch["observation.state"] + 0.5
    if guided:
        if policy.family.policy_type not in FLOWS:
            pytest.skip("LeRobot guides no chunks of this policy")
        policy.config.rtc_config = RTCConfig(enabled=True, debug=True)
        policy.init_rtc_processor()
    expected = [act(policy, given) for given in (batch, other)]
    make = program.Program.__init__

    def recorded(self, phases, steps, observation, noise, **options):
        make(self, phases, steps, observation, noise, **options)
        self._record(observation, noise)

    monkeypatch.setattr(program, "RecordedFunction", Overwriting)
    monkeypatch.setattr(program.Program, "__init__", recorded)
    policy.use_runtime("fast")
    act(policy, other)
    found = [act(policy, given) for given in (batch, other)]
    assert len(policy.seam.runtime.programs) == 1
    for one, two in zip(expected, found, strict=True):
        assert apart(one, two) < ROUNDING
    assert apart(*expected) > 10 * ROUNDING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_function_follows_its_inputs():
    weight = torch.randn(4, 4, device="cuda")
    recorded = graphs.RecordedFunction(lambda fixed, x: (fixed @ x, x + 1), (weight,), (torch.zeros(4, device="cuda"),))
    for _ in range(2):
        x = torch.randn(4, device="cuda")
        product, more = recorded(x)
        torch.testing.assert_close(product, weight @ x)
        torch.testing.assert_close(more, x + 1)


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
