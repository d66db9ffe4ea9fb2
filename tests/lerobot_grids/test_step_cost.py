"""Predicted costs of a training step against real tensors, an allocator, CUDA's own rules and closed formulas."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from formulas import gemma, linear, siglip
from lerobot_grids.profiling.architectures import instantiate, make_config, make_training_batch
from lerobot_grids.profiling.counting import flop_counter
from lerobot_grids.profiling.gpu_rules import GpuRules, fused_attention
from lerobot_grids.profiling.live_memory import LiveMemory
from lerobot_grids.profiling.meta_values import meta_values
from lerobot_grids.training import step_bench, step_cost
from lerobot_grids.training.step_bench import bench_steps
from lerobot_grids.training.step_cost import StepCost, predict_step
from lerobot_grids.training.trainable import train_only
from lerobot_grids_cli.main import main
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family


def allocated(step):
    """Largest sum of what the CPU's allocator gave and got back while `step` runs, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak


def policy_on(device, tokens, cameras=1):
    policy = instantiate(make_config("tiny", cameras), "meta" if device == "meta" else "cpu")
    policy = policy if tokens is None else compress(policy, tokens)
    return policy.train()


@pytest.mark.parametrize("tokens", [None, 16])
@pytest.mark.parametrize("train", ["reducer", "reducer+lora", "all"])
def test_saved_bytes_are_those_of_real_tensors(tokens, train):
    if tokens is None and train == "reducer":
        return
    real = policy_on("cpu", tokens)
    train_only(real, train, 16)
    measured = step_cost._run(real, None, 6, 8)
    predicted = predict_step(make_config("tiny", 1), train, tokens=tokens, batch_size=6, language_tokens=8)
    assert measured.saved > 1e6
    assert predicted.saved == pytest.approx(measured.saved, rel=1e-3)
    assert predicted.activations == pytest.approx(measured.activations, rel=1e-3)
    assert predicted.forward_flops == pytest.approx(measured.forward_flops, rel=0.1)


@pytest.mark.parametrize("tokens", [None, 16])
def test_activations_are_what_an_allocator_gives(tokens):
    policy = policy_on("cpu", tokens)
    batch = make_training_batch(getattr(policy, "base", policy), 6, 8, "cpu")

    def step():
        loss, _ = policy.forward(batch)
        loss.backward()

    # It includes the first gradients, which are small beside what is still held when they are computed.
    peak = allocated(step) + sum(value.nbytes for value in batch.values())
    predicted = predict_step(make_config("tiny", 1), "all", tokens=tokens, batch_size=6, language_tokens=8)
    assert predicted.activations == pytest.approx(peak, rel=0.02)
    # The peak in the middle of the step is more than what the forward pass saves.
    assert predicted.saved < predicted.activations


@pytest.mark.parametrize("family", ["act", "tiny"])
def test_every_tensor_of_a_policy_without_weights_is_on_meta(family):
    """ACT makes some by numpy, which no device scope reaches."""
    policy = instantiate(make_config(family, 1), "meta")
    assert {tensor.device.type for tensor in [*policy.parameters(), *policy.buffers()]} == {"meta"}


def test_memory_grows_evenly_with_the_batch():
    config = make_config("tiny", 1)
    small, large = (predict_step(config, "all", tokens=16, batch_size=size) for size in (4, 12))
    assert small.peak_of(12) == pytest.approx(large.peak, rel=0.01)
    assert small.flops * 3 == pytest.approx(large.flops, rel=0.01)


def test_the_largest_batch_is_the_largest():
    cost = predict_step(make_config("tiny", 1), "all", tokens=16, batch_size=4)
    memory = round(cost.peak_of(37) / step_cost.USABLE_SHARE) + 100
    assert cost.largest_batch(memory) == 37
    assert cost.largest_batch(round(cost.peak_of(1) / step_cost.USABLE_SHARE) - 100) == 0


