"""The visual tokens of a policy."""

from dataclasses import dataclass

from ..anchors import Region


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens a base policy hands to its trunk.

    Attributes:
        token_grid: (H, W) of one camera's feature map.
        width: C, channels of a visual token.
        cameras: Feature keys of the cameras, in the order in which the policy numbers them.
        language_width: Channels of an embedded language token.
        state_width: Dimensions of the (padded) robot state.
        region: The part of the vision tower's input that holds any camera's image and not only padding.
    """

    token_grid: tuple[int, int]
    width: int
    cameras: tuple[str, ...]
    language_width: int
    state_width: int
    region: Region

    @property
    def num_dense_tokens(self) -> int:
        """N = H * W, visual tokens per camera of the dense policy."""
        return self.token_grid[0] * self.token_grid[1]
