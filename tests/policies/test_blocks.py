"""Tokens that are blocks of patches, against loops over patches."""

import pytest
import torch

from lerobot_policy_grids.errors import TokenGridError
from lerobot_policy_grids.reducers.blocks import block_means, patch_positions, spread
from lerobot_policy_grids.reducers.grid_sampler import GridSampler
from lerobot_policy_grids.reducers.mean_sampler import MeanSampler

GRID, BLOCK, WIDTH = (4, 6), 3, 8
PATCHES = torch.randn(2, GRID[0] * BLOCK, GRID[1] * BLOCK, WIDTH)


def in_blocks(patches):
    """Every block of the map, row by row, and its patches, row by row."""
    blocks = [
        patches[:, row : row + BLOCK, column : column + BLOCK].flatten(1, 2)
        for row in range(0, patches.shape[1], BLOCK)
        for column in range(0, patches.shape[2], BLOCK)
    ]
    return torch.cat(blocks, dim=1)


def trained(sampler):
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return sampler.eval()


def test_positions_of_whole_cells_are_their_patches():
    cells = torch.tensor([[[2.0, 1.0], [0.5, 0.0]]])
    positions = patch_positions(cells, 2)
    assert positions[0, :4].tolist() == [[4, 2], [5, 2], [4, 3], [5, 3]]
    assert positions[0, 4:].tolist() == [[1, 0], [2, 0], [1, 1], [2, 1]]
    assert torch.equal(patch_positions(cells, 1), cells)


def test_means_are_those_of_the_blocks():
    means = in_blocks(PATCHES).unflatten(1, (-1, BLOCK * BLOCK)).mean(2)
    torch.testing.assert_close(block_means(PATCHES, BLOCK).flatten(1, 2), means)
    assert torch.equal(block_means(PATCHES, 1), PATCHES)


@pytest.mark.parametrize("make", [GridSampler, MeanSampler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", [(0.0, 0.0, 1.0, 1.0), (0.0, 0.25, 1.0, 0.75)])
def test_all_tokens_are_all_blocks(make, dtype, region):
    options = {"geometry_width": 0, "block": BLOCK, "regions": [region]}
    if make is MeanSampler:
        sampler = make(GRID, WIDTH, 24, condition_on=(), **options).to(dtype)
    else:
        sampler = trained(make(GRID, WIDTH, 24, **options)).to(dtype)
    patches = PATCHES.to(dtype)
    assert torch.equal(sampler(patches).tokens, in_blocks(patches))


def test_a_token_is_the_patches_of_its_place_and_what_every_patch_gets():
    """One token of 24 at a time: sharp patches at p * s + i, and the same value and geometry for each of them."""
    sampler = trained(GridSampler(GRID, WIDTH, 5, block=BLOCK, reading_width=1.0))
    tokens, coordinates = sampler(PATCHES)
    assert tokens.shape == (2, 5 * BLOCK * BLOCK, WIDTH)
    cells = coordinates * torch.tensor([GRID[1], GRID[0]]) - 0.5
    image = PATCHES.permute(0, 3, 1, 2)
    rest = []
    for i in range(BLOCK):
        for j in range(BLOCK):
            place = (cells * BLOCK + torch.tensor([float(j), float(i)]) + 0.5) / torch.tensor([18.0, 12.0])
            read = torch.nn.functional.grid_sample(
                image, 2 * place[:, None] - 1, align_corners=False, padding_mode="border"
            )
            rest.append(tokens[:, BLOCK * i + j :: BLOCK * BLOCK] - read[:, :, 0].transpose(1, 2))
    rest = torch.stack(rest)
    assert rest.abs().max() > 0.1
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), atol=1e-5, rtol=1e-4)
    geometry = sampler.geometry(coordinates)
    sampler.value = None
    torch.testing.assert_close(
        sampler(PATCHES).tokens - spread(geometry, BLOCK), tokens - spread(rest[0], BLOCK), atol=1e-5, rtol=1e-4
    )


def test_where_it_looks_is_read_off_the_means():
    """Its coordinates are those of a sampler on the cells."""
    sampler = trained(GridSampler(GRID, WIDTH, 5, block=BLOCK))
    plain = GridSampler(GRID, WIDTH, 5)
    plain.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(
        sampler(PATCHES).coordinates, plain(block_means(PATCHES, BLOCK)).coordinates, atol=1e-6, rtol=0
    )


def test_a_map_of_cells_is_refused():
    with pytest.raises(TokenGridError, match=r"built for \(12, 18\)"):
        GridSampler(GRID, WIDTH, 5, block=BLOCK)(torch.randn(1, *GRID, WIDTH))
