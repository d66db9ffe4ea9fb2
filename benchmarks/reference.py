"""Compare reducer `reference` with the modules of the paper's repository, on random weights and feature maps.

    git clone https://github.com/Fediory/Grid-Sampler
    python benchmarks/reference.py Grid-Sampler

The repository has no licence, so nothing of it is here: its modules are run where they lie. It has three: the one of
its LeRobot tree, openpi's in JAX, and an example in PyTorch. openpi's needs jax, flax, einops and matplotlib, and is
left out without; it gets its weights in the layout in which openpi saves them. Maps and weights have the sizes of
SmolVLA and π0. One line per module: the largest difference of a token's entry, and the largest entry. The exit status
is 1 if a module differs by more than rounding.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lerobot_policy_grids.reducers.reference import ReferenceSampler

TOKENS, MAPS = 16, 4
# Standard deviations of weights, and of the biases that spread the points over the map. Larger weights let float32's
# own rounding of coordinates show in the tokens.
SPREAD, PLACES = 0.03, 2.0
# The largest difference, as a share of the largest entry.
ROUNDING = 1e-5
Run = Callable[[ModuleType, ReferenceSampler, Tensor], Tensor]


def run_lerobot(module: ModuleType, ours: ReferenceSampler, maps: Tensor) -> Tensor:
    theirs = module.ActiveTokenSampler(ours.width, TOKENS)
    theirs.load_state_dict(weights_of(ours))
    tokens: Tensor = theirs(maps.permute(0, 3, 1, 2))
    return tokens


def run_example(module: ModuleType, ours: ReferenceSampler, maps: Tensor) -> Tensor:
    theirs = module.ActiveTokenSamplerTorch(ours.width, TOKENS)
    theirs.load_state_dict(weights_of(ours))
    tokens: Tensor = theirs(maps)[0]
    return tokens


def run_openpi(module: ModuleType, ours: ReferenceSampler, maps: Tensor) -> Tensor:
    """Weights as JAX has them: `scout_mlp/layers_0/kernel`, [in, out]."""
    layers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, value in weights_of(ours).items():
        part, number, kind = name.split(".")
        layer = layers.setdefault(part, {}).setdefault(f"layers_{number}", {})
        layer["kernel" if kind == "weight" else "bias"] = value.numpy().T
    tokens, _ = module.ActiveTokenSampler(ours.width, TOKENS).apply({"params": layers}, maps.numpy())
    return torch.from_numpy(np.array(tokens))


def weights_of(ours: ReferenceSampler) -> dict[str, Tensor]:
    return {name: value for name, value in ours.state_dict().items() if name.startswith(("scout_mlp", "coord_encoder"))}


# File in the clone -> (convention, side of the map, its width, how it is run).
MODULES: dict[str, tuple[str, int, int, Run]] = {
    "lerobot/src/lerobot/policies/active_token_sampler.py": ("lerobot", 8, 960, run_lerobot),
    "openpi/src/openpi/models/grid.py": ("openpi", 16, 2048, run_openpi),
    "core_idea/grid_pytorch.py": ("openpi", 16, 2048, run_example),
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def compare(clone: Path, name: str, seed: int = 0) -> tuple[float, float]:
    """(Largest difference, largest entry) of a module's tokens.

    Raises:
        ImportError: If the module needs a package that is not installed.
    """
    convention, side, width, run = MODULES[name]
    module = load(clone / name)
    torch.manual_seed(seed)
    ours = ReferenceSampler((side, side), width, TOKENS, convention=convention)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=SPREAD)
    torch.nn.init.normal_(ours.scout_mlp[2].bias, std=PLACES)  # type: ignore[arg-type]
    maps = torch.randn(MAPS, side, side, width)
    theirs = run(module, ours, maps)
    return float((ours(maps).tokens - theirs).abs().max()), float(theirs.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="folder of a clone of the paper's repository")
    parser.add_argument("--seed", type=int, default=0, help="of weights and feature maps")
    options = parser.parse_args()
    missing = [name for name in MODULES if not (options.clone / name).is_file()]
    if missing:
        parser.error(f"{options.clone} has no {missing[0]}; give a clone of the paper's repository")
    head = subprocess.run(
        ["git", "-C", options.clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    print(f"commit {head.stdout.strip() or 'unknown'}, torch {torch.__version__}")
    differs = False
    for name, (convention, *_) in MODULES.items():
        try:
            difference, largest = compare(options.clone, name, options.seed)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        differs |= difference > ROUNDING * largest
        print(f"{name}: convention {convention}, difference {difference:.1e}, largest entry {largest:.1f}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
