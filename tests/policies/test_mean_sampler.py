"""The sampler against independent truths: dense tokens, a closed formula, finite differences."""

import pytest
import torch

from lerobot_policy_grids.errors import BudgetError, TokenGridError
from lerobot_policy_grids.reducers.mean_sampler import MeanSampler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ramp(height, width):
    """The value at a cell is its own coordinate (x, y)."""
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def random_sampler(grid=(6, 9), width=8, k=5, **options):
    """A sampler whose offsets are not zero, as after training."""
    sampler = MeanSampler(grid, width, k, **options)
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(12, 12), (5, 9), (16, 16), (15, 20)])
def test_all_tokens_of_an_untrained_sampler_are_the_dense_tokens(grid, dtype):
    height, width = grid
    feature_map = torch.randn(2, height, width, 4, dtype=dtype)
    sampler = MeanSampler(grid, 4, height * width).to(dtype)
    tokens, coordinates = sampler(feature_map)
    assert torch.equal(tokens, feature_map.flatten(1, 2))
    torch.testing.assert_close(coordinates, ramp(height, width).flatten(1, 2).expand(2, -1, -1))


@pytest.mark.parametrize("k", [1, 2, 4, 9, 16, 24, 144])
def test_untrained_sampler_reads_distinct_cells_in_raster_order(k):
    cells = torch.arange(144).float().view(1, 12, 12, 1)
    tokens = MeanSampler((12, 12), 1, k)(cells).tokens.flatten().tolist()
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == k


@pytest.mark.parametrize("module_dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_coordinates_are_float32_whatever_the_dtype(module_dtype, autocast):
    sampler = random_sampler(k=7).to(module_dtype)
    feature_map = torch.randn(3, 6, 9, 8, dtype=module_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens, coordinates = sampler(feature_map)
    assert coordinates.dtype == torch.float32
    assert tokens.dtype == module_dtype
    # A bfloat16 coordinate would be a multiple of 1/256 in [0.5, 1].
    high = coordinates[coordinates > 0.5] * 256
    assert (high - high.round()).abs().max() > 0.01


def test_saturated_offsets_read_the_border_token_and_not_zeros():
    sampler = MeanSampler((6, 9), 8, 5)
    sampler.coordinate_head.out.bias.data.fill_(1000.0)
    tokens, coordinates = sampler(torch.ones(1, 6, 9, 8))
    torch.testing.assert_close(coordinates, torch.ones_like(coordinates), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens, torch.ones_like(tokens), atol=1e-6, rtol=0)


def test_coordinates_are_the_sigmoid_of_anchor_logit_plus_offset():
    sampler = random_sampler(k=54)
    offsets = torch.randn(54, 2)
    torch.nn.init.zeros_(sampler.coordinate_head.out.weight)
    sampler.coordinate_head.out.bias.data = offsets.flatten()
    cells = sampler.anchor_cells[0]
    anchors = (cells + 0.5) / sampler.grid_size
    expected = torch.sigmoid(torch.logit(anchors) + offsets)
    order = (cells[:, 1] * 9 + cells[:, 0]).argsort()
    coordinates = sampler(torch.randn(1, 6, 9, 8)).coordinates[0]
    torch.testing.assert_close(coordinates, expected[order], atol=1e-6, rtol=0)


def test_coordinates_stay_in_the_image():
    sampler = random_sampler(k=20)
    torch.nn.init.normal_(sampler.coordinate_head.out.weight, std=50)
    coordinates = sampler(torch.randn(16, 6, 9, 8)).coordinates
    assert coordinates.min() >= 0
    assert coordinates.max() <= 1


@pytest.mark.parametrize("region", [(0.0, 0.25, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0), (0.0, 0.3, 1.0, 0.7)])
@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_padding_is_not_read(region, k):
    height, width = 12, 12
    left, top, right, bottom = region
    y, x = ((torch.arange(cells) + 0.5) / cells for cells in (height, width))
    inside = ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))
    feature_map = torch.where(inside, 1.0, 1e6)[None, :, :, None].expand(2, -1, -1, 3)
    tokens = MeanSampler((height, width), 3, k, regions=[region])(feature_map).tokens
    torch.testing.assert_close(tokens, torch.ones_like(tokens))


