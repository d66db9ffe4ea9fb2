"""Lengths to which instructions are cut or padded, so that few different shapes occur."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LENGTHS = (16, 32, 48, 64, 96, 128, 200)
# Beyond the largest.
FURTHER = 64


def bucket(length: int) -> int:
    """The smallest length in use that is at least `length`."""
    return next((size for size in LENGTHS if size >= length), -(-length // FURTHER) * FURTHER)


def to_bucket(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the padding at the end of instructions, or add some. Nothing attends to it, so the policy does the same.

    Reads one number back from the device: the policy's tokenizer does not say how long the instruction is.

    Args:
        tokens: int64 [b, l].
        mask: bool [b, l], false for padding.

    Returns:
        The same with l a length in use.
    """
    mask = mask.bool()
    used = mask.any(dim=0).nonzero()
    size = bucket(int(used.max()) + 1 if len(used) else 1)
    more = max(0, size - tokens.shape[1])
    return F.pad(tokens[:, :size], (0, more)), F.pad(mask[:, :size], (0, more))
