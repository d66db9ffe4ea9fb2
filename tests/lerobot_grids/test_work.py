"""Counted work, the bound that follows from it, and the stopwatch, against closed formulas."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lerobot_grids.profiling import stopwatch
from lerobot_grids.profiling.roofline import CARDS, ORIN, Card, Work, find_card
from lerobot_grids.profiling.stopwatch import Timed, repeat, run_once, within
from lerobot_grids.profiling.work import WorkCounter

# Counted.


def counted(function, *modules):
    weights = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    with torch.no_grad(), WorkCounter(weights) as counter:
        function(counter)
    return counter.stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_and_reads_what_its_sizes_say(dtype):
    layer, x = nn.Linear(6, 4).to(dtype), torch.ones(3, 6, dtype=dtype)
    work = counted(lambda counter: layer(layer(x) @ layer.weight), layer)["prefill"]
    # Its weights once, although it runs twice.
    assert work.weight_bytes == (6 * 4 + 4) * layer.weight.element_size()
    assert work.flops == {str(dtype).removeprefix("torch."): 3 * 2 * 3 * 6 * 4}


def test_each_call_of_a_stage_reads_its_weights_again():
    layer, x = nn.Linear(6, 4, bias=False), torch.ones(3, 6)

    def steps(counter):
        layer(x)
        for _ in range(5):
            with counter.within("steps"):
                layer(x)
        layer(x)

    stages = counted(steps, layer)
    assert stages["steps"] == Work({"float32": 5 * 2 * 3 * 6 * 4}, 5 * 4 * 6 * 4)
    assert stages["prefill"].weight_bytes == 4 * 6 * 4


def test_what_only_looks_up_rows_reads_no_table():
    table = nn.Embedding(1000, 8)
    assert counted(lambda counter: table(torch.tensor([1, 2])), table)["prefill"] == Work()
    # And a part is a part.
    read = counted(lambda counter: table.weight[:10] + 1, table)["prefill"]
    assert read.weight_bytes == 4 * 10 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_two_products_whatever_kernel_computes_it(dtype, masked):
    query, key, value = (torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, 5), (2, 7), (2, 7)))
    mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
    work = counted(lambda counter: F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True))["prefill"]
    assert work.flops == {str(dtype).removeprefix("torch."): 2 * 2 * (2 * 4 * 5 * 7 * 16)}


# The bound.


def test_the_bound_is_the_slower_of_arithmetic_and_reading():
    card = Card("card", {"float32": 10, "tf32": 20, "bfloat16": 100}, 500, "here")
    assert card.seconds(Work({"float32": 10**12}, 0), tf32=False) == pytest.approx(0.1)
    assert card.seconds(Work({"float32": 10**12}, 0), tf32=True) == pytest.approx(0.05)
    # Mixed arithmetic adds up, and float64 is no faster than float32.
    assert card.seconds(Work({"bfloat16": 10**12, "float64": 10**12}, 0), tf32=True) == pytest.approx(0.11)
    assert card.seconds(Work({"bfloat16": 10**12}, 10**10), tf32=True) == pytest.approx(0.02)


@pytest.mark.parametrize("card", [*CARDS.values(), ORIN], ids=lambda card: card.name)
def test_published_peaks_are_those_of_dense_matrices(card):
    """Tensor cores compute bfloat16 twice as fast as TF32, and int8 at least twice as fast as that."""
    assert card.tflops["bfloat16"] == pytest.approx(2 * card.tflops["tf32"], rel=1e-2)
    assert card.tflops["int8"] >= 1.99 * card.tflops["bfloat16"]
    assert card.tflops["float32"] <= card.tflops["tf32"]
    assert card.source


@pytest.mark.parametrize(
    ("name", "multiprocessors", "found"),
    [
        ("NVIDIA H200", 132, "H200 SXM"),
        ("NVIDIA GeForce RTX 4090", 128, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, None),
        ("Orin", 16, "Jetson AGX Orin 64 GB"),
        ("Orin", 8, None),
    ],
)
def test_a_card_is_known_by_its_whole_name(name, multiprocessors, found, monkeypatch):
    properties = SimpleNamespace(name=name, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    card = find_card("cuda")
    assert (card and card.name) == found
    assert find_card("cpu") is None


# The stopwatch.


class Policy:
    """Takes 1 in its tower, 2 more before the steps, and 4 in each of two steps, of which 1 is outside of them."""

    def __init__(self):
        self.now = 0.0

    def spend(self, seconds):
        self.now += seconds

    def tower(self):
        self.spend(1)

    def step(self):
        self.spend(3)

    def act(self):
        self.tower()
        self.spend(2)
        for _ in range(2):
            self.step()
            self.spend(1)
        return self.now


def stages(policy):
    return [Timed(policy, "tower", "vision"), Timed(policy, "step", "steps")]


def test_stages_of_one_run_add_up():
    policy = Policy()
    seconds, result = run_once(policy.act, stages(policy), lambda: policy.now)
    assert seconds == {"total": 11, "vision": 1, "prefill": 3, "steps": 8}
    assert result == 11
    assert vars(policy) == {"now": 11}


def test_a_gpu_is_waited_for_once_between_prefill_and_steps(monkeypatch):
    """And the total is that of a run in which nothing inside waits."""
    policy, waits = Policy(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waits.append(device), policy.spend(0.5)))
    monkeypatch.setitem(stopwatch.CLOCKS, "wall", lambda: policy.now)
    seconds, _ = repeat(policy.act, stages(policy), "cuda:0", "wall", repeats=2)
    # Start, two for the tower, the first step, the end; and two of the run without stages.
    assert waits == 2 * 7 * ["cuda:0"]
    assert seconds["total"] == [11.5, 11.5]
    assert [a + b for a, b in zip(seconds["prefill"], seconds["steps"], strict=True)] == [13, 13]


def test_a_method_is_put_back_after_an_error():
    policy = Policy()
    policy.step = own = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_once(policy.act, stages(policy), lambda: policy.now)
    assert policy.step is own
    assert "tower" not in vars(policy)


def test_a_stage_is_entered_at_each_call():
    policy, entered = Policy(), []

    def enter(stage):
        entered.append(stage)
        return nullcontext()

    with within(Timed(policy, "step", "steps"), enter):
        policy.act()
    assert entered == ["steps", "steps"]
