"""Reading a feature map against independent truths: a ramp, an all-ones map, F.grid_sample, F.interpolate."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lerobot_policy_grids.reducers.interpolation import antialiased, bilinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.03, 0.97]])
# A tent that reaches one cell is bilinear interpolation.
READERS = {"bilinear": bilinear, "antialiased": lambda feature_map, pixels: antialiased(feature_map, pixels, 1.0)}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def pixels_of(coordinates, height, width):
    return coordinates * torch.tensor([width, height]) - 0.5


def ramp(height, width):
    """The value at a cell is its own coordinate (x, y)."""
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def grid_sample(feature_map, coordinates):
    read = F.grid_sample(
        feature_map.permute(0, 3, 1, 2),
        (2 * coordinates - 1)[:, :, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return read[..., 0].transpose(1, 2)


@every_reader
@pytest.mark.parametrize(("height", "width"), [(12, 12), (5, 9), (1, 4)])
def test_linear_ramp_is_read_exactly(read, height, width):
    size = torch.tensor([width, height])
    coordinates = (torch.rand(1, 50, 2) * (size - 1) + 0.5) / size  # between the outermost cell centres
    values = read(ramp(height, width), pixels_of(coordinates, height, width))
    torch.testing.assert_close(values, coordinates, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [None, 1.0, 2.6, 40.0])
def test_all_ones_map_stays_one_everywhere(reach, dtype):
    pixels = pixels_of(torch.cat([EDGES, torch.rand(200, 2)])[None], 7, 5)
    ones = torch.ones(1, 7, 5, 3, dtype=dtype)
    values = bilinear(ones, pixels) if reach is None else antialiased(ones, pixels, reach)
    assert values.dtype == dtype
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)


@every_reader
@pytest.mark.parametrize(("height", "width"), [(12, 12), (4, 7)])
def test_agrees_with_grid_sample(read, height, width):
    feature_map = torch.randn(2, height, width, 3)
    coordinates = torch.cat([EDGES.expand(2, -1, -1), torch.rand(2, 60, 2)], dim=1)
    values = read(feature_map, pixels_of(coordinates, height, width))
    torch.testing.assert_close(values, grid_sample(feature_map, coordinates), atol=1e-5, rtol=0)


@every_reader
def test_gradients_agree_with_grid_sample(read):
    feature_map = torch.randn(1, 6, 5, 2, requires_grad=True)
    coordinates = (0.1 + 0.8 * torch.rand(1, 9, 2)).requires_grad_()
    weights = torch.randn(1, 9, 2)
    ours = (read(feature_map, pixels_of(coordinates, 6, 5)) * weights).sum()
    theirs = (grid_sample(feature_map, coordinates) * weights).sum()
    for got, want in zip(
        torch.autograd.grad(ours, (feature_map, coordinates)),
        torch.autograd.grad(theirs, (feature_map, coordinates)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing", [2, 3, 4])
def test_antialiased_on_a_lattice_is_antialiased_resizing(spacing):
    feature_map = torch.randn(2, 12, 24, 3)
    shape = (12 // spacing, 24 // spacing)
    resized = F.interpolate(feature_map.permute(0, 3, 1, 2), shape, mode="bilinear", antialias=True)
    pixels = pixels_of(ramp(*shape).flatten(1, 2).expand(2, -1, -1), 12, 24)
    values = antialiased(feature_map, pixels, float(spacing))
    torch.testing.assert_close(values, resized.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_antialiased_feels_what_bilinear_does_not():
    """A bright cell two cells away moves the reading, and its gradient says in which direction it lies."""
    feature_map = torch.zeros(1, 9, 9, 1)
    feature_map[0, 4, 6] = 1.0
    pixels = torch.tensor([[[4.0, 4.0]]], requires_grad=True)
    assert bilinear(feature_map, pixels).item() == 0
    value = antialiased(feature_map, pixels, 3.0)
    assert value.item() > 0
    (gradient,) = torch.autograd.grad(value.sum(), pixels)
    assert gradient[0, 0, 0] > 0
    assert gradient[0, 0, 1] == pytest.approx(0, abs=1e-6)
