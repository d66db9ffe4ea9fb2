"""Each reducer against an independent truth."""

import pytest
import torch
from torch.nn import functional

from driving import config_of
from lerobot_policy_grids.errors import BudgetError, TokenGridError
from lerobot_policy_grids.reducers.attention import FastVReducer, Prefix, SparseVLMReducer, cluster, raters
from lerobot_policy_grids.reducers.lattice import PoolReducer, UniformReducer, lattice_shape
from lerobot_policy_grids.reducers.layout import cell_coordinates
from lerobot_policy_grids.reducers.random import RandomReducer
from lerobot_policy_grids.reducers.tome import ToMeReducer, merge_most_similar

LOWER_HALF = (0.0, 0.5, 1.0, 1.0)
KINDS = (UniformReducer, PoolReducer, RandomReducer, ToMeReducer)


@pytest.fixture
def feature_map():
    torch.manual_seed(0)
    return torch.randn(3, 12, 12, 8)


@pytest.mark.parametrize(
    ("k", "grid", "shape"),
    [(16, (12, 12), (4, 4)), (24, (12, 12), (4, 6)), (8, (6, 12), (2, 4)), (1, (12, 12), (1, 1))],
)
def test_the_lattice_is_the_squarest(k, grid, shape):
    assert lattice_shape(k, grid) in (shape, shape[::-1] if grid[0] == grid[1] else shape)


def test_a_budget_without_a_lattice_names_those_near_it():
    with pytest.raises(BudgetError, match=r"17 tokens make no even lattice over .*; choose one of .*16, 18"):
        UniformReducer((12, 12), 17)


def test_uniform_is_grid_sample_at_the_lattice(feature_map):
    tokens, coordinates = UniformReducer((12, 12), 25)(feature_map)
    axis = torch.linspace(-0.8, 0.8, 5)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1], dim=-1).expand(3, -1, -1, -1)
    expected = functional.grid_sample(feature_map.permute(0, 3, 1, 2), grid, align_corners=False)
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(coordinates, (grid.flatten(1, 2) + 1) / 2)


def test_pool_is_average_pooling(feature_map):
    tokens, coordinates = PoolReducer((12, 12), 16)(feature_map)
    expected = functional.avg_pool2d(feature_map.permute(0, 3, 1, 2), 3)
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(coordinates[0, 5], torch.tensor([1.5 / 4, 1.5 / 4]))


@pytest.mark.parametrize("kind", [UniformReducer, PoolReducer, RandomReducer])
def test_letterbox_padding_is_left_out(kind, feature_map):
    feature_map[:, :6] = torch.nan
    tokens, coordinates = kind((12, 12), 8, regions=[LOWER_HALF])(feature_map)
    assert tokens.isfinite().all()
    assert (coordinates[..., 1] > 0.5).all()


def test_random_keeps_a_new_subset_for_every_image(feature_map):
    cells = torch.arange(144.0).view(1, 12, 12, 1).expand(3, -1, -1, -1)
    reducer = RandomReducer((12, 12), 16).eval()
    torch.manual_seed(1)
    first, second = (reducer(cells).tokens[..., 0] for _ in range(2))
    assert (first.diff(dim=1) > 0).all()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    again = RandomReducer((12, 12), 16).eval()
    torch.manual_seed(1)
    tokens, coordinates = again(cells)
    assert torch.equal(tokens[..., 0], first)
    assert torch.equal(coordinates, cell_coordinates((12, 12))[first.long()])
    counts = torch.stack([reducer(cells).tokens for _ in range(300)]).long().flatten().bincount(minlength=144)
    # 900 images of 16: each cell 100 times, 9.4 standard deviation.
    assert (counts - 100).abs().max() < 50


