"""Blind: no visual tokens at all. The floor that any way of looking must beat."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import BudgetError
from ..reducer import Sampled


class BlindReducer(nn.Module):
    """Hand the trunk zero tokens. Adapters skip the vision tower when `num_tokens` is 0."""

    num_tokens_max = 0
    condition_on: tuple[str, ...] = ()
    in_trunk = False

    @property
    def num_tokens(self) -> int:
        """Always 0."""
        return 0

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        raise BudgetError(f"num_tokens={value}, but this policy is blind: it was trained without visual tokens")

    def check_budget(self, num_tokens: int) -> None:
        """Nothing to check: there is no budget."""

    def tokens_of(self, camera: int) -> int:
        """Always 0."""
        return 0

    def forward(
        self, feature_map: Tensor, context: Mapping[str, Tensor] | None = None, num_tokens: int | None = None
    ) -> Sampled:
        """Drop the feature map [b, h, w, c].

        Returns:
            `Sampled(tokens [b, 0, c], coordinates [b, 0, 2])`.
        """
        batch, channels = len(feature_map), feature_map.shape[-1]
        return Sampled(feature_map.new_zeros(batch, 0, channels), feature_map.new_zeros(batch, 0, 2).float())