def test_weights_gradients_and_adam_are_counted_by_parameter():
    policy = policy_on("cpu", 16)
    policy.forward(make_training_batch(policy.base, 2, 8, "cpu"))[0].backward()
    used = sum(p.nbytes for p in policy.parameters() if p.grad is not None)
    torch.optim.AdamW(policy.parameters()).step()
    cost = predict_step(make_config("tiny", 1), "all", tokens=16, batch_size=2)
    assert cost.weights == sum(t.nbytes for t in [*policy.parameters(), *policy.buffers()])
    assert (cost.gradients, cost.optimizer) == (used, 2 * used)
    # AdamW on a GPU takes the root of all its second moments at once.
    assert cost.scratch >= used


def test_pi0_costs_what_its_dimensions_say():
    prefix, suffix = 2 * 256 + 48, 51
    # In training the expert attends in the same pass, so that keys are those of both.
    trunk = gemma(prefix, prefix + suffix, 2048, 16384) + gemma(suffix, prefix + suffix, 1024, 4096)
    ends = linear(1, 32, 1024) + linear(50, 32, 1024) + linear(50, 2048, 1024, 1024) + linear(50, 1024, 32)
    frame = siglip(2) + linear(512, 1152, 2048) + trunk + ends
    policy = instantiate(make_config("pi0", 2), "meta").train()
    cost = step_cost._run(policy, None, 1, 48)
    assert cost.forward_flops == pytest.approx(frame, rel=1e-3)
    # Twice the forward pass, less what has no gradient; fused attention computes its weights again.
    assert cost.backward_flops == pytest.approx(2 * frame, rel=0.05)


def test_checkpointing_and_fewer_tokens_lower_the_activations(tmp_path):
    def run(tokens, checkpointing, device="meta"):
        config = make_config("pi0", 2)
        options = {"gradient_checkpointing": checkpointing, "max_state_dim": 16, "max_action_dim": 16}
        policy = get_family("pi0").small(config.input_features, config.output_features, tmp_path, **options)
        policy = (policy if tokens is None else compress(policy, tokens)).to(device).train()
        return step_cost._run(policy, None, 4, 8)

    dense, few, again, few_again = run(None, False), run(4, False), run(None, True), run(4, True)
    assert few.activations < 0.9 * dense.activations
    assert again.activations < 0.8 * dense.activations
    assert few_again.activations < again.activations
    assert again.saved < 0.2 * dense.saved
    assert again.forward_flops == dense.forward_flops
    assert again.backward_flops > dense.backward_flops + 0.9 * dense.forward_flops
    # What is computed again is not saved, but held while its gradients are.
    assert again.activations > 2 * again.saved
    real = run(None, True, "cpu")
    assert (again.saved, again.activations) == pytest.approx((real.saved, real.activations), rel=0.02)


def test_every_token_costs_what_the_dense_policy_costs():
    config = make_config("tiny", 1)
    dense = predict_step(config, "all", batch_size=4)
    # `uniform` reads each cell at its centre; it has no weights.
    same = predict_step(config, "all", tokens=144, reducer="uniform", batch_size=4)
    assert (same.forward_flops, same.backward_flops) == (dense.forward_flops, dense.backward_flops)
    assert (same.gradients, same.optimizer) == (dense.gradients, dense.optimizer)
    assert same.activations == pytest.approx(dense.activations, rel=0.05)
    half = predict_step(config, "all", tokens=72, reducer="uniform", batch_size=4)
    assert half.flops < 0.9 * dense.flops


def test_a_reducer_without_weights_is_not_trained():
    with pytest.raises(GridsError, match="no weights to train"):
        predict_step(make_config("tiny", 1), "reducer", tokens=16, reducer="uniform")


