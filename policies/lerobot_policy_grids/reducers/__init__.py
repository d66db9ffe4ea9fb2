"""Reducers: ways of handing the trunk fewer visual tokens, all behind one interface.

A reducer is an `nn.Module` with `num_tokens` (per camera, settable), `num_tokens_max`, `tokens_of(camera)`,
`condition_on` (what its context holds) and `forward(feature_map [b, h, w, c], context, num_tokens) -> Sampled`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..adapters import TokenLayout
from ..errors import BudgetError
from ..sampler import GridSampler
from .blind import BlindReducer

if TYPE_CHECKING:
    from ..configuration_grids import GridsConfig


def _make_grids(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    if config.max_tokens > layout.num_dense_tokens:
        height, width = layout.token_grid
        raise BudgetError(
            f"{config.max_tokens} tokens per camera asked, but the dense policy has {height} x {width} = "
            f"{layout.num_dense_tokens}; choose 1 .. {layout.num_dense_tokens}, or 'dense' to train the policy as it is"
        )
    return GridSampler(
        layout.token_grid,
        layout.width,
        config.num_tokens,
        num_tokens_max=config.max_tokens,
        # A policy without proprioception has no state to depend on.
        condition_on=[name for name in config.condition_on if name != "state" or layout.state_width > 0],
        language_width=layout.language_width,
        state_width=layout.state_width,
        num_cameras=len(layout.cameras),
        camera_limits=_camera_limits(config.camera_tokens, layout.cameras),
        region=layout.region,
        hidden_width=config.hidden_width,
        geometry_width=config.geometry_width,
    )


def _camera_limits(camera_tokens: dict[str, int], cameras: tuple[str, ...]) -> dict[int, int]:
    for name, limit in camera_tokens.items():
        if name not in cameras:
            raise BudgetError(f"camera_tokens names '{name}'; the policy's cameras are {', '.join(cameras)}")
        if limit < 1:
            raise BudgetError(f"camera_tokens gives {limit} tokens to '{name}'; give at least 1")
    return {number: camera_tokens[name] for number, name in enumerate(cameras) if name in camera_tokens}


def _make_blind(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    return BlindReducer()


REDUCERS: dict[str, Callable[["GridsConfig", TokenLayout], nn.Module]] = {
    "grids": _make_grids,
    "blind": _make_blind,
}


def make_reducer(config: "GridsConfig", layout: TokenLayout) -> nn.Module:
    """Build the reducer that `config.reducer` names for a policy with this token layout.

    Raises:
        BudgetError: If the budget does not fit the token grid.
    """
    return REDUCERS[config.reducer](config, layout)


__all__ = ["REDUCERS", "BlindReducer", "make_reducer"]