@pytest.mark.parametrize("k", [1, 4, 16, 24, 71, 73, 143, 144])
def test_merging_is_a_partition_into_means(feature_map, k):
    tokens, _ = ToMeReducer((12, 12), k)(feature_map)
    assert tokens.shape == (3, k, 8)
    rows, sizes, places = feature_map.flatten(1, 2), torch.ones(3, 144, 1), cell_coordinates((12, 12)).expand(3, -1, -1)
    while rows.shape[1] > k:
        rows, sizes, places = merge_most_similar(rows, sizes, places, min(rows.shape[1] // 2, rows.shape[1] - k))
    assert torch.equal(sizes.sum((1, 2)), torch.full((3,), 144.0))
    torch.testing.assert_close((rows * sizes).sum(1), feature_map.flatten(1, 2).sum(1), atol=1e-3, rtol=0)
    torch.testing.assert_close((places * sizes).sum(1), torch.full((3, 2), 72.0))
    torch.testing.assert_close(tokens.sum(1), rows.sum(1), atol=1e-4, rtol=0)


def test_what_is_alike_is_merged_and_what_is_not_stays():
    rows = torch.eye(8)[:4][torch.arange(144) // 36].clone()
    rows[70], rows[71] = torch.eye(8)[6], torch.eye(8)[7]
    sizes, places = torch.ones(1, 144, 1), cell_coordinates((12, 12))[None]
    tokens, sizes, _ = merge_most_similar(rows[None], sizes, places, 71)
    assert tokens.shape == (1, 73, 8)
    # The 71 strongest edges join equals, so no token is a mixture.
    assert torch.equal(tokens.max(-1).values, torch.ones(1, 73))
    for lone in (6, 7):
        assert torch.equal(tokens[0, :, lone].sort().values, torch.eye(73)[-1])
    torch.testing.assert_close((tokens * sizes).sum((0, 1)), rows.sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_maps_and_budgets_are_refused(kind):
    reducer = kind((12, 12), 16)
    with pytest.raises(TokenGridError, match="built for"):
        reducer(torch.randn(1, 6, 6, 8))
    with pytest.raises(BudgetError, match=r"1 \.\. 16"):
        reducer.num_tokens = 17
    with pytest.raises(BudgetError, match=r"1 \.\. 144"):
        kind((12, 12), 145)


def prefix(n=144, words=6, width=8):
    torch.manual_seed(2)
    mask = torch.ones(2, words, dtype=torch.bool)
    mask[0, -2:] = False
    attention = torch.rand(2, n + words, n)
    attention[0, -2:] = 0
    return Prefix(torch.randn(2, n, width), torch.randn(2, words, width), mask, attention, attention[:, n:])


def test_fastv_keeps_what_received_most_attention_wherever_it_lies():
    scene = prefix()
    loved = torch.tensor([[3, 77, 140], [0, 1, 143]])
    scene.attention.scatter_add_(2, loved[:, None].expand(-1, 150, -1), torch.full((2, 150, 3), 5.0))
    tokens, coordinates, index = FastVReducer((12, 12), 3)(scene, cameras=1)
    assert torch.equal(index, loved)
    assert torch.equal(tokens[1], scene.visual[1, loved[1]])
    assert torch.equal(coordinates, cell_coordinates((12, 12))[loved])


def test_raters_are_the_words_most_like_the_image():
    scene = prefix()
    text = torch.zeros(2, 6, 8)
    text[:, 2] = scene.visual.mean(1) * 50
    # Padding is no word, however alike.
    text[0, 5] = scene.visual[0].mean(0) * 100
    assert raters(scene._replace(text=text)).tolist() == [[i == 2 for i in range(6)]] * 2


def test_a_uniform_instruction_rates_as_a_whole():
    scene = prefix()
    assert torch.equal(raters(scene._replace(text=torch.zeros(2, 6, 8))), scene.text_mask)


def test_clusters_are_the_planted_ones():
    torch.manual_seed(3)
    group = torch.arange(30) % 3
    points = torch.eye(8)[:3][group] * 10 + 0.01 * torch.randn(30, 8)
    centres, cluster_of = cluster(points[None], 3)
    assert sorted(group[centres[0]].tolist()) == [0, 1, 2]
    for i in range(3):
        assert len(set(group[cluster_of[0] == i].tolist())) == 1


def test_sparsevlm_keeps_what_raters_look_at_and_recycles_the_best_of_the_rest():
    scene = prefix()
    text = torch.zeros(2, 6, 8)
    text[:, 2] = scene.visual.mean(1) * 50
    attention = scene.text_attention.clone()
    attention[:, 2] = torch.arange(144.0)
    scene = scene._replace(text=text, text_attention=attention)
    tokens, _, index = SparseVLMReducer((12, 12), 16)(scene, cameras=1)
    assert tokens.shape == (2, 16, 8)
    kept = list(range(132, 144))
    assert index[0, -12:].tolist() == kept
    assert torch.equal(tokens[0, -12:], scene.visual[0, kept])
    # The best 30 % of the 132 others, in four clusters, of which means are left.
    recycled = scene.visual[0, 92:132]
    assert set(index[0, :4].tolist()) <= set(range(92, 132))
    for token in tokens[0, :4]:
        assert recycled.min(0).values.le(token + 1e-6).all()
        assert recycled.max(0).values.ge(token - 1e-6).all()


@pytest.mark.parametrize("reducer", ["uniform", "pool"])
def test_budgets_without_a_lattice_are_refused_before_training(reducer):
    from lerobot.configs import FeatureType, PolicyFeature

    from lerobot_policy_grids import GridsPolicy, TinySmolVLAConfig

    inputs = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    base = TinySmolVLAConfig(device="cpu", input_features=inputs, output_features=outputs)

    def make(**options):
        return GridsPolicy(config_of(base, reducer, num_tokens=4, num_tokens_max=16, **options))

    policy = make()
    for budget in ("elastic", "linear"):
        with pytest.raises(BudgetError, match="no even lattice"):
            make(schedule=budget, schedule_steps=10 if budget == "linear" else 0)
    with pytest.raises(BudgetError, match="no even lattice"):
        make(camera_tokens={"observation.image": 7}, schedule="steps:0=16")
    with pytest.raises(BudgetError, match="7 tokens make no even lattice"):
        policy.num_tokens = 7
    assert policy.num_tokens == 4


def test_random_draws_leave_the_policys_noise_alone(feature_map):
    reducer = RandomReducer((12, 12), 16)
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    reducer(feature_map)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize("kind", [ToMeReducer, PoolReducer, UniformReducer])
def test_autocast_does_not_change_what_is_kept(kind, feature_map):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = kind((12, 12), 16)(feature_map)
    exact = kind((12, 12), 16)(feature_map)
    torch.testing.assert_close(rounded.tokens, exact.tokens)
    torch.testing.assert_close(rounded.coordinates, exact.coordinates)