@pytest.mark.parametrize("train", ["reducer", "all"])
def test_a_teacher_costs_its_forward_pass(train):
    config = make_config("tiny", 1)
    alone, taught = (predict_step(config, train, tokens=16, batch_size=4, distill=distill) for distill in (False, True))
    dense = predict_step(config, "all", batch_size=4)
    assert alone.teacher_flops == 0
    assert taught.teacher_flops == dense.forward_flops
    if train == "all":
        # A copy of the dense policy.
        assert taught.weights == alone.weights + dense.weights
        assert taught.forward_flops == alone.forward_flops
    else:
        # The network itself; both use the same feature maps.
        assert taught.weights == alone.weights
        assert taught.forward_flops < alone.forward_flops
    assert taught.backward_flops == pytest.approx(alone.backward_flops, rel=0.05)


# What the meta device is taught.


@pytest.mark.parametrize("trained_input", [False, True])
def test_a_linear_layer_counts_by_its_formula(trained_input):
    layer, x = nn.Linear(30, 70, device="meta"), torch.randn(4, 9, 30, device="meta", requires_grad=trained_input)
    with flop_counter() as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 4 * 9 * 30 * 70
    assert counter.get_total_flops() == (3 if trained_input else 2) * forward


def test_attention_counts_and_saves_by_its_formula():
    b, h, n, m, d = 2, 3, 40, 56, 16
    query, key = (torch.randn(b, h, length, d, device="meta", requires_grad=True) for length in (n, m))
    with GpuRules(mixed=False), LiveMemory([query, key]) as memory, flop_counter() as counter:
        output = functional.scaled_dot_product_attention(query, key, key)
        assert counter.get_total_flops() == 4 * b * h * n * m * d
        # Not the weights, b * h * n * m; the kernel keeps a logarithm of each row, rounded up to 32 rows.
        assert memory.live <= 4 * (b * h * n * d + b * h * (n + 32)) + 64
        torch.autograd.backward(output.sum())
    # Five products instead of two.
    assert counter.get_total_flops() == (2 + 5) * 2 * b * h * n * m * d


def test_a_mask_and_grouped_heads_do_not_stop_attention():
    query, key = torch.randn(2, 6, 8, 4, device="meta"), torch.randn(2, 2, 8, 4, device="meta")
    mask = torch.ones(8, 8, dtype=torch.bool, device="meta")
    assert fused_attention(query, key, key, mask, enable_gqa=True).shape == (2, 6, 8, 4)