def test_gradients_reach_the_offsets_through_the_coordinates():
    sampler = MeanSampler((6, 9), 8, 5)
    feature_map = torch.randn(2, 6, 9, 8)
    sampler(feature_map).tokens.square().sum().backward()
    assert sampler.coordinate_head.out.weight.grad.abs().sum() > 0
    # Independent of geometry: the gradient of one offset by finite differences.
    bias = sampler.coordinate_head.out.bias
    torch.nn.init.normal_(bias, std=0.2)
    sampler.zero_grad()
    sampler(feature_map).tokens.square().sum().backward()
    step = 1e-3
    values = []
    for sign in (1, -1):
        bias.data[3] += sign * step
        values.append(sampler(feature_map).tokens.double().square().sum().item())
        bias.data[3] -= sign * step
    assert bias.grad[3].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02, abs=0.02)


def test_a_smaller_budget_uses_a_prefix_of_the_same_anchors():
    sampler = MeanSampler((12, 12), 1, 36, interpolation="bilinear")
    cells = torch.arange(144).float().view(1, 12, 12, 1)
    before = set(sampler(cells).tokens.flatten().tolist())
    for k in (25, 16, 4, 1):
        sampler.num_tokens = k
        now = set(sampler(cells).tokens.flatten().tolist())
        assert len(now) == k
        assert now < before
        before = now


CONTEXTS = {
    "language": lambda: torch.randn(2, 10),
    "state": lambda: torch.randn(2, 6),
    "camera": lambda: torch.tensor([0, 1]),
}


@pytest.mark.parametrize("name", ["image", *CONTEXTS])
def test_each_context_is_a_switch(name):
    options = {"language_width": 10, "state_width": 6, "num_cameras": 2}

    def coordinates(condition_on, change):
        torch.manual_seed(0)
        sampler = random_sampler(condition_on=condition_on, **options)
        feature_map = torch.ones(2, 6, 9, 8)
        context = {key: make() for key, make in CONTEXTS.items()}
        if change and name == "image":
            feature_map = torch.randn(2, 6, 9, 8)
        elif change:
            context[name] = 1 - context[name]
        return sampler(feature_map, context).coordinates

    others = [other for other in ("image", *CONTEXTS) if other != name]
    assert not torch.equal(coordinates([*others, name], False), coordinates([*others, name], True))
    assert torch.equal(coordinates(others, False), coordinates(others, True))


def test_without_context_the_coordinates_are_learned_constants():
    sampler = random_sampler(condition_on=())
    coordinates = sampler(torch.randn(4, 6, 9, 8)).coordinates
    assert torch.equal(coordinates[0], coordinates[3])


@pytest.mark.parametrize("k", [0, -3, 145])
def test_impossible_budgets_are_refused(k):
    with pytest.raises(BudgetError, match=r"1 \.\. 144"):
        MeanSampler((12, 12), 4, k)


def test_run_time_budget_above_the_maximum_is_refused():
    sampler = MeanSampler((12, 12), 4, 8, num_tokens_max=16)
    sampler.num_tokens = 16
    with pytest.raises(BudgetError, match=r"1 \.\. 16"):
        sampler.num_tokens = 17
    assert sampler.num_tokens == 16


@pytest.mark.parametrize("value", [8.5, "8", None, True])
def test_what_is_no_whole_number_is_refused(value):
    sampler = MeanSampler((12, 12), 4, 8)
    with pytest.raises(BudgetError, match="not a whole number"):
        sampler.num_tokens = value


def test_another_token_grid_is_refused():
    with pytest.raises(TokenGridError, match=r"\(4, 4\).*\(12, 12\)"):
        MeanSampler((12, 12), 4, 8)(torch.zeros(1, 4, 4, 4))


def test_unknown_context_is_refused():
    with pytest.raises(ValueError, match="smell"):
        MeanSampler((12, 12), 4, 8, condition_on=("smell",))


def test_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="bicubic"):
        MeanSampler((4, 4), 8, 4, interpolation="bicubic")


def test_repr_says_what_it_does():
    assert "12x12 grid -> 8 tokens (max 16)" in repr(MeanSampler((12, 12), 4, 8, num_tokens_max=16))
