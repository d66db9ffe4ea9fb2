"""Reducers: ways of handing the trunk fewer visual tokens, all behind one interface (`reducer.Reducer`).

Most sit between vision tower and trunk: `forward(feature_map [b, h, w, c], context, num_tokens) -> Sampled`. Those of
`trunk` drop tokens between two layers of the trunk, where the family's adapter can.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters import TokenLayout
from ..errors import BudgetError
from ..sampler import GridSampler
from .blind import BlindReducer
from .fastv import FastVReducer
from .merge import MergeReducer
from .pool import PoolReducer
from .random import RandomReducer
from .sparsevlm import SparseVLMReducer
from .trunk import TrunkReducer
from .uniform import UniformReducer

if TYPE_CHECKING:
    from ..configuration_grids import GridsConfig


def _make_grids(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    return GridSampler(
        layout.token_grid,
        layout.width,
        **_budgets(config, layout),
        # A policy without proprioception has no state to depend on.
        condition_on=[name for name in config.condition_on if name != "state" or layout.state_width > 0],
        language_width=layout.language_width,
        state_width=layout.state_width,
        num_cameras=len(layout.cameras),
        region=layout.region,
        hidden_width=config.hidden_width,
        geometry_width=config.geometry_width,
        anchored=config.anchored,
        interpolation=config.interpolation,
    )


def _make_blind(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    return BlindReducer()


def _make_merge(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    return MergeReducer(layout.token_grid, **_budgets(config, layout))


def _within_region(kind: Callable[..., nn.Module]) -> "Make":
    return lambda config, layout: kind(layout.token_grid, **_budgets(config, layout), region=layout.region)


def _in_trunk(kind: Callable[..., nn.Module]) -> "Make":
    def make(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
        if config.camera_tokens:
            raise BudgetError(
                f"reducer '{config.reducer}' ranks the tokens of all cameras together; drop camera_tokens"
            )
        return kind(layout.token_grid, **_budgets(config, layout), layers=config.full_layers)

    return make


def _budgets(config: "GridsConfig", layout: TokenLayout) -> dict[str, Any]:
    if config.max_tokens > layout.num_dense_tokens:
        height, width = layout.token_grid
        raise BudgetError(
            f"{config.max_tokens} tokens per camera asked, but the dense policy has {height} x {width} = "
            f"{layout.num_dense_tokens}; choose 1 .. {layout.num_dense_tokens}, or 'dense' to train the policy as it is"
        )
    return {
        "num_tokens": config.num_tokens,
        "num_tokens_max": config.max_tokens,
        "camera_limits": _camera_limits(config.camera_tokens, layout.cameras),
    }


def _camera_limits(camera_tokens: dict[str, int], cameras: tuple[str, ...]) -> dict[int, int]:
    for name, limit in camera_tokens.items():
        if name not in cameras:
            raise BudgetError(f"camera_tokens names '{name}'; the policy's cameras are {', '.join(cameras)}")
        if limit < 1:
            raise BudgetError(f"camera_tokens gives {limit} tokens to '{name}'; give at least 1")
    return {number: camera_tokens[name] for number, name in enumerate(cameras) if name in camera_tokens}


Make = Callable[["GridsConfig", TokenLayout], nn.Module]

# In the order in which they are told to users; the names are in configuration_grids.REDUCER_NAMES.
REDUCERS: dict[str, Make] = {
    "grids": _make_grids,
    "uniform": _within_region(UniformReducer),
    "pool": _within_region(PoolReducer),
    "random": _within_region(RandomReducer),
    "merge": _make_merge,
    "fastv": _in_trunk(FastVReducer),
    "sparsevlm": _in_trunk(SparseVLMReducer),
    "blind": _make_blind,
}


def make_reducer(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    """Build the reducer that `config.reducer` names for a policy with this token layout.

    Raises:
        BudgetError: If the budget does not fit the token grid.
    """
    return REDUCERS[config.reducer](config, layout)


__all__ = ["REDUCERS", "BlindReducer", "TrunkReducer", "make_reducer"]
