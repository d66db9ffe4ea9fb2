"""The sampler of published weights against the paper's formula, cell by cell, in both conventions."""

import math

import pytest
import torch

from lerobot_policy_grids.errors import BudgetError, GridsError, TokenGridError
from lerobot_policy_grids.reducers import reducer_config
from lerobot_policy_grids.reducers.reference import CONVENTIONS, ReferenceSampler


def sampler_of(convention, cells=6, k=5, width=3, spread=1.0, **options):
    sampler = ReferenceSampler(
        (cells, cells), width, k, convention=convention, hidden_width=8, **{"geometry_width": 4} | options
    )
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return sampler


def formula(sampler, feature_map, convention):
    """Tokens and points of one map [n, n, c], by plain numbers (paper: coordinate prediction, grid sampling)."""

    def mlp(prefix, values):
        weights = {name.removeprefix(prefix): value.tolist() for name, value in sampler.state_dict().items()}

        def layer(number, inputs):
            pairs = zip(weights[f".{number}.weight"], weights[f".{number}.bias"], strict=True)
            return [sum(w * x for w, x in zip(row, inputs, strict=True)) + bias for row, bias in pairs]

        return layer(2, [max(0.0, x) for x in layer(0, values)])

    n, cells = len(feature_map), feature_map.tolist()
    mean = [sum(cells[i][j][c] for i in range(n) for j in range(n)) / n**2 for c in range(feature_map.shape[-1])]
    numbers = [1 / (1 + math.exp(-x)) for x in mlp("scout_mlp", mean)]
    points, tokens = list(zip(numbers[::2], numbers[1::2], strict=True)), []
    for point in points:
        column, row = (p * n - 0.5 if convention == "lerobot" else p * (n - 1) for p in point)
        token = mlp("coord_encoder", point)
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < n and 0 <= j < n:
                    weight = (1 - abs(row - i)) * (1 - abs(column - j))
                    token = [t + weight * value for t, value in zip(token, cells[i][j], strict=True)]
        tokens.append(token)
    return torch.tensor(tokens), torch.tensor(points)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_it_is_the_formula(convention, spread):
    torch.manual_seed(5)
    sampler = sampler_of(convention, spread=spread)
    maps = torch.randn(4, 6, 6, 3)
    tokens, coordinates = sampler(maps)
    for number, feature_map in enumerate(maps):
        expected, points = formula(sampler, feature_map, convention)
        torch.testing.assert_close(tokens[number], expected, atol=1e-5, rtol=1e-5)
        places = points if convention == "lerobot" else (points * 5 + 0.5) / 6
        torch.testing.assert_close(coordinates[number], places, atol=1e-6, rtol=0)
    other = next(name for name in CONVENTIONS if name != convention)
    assert (formula(sampler, maps[0], other)[0] - tokens[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("convention", "logit", "value"),
    [("lerobot", 40.0, 0.25), ("lerobot", -40.0, 0.25), ("openpi", 40.0, 1.0), ("openpi", -40.0, 1.0)],
)
def test_the_border_is_what_the_convention_says(convention, logit, value):
    """A map of ones, read in its corner."""
    sampler = sampler_of(convention, geometry_width=0)
    torch.nn.init.zeros_(sampler.scout_mlp[2].weight)
    torch.nn.init.constant_(sampler.scout_mlp[2].bias, logit)
    assert torch.equal(sampler(torch.ones(1, 6, 6, 3)).tokens, torch.full((1, 5, 3), value))


def test_half_precision_rounds_no_coordinate():
    sampler = sampler_of("lerobot", spread=0.5).bfloat16()
    sampled = sampler(torch.randn(2, 6, 6, 3, dtype=torch.bfloat16))
    assert (sampled.tokens.dtype, sampled.coordinates.dtype) == (torch.bfloat16, torch.float32)
    assert (sampled.coordinates * 256 - (sampled.coordinates * 256).round()).abs().max() > 0.01


def test_what_it_cannot_do_is_refused():
    with pytest.raises(TokenGridError, match="published for square maps, and this policy's is 6 x 8"):
        ReferenceSampler((6, 8), 3, 5)
    with pytest.raises(BudgetError, match="num_tokens=4, but these published weights predict 5 coordinates; drop it"):
        sampler_of("lerobot").num_tokens = 4
    with pytest.raises(BudgetError, match="has one K, so drop num_tokens_max"):
        reducer_config("reference", num_tokens=4, num_tokens_max=8)
    with pytest.raises(GridsError, match="convention 'jax' is unknown; choose one of lerobot, openpi"):
        reducer_config("reference", convention="jax")
