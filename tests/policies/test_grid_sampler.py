"""The sampler that reads coordinates off the map, against loops over cells, dense tokens and a planted object."""

import math

import pytest
import torch

from lerobot_policy_grids.errors import BudgetError, GridsError
from lerobot_policy_grids.reducers import reducer_config
from lerobot_policy_grids.reducers.grid_sampler import GridSampler

CONTEXT = {"language": torch.randn(3, 10), "state": torch.randn(3, 6), "camera": torch.tensor([0, 1, 1])}
WIDTHS = {"condition_on": ("language", "state", "camera"), "language_width": 10, "state_width": 6, "num_cameras": 2}


def trained(grid=(6, 9), width=8, k=5, std=0.5, **options):
    """A sampler with random weights, as after training."""
    sampler = GridSampler(grid, width, k, **(WIDTHS | options))
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return sampler.eval()


def tent(at, cell, reach):
    return max(0.0, 1 - abs(cell - at) / reach)


def by_loops(sampler, feature_map, query, anchor, reach):
    """(token, column, row) of one query on one map [h, w, c], cell by cell."""
    height, width, channels = feature_map.shape
    keys = torch.nn.functional.layer_norm(
        feature_map, (channels,), sampler.map_norm.weight, sampler.map_norm.bias, sampler.map_norm.eps
    )
    cells = [(row, column) for row in range(height) for column in range(width)]
    prior = [tent(anchor[0], column, reach) * tent(anchor[1], row, reach) for row, column in cells]
    scores = [math.exp(float(4 / math.sqrt(channels) * query @ keys[cell])) for cell in cells]
    mass = sum(p * s for p, s in zip(prior, scores, strict=True))
    weights = [p * s / mass for p, s in zip(prior, scores, strict=True)]
    x, y = (
        anchor[axis]
        + sum(
            (w - p / sum(prior)) * (cell[1 - axis] - anchor[axis])
            for w, p, cell in zip(weights, prior, cells, strict=True)
        )
        for axis in (0, 1)
    )
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    sharp = min(reach, sampler.reading_width)
    read = [tent(x, column, sharp) * tent(y, row, sharp) for row, column in cells]
    read = [r / sum(read) for r in read]
    flat = torch.stack([feature_map[cell] for cell in cells])
    seen = torch.tensor([w - r for w, r in zip(weights, read, strict=True)]) @ flat
    token = torch.tensor(read) @ flat + sampler.value.up.weight @ (sampler.value.down.weight @ seen)
    return token, x, y


def test_it_is_the_formula_cell_by_cell():
    sampler = trained(std=0.3, geometry_width=0)
    feature_map = torch.randn(3, 6, 9, 8)
    tokens, coordinates = sampler(feature_map, CONTEXT)
    cells = sampler.cells_of(sampler.region_of(0))
    order = sampler.raster_order(cells)
    queries = sampler._queries(CONTEXT, order)
    for image in range(3):
        for token in range(5):
            expected, x, y = by_loops(
                sampler, feature_map[image], queries[image, token], cells[order][token].tolist(), math.sqrt(54 / 5)
            )
            torch.testing.assert_close(tokens[image, token], expected, atol=1e-5, rtol=1e-4)
            place = torch.tensor([(x + 0.5) / 9, (y + 0.5) / 6])
            torch.testing.assert_close(coordinates[image, token], place, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 8, 16, 53])