@pytest.mark.parametrize("groups", [1, 8])
def test_a_convolution_counts_by_its_formula(groups):
    layer = nn.Conv2d(8, 16, 3, groups=groups, bias=False, device="meta")
    x = torch.randn(2, 8, 10, 10, device="meta", requires_grad=True)
    with flop_counter() as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * (8 // groups) * 16 * 9 * 64


class Block(nn.Module):
    """Operations of every kind of policy."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.out_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = functional.softmax(query @ key.transpose(1, 2) / 4, dim=-1)
        x = x + self.out(torch.matmul(weights, value))
        variance = x.float().pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6).to(x.dtype)
        x = x + functional.gelu(self.frozen(x)) * functional.silu(self.out(self.out_norm(x)))
        return functional.mse_loss(x, torch.zeros_like(x))


def saved_by(block, images):
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage._cdata] = (str(tensor.dtype), storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = block(images)
    return sorted((dtype, size) for dtype, size, _ in found.values()), loss


def test_mixed_precision_saves_what_cuda_saves():
    # CUDA's own autocast on fake tensors, which needs no GPU for a forward pass.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            with torch.device("cuda"):
                block, images = Block(), torch.randn(2, 3, 16, 16)
            expected, _ = saved_by(block, images)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    with GpuRules(mixed=True):
        predicted, _ = saved_by(Block().to("meta"), torch.randn(2, 3, 16, 16, device="meta"))
    assert predicted == expected
    # The test can tell precisions apart.
    assert saved_by(Block().to("meta"), torch.randn(2, 3, 16, 16, device="meta"))[0] != expected


def test_values_that_decide_are_refused():
    value = torch.zeros((), device="meta")
    with meta_values():
        assert value.item() == 0.0
        assert (value == 0).all()
        assert value[None][torch.ones(1, dtype=torch.bool, device="meta")].shape == (1,)
        with pytest.raises(NotImplementedError, match="depends on a value of type bool"):
            bool(value > 0)
        with pytest.raises(NotImplementedError, match="depends on a value of type int64"):
            int(value.long())


# The rows and the command.


def test_a_row_says_why_it_has_no_costs(monkeypatch):
    def predict(config, train, **options):
        if train == "all":
            raise NotImplementedError("the step depends on a value of type bool")
        if train == "reducer":
            return StepCost(*[1] * 11)
        raise GridsError("LeRobot names no LoRA targets")

    monkeypatch.setattr(step_bench, "predict_step", predict)
    result = bench_steps("tiny", [16], cameras=1)
    assert [(row.name, row.train) for row in result.rows[:2]] == [("dense", "reducer"), ("K=16", "reducer")]
    (_, few, *others), saved = result.rows, result.to_dict()["rows"]
    assert few.cost is not None
    assert all(row.cost is None and row.reason for row in others)
    assert all(row["cost"] is None and row["reason"] and row["fits"] == {} for row in saved[2:])


def test_where_nothing_can_be_predicted_the_reasons_are_the_answer(monkeypatch, capsys):
    def predict(config, train, **options):
        raise GridsError(f"no {'low-rank matrices' if train == 'reducer+lora' else 'training step'}")

    monkeypatch.setattr(step_bench, "predict_step", predict)
    assert main(["bench", "--train", "--policy=tiny", "--tokens=16", "--cameras=1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "lerobot-grids: error: no training step; no low-rank matrices"


def test_checkpointing_rows_where_lerobot_has_it(monkeypatch):
    monkeypatch.setattr(step_bench, "predict_step", lambda *args, **options: StepCost(*[1] * 11))
    assert {row.gradient_checkpointing for row in bench_steps("tiny", [16]).rows} == {False}
    assert {row.gradient_checkpointing for row in bench_steps("pi0", [16]).rows} == {False, True}


def test_the_command_prints_and_saves(tmp_path, capsys):
    file = tmp_path / "steps.json"
    flags = ["--policy=tiny", "--tokens=16", "--cameras=1", "--batch_size=4", "--distill", f"--json={file}"]
    assert main(["bench", "--train", *flags]) == 0
    printed = capsys.readouterr().out
    for word in ("one training step of 4 frames", "teacher", "activations", "80 GB", "dense policy has no reducer"):
        assert word in printed
    # Nothing is cut off where standard output is no terminal.
    assert "…" not in printed
    saved = json.loads(file.read_text())
    assert [(row["train"], row["name"]) for row in saved["rows"]] == [
        (train, name) for train in ("reducer", "reducer+lora", "all") for name in ("dense", "K=16")
    ]
    dense, few = saved["rows"][-2:]
    assert few["cost"]["flops"] - few["cost"]["teacher_flops"] < dense["cost"]["flops"]
    assert few["fits"]["8"] > 0


def test_of_a_checkpoint_only_the_configuration_is_read(grids_checkpoint, tmp_path):
    for name in ("config.json", "train_config.json"):
        if (grids_checkpoint / name).exists():
            (tmp_path / name).write_bytes((grids_checkpoint / name).read_bytes())
    result = bench_steps(str(grids_checkpoint), [16])
    assert result.cameras == 1
    assert all(row.cost for row in result.rows[1:])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device=cpu"], "--device cpu with --train"),
        (["--resolution=48"], "--resolution 48 with --train"),
        (["--tokens=145"], "12 x 12 = 144"),
        (["--batch_size=0"], "--batch_size 0; give at least 1"),
        (["--reducer=nope"], "nope"),
    ],
)
def test_bench_train_refuses(flags, message, capsys):
    assert main(["bench", "--train", "--policy=tiny", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bench_refuses_options_of_training_without_it(capsys):
    assert main(["bench", "--policy=tiny", "--distill"]) == 1
    assert "--distill without --train" in capsys.readouterr().err
