"""Compare reducer `reference` with the authors' own modules, on random weights and maps.

    git clone https://github.com/Fediory/Grid-Sampler
    python benchmarks/reference_sampler.py Grid-Sampler

The script runs code of that clone: the sampler of its LeRobot tree, and that of its openpi tree where jax, flax, einops
and matplotlib are installed. It prints the largest difference of a token beside the largest value. Weights are drawn
with three deviations: with the first, points stay in the middle of the map; with the last, most lie at its border.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from lerobot_policy_grids.reducers.reference import ReferenceSampler

LEROBOT, OPENPI = "lerobot/src/lerobot/policies/active_token_sampler.py", "openpi/src/openpi/models/grid.py"
NEEDED = ("jax", "flax", "einops", "matplotlib")
DEVIATIONS = (0.02, 0.3, 3.0)
K, MAPS = 16, 4


def module_at(path: Path) -> Any:
    """Execute a file of the clone."""
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"{path} is not there; give a clone of https://github.com/Fediory/Grid-Sampler")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampler(cells: int, width: int, convention: str, deviation: float) -> ReferenceSampler:
    """This project's, with random weights."""
    ours = ReferenceSampler((cells, cells), width, K, convention=convention).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=deviation)
    return ours


def lerobots(clone: Path, ours: ReferenceSampler, maps: torch.Tensor) -> torch.Tensor:
    """Tokens [n, K, c] of maps [n, h, w, c] by the module of the LeRobot tree."""
    theirs = module_at(clone / LEROBOT).ActiveTokenSampler(maps.shape[-1], K).eval()
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    tokens: torch.Tensor = theirs(maps.permute(0, 3, 1, 2))
    return tokens


def openpis(clone: Path, ours: ReferenceSampler, maps: torch.Tensor) -> torch.Tensor:
    """The same by the module of the openpi tree, in float32."""
    import numpy as np

    theirs = module_at(clone / OPENPI).ActiveTokenSampler(vision_dim=maps.shape[-1], num_tokens=K)
    weights = {name: value.numpy() for name, value in ours.state_dict().items()}
    # A kernel of flax is [inputs, outputs]. Layers are numbered as they are listed, activations included.
    layers = {
        mlp: {
            f"layers_{layer}": {"kernel": weights[f"{mlp}.{layer}.weight"].T, "bias": weights[f"{mlp}.{layer}.bias"]}
            for layer in (0, 2)
        }
        for mlp in ("scout_mlp", "coord_encoder")
    }
    tokens, _ = theirs.apply({"params": layers}, maps.numpy())
    return torch.from_numpy(np.array(tokens))


def main(clone: str) -> None:
    """Print the differences.

    Args:
        clone: Folder of a clone of the authors' repository.
    """
    trees = {"lerobot": (lerobots, 8, 960), "openpi": (openpis, 16, 2048)}
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        del trees["openpi"]
        print(f"openpi's module is not compared, because it needs {', '.join(absent)}")
    for tree, (theirs, cells, width) in trees.items():
        for deviation in DEVIATIONS:
            torch.manual_seed(0)
            ours = sampler(cells, width, tree, deviation)
            maps = torch.randn(MAPS, cells, cells, width)
            with torch.no_grad():
                expected, tokens = theirs(Path(clone), ours, maps), ours(maps).tokens
            difference, largest = (tokens - expected).abs().max(), expected.abs().max()
            print(f"{tree}, weights of deviation {deviation}: differs by {difference:.1e} of {largest:.1f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