def test_untrained_points_lie_exactly_on_their_anchors(k):
    sampler = GridSampler((6, 9), 8, k, **WIDTHS)
    coordinates = sampler(torch.randn(3, 6, 9, 8), CONTEXT).coordinates
    assert torch.equal(coordinates, sampler.anchors(k).expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", [(0.0, 0.0, 1.0, 1.0), (0.0, 0.25, 1.0, 0.75)])
def test_all_tokens_are_the_dense_tokens_whatever_the_queries_are(dtype, region):
    sampler = trained(k=54, regions=[region], geometry_width=0).to(dtype)
    feature_map = torch.randn(3, 6, 9, 8, dtype=dtype)
    assert torch.equal(sampler(feature_map, CONTEXT).tokens, feature_map.flatten(1, 2))


def test_a_query_finds_what_it_looks_for():
    """One cell of a window has a pattern, and the query is that pattern."""
    sampler = GridSampler((16, 16), 8, 16, geometry_width=0)
    pattern = torch.nn.functional.one_hot(torch.tensor(3), 8).float()
    feature_map = torch.randn(1, 16, 16, 8) * 0.1
    feature_map[0, 5, 9] = 3 * pattern
    order = sampler.raster_order(sampler.cells_of(sampler.region_of(0)))
    queries = (20 * pattern).expand(1, 16, 8)
    sampler._queries = lambda context, order: queries
    tokens, coordinates = sampler(feature_map)
    target = (torch.tensor([9.0, 5.0]) + 0.5) / 16
    nearest = (sampler.anchors(16) - target).norm(dim=-1).argmin()
    torch.testing.assert_close(coordinates[0, nearest], target, atol=0.01, rtol=0)
    assert tokens[0, nearest, 3] > 0.9
    assert len(order) == 16


def test_another_instruction_moves_the_points():
    sampler = trained()
    feature_map = torch.randn(1, 6, 9, 8).expand(3, -1, -1, -1)
    same = {name: value[:1].expand(3, *value.shape[1:]) for name, value in CONTEXT.items()}
    for name in CONTEXT:
        moved = sampler(feature_map, same | {name: CONTEXT[name]}).coordinates
        assert (moved[0] - moved[1]).abs().max() > 1e-3, name
    assert sampler(feature_map, same).coordinates.diff(dim=0).abs().max() < 1e-6


@pytest.mark.parametrize("region", [(0.0, 0.25, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0), (0.0, 0.3, 1.0, 0.7)])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_padding_is_not_read(region, k):
    sampler = trained(grid=(12, 12), k=k, regions=[region])
    left, top, right, bottom = region
    centres = (torch.arange(12) + 0.5) / 12
    feature_map = torch.randn(3, 12, 12, 8)
    feature_map[:, (centres < top) | (centres > bottom)] = torch.nan
    feature_map[:, :, (centres < left) | (centres > right)] = torch.nan
    tokens, coordinates = sampler(feature_map, CONTEXT)
    assert tokens.isfinite().all()
    assert (coordinates >= torch.tensor([left, top])).all()
    assert (coordinates <= torch.tensor([right, bottom])).all()


def test_autocast_and_half_precision_do_not_move_the_points():
    sampler = trained()
    feature_map = torch.randn(3, 6, 9, 8)
    tokens, coordinates = sampler(feature_map, CONTEXT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = sampler(feature_map, CONTEXT)
    assert torch.equal(again.coordinates, coordinates)
    assert torch.equal(again.tokens, tokens)
    half = sampler.to(torch.bfloat16)(feature_map.bfloat16(), CONTEXT)
    assert half.coordinates.dtype == torch.float32
    assert half.tokens.dtype == torch.bfloat16


def test_gradients_reach_every_weight():
    sampler = trained().double().requires_grad_(True)
    tokens = sampler(torch.randn(3, 6, 9, 8), CONTEXT).tokens
    tokens.square().sum().backward()
    for name, parameter in sampler.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_it_can_be_exported_and_compiled_whole():
    sampler = trained()
    feature_map = torch.randn(3, 6, 9, 8)
    tokens, coordinates = sampler(feature_map, CONTEXT)
    for run in (
        torch.export.export(sampler, (feature_map, CONTEXT)).module(),
        torch.compile(sampler, fullgraph=True, backend="eager"),
    ):
        got = run(feature_map, CONTEXT)
        torch.testing.assert_close(got[0], tokens)
        torch.testing.assert_close(got[1], coordinates)


def test_what_it_cannot_be():
    with pytest.raises(ValueError, match="smell"):
        GridSampler((6, 9), 8, 4, condition_on=("smell",))
    with pytest.raises(GridsError, match=r"reading_width=0\.5; give at least 1"):
        reducer_config("grids", reading_width=0.5)
    with pytest.raises(BudgetError, match=r"1 \.\. 54"):
        GridSampler((6, 9), 8, 55)


def test_its_size_in_pi0():
    """2 MB in bfloat16: a thousandth of the policy."""
    sampler = GridSampler(
        (16, 16), 1152, 16, condition_on=WIDTHS["condition_on"], language_width=2048, state_width=32, num_cameras=3
    )
    assert sum(parameter.numel() for parameter in sampler.parameters()) < 1e6
