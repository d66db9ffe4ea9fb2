"""A lower bound of the time that counted work takes on a card, by the peaks that its maker publishes.

No kernel computes faster than the card's peak, and none reads weights faster than its memory. So a stage takes at least
max(FLOPs / peak, weight bytes / bandwidth), and stages that wait for each other take at least the sum. Real kernels
reach neither peak, and a bound says nothing of launches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Work:
    """What a stage computes and reads.

    Attributes:
        flops: dtype of the factors ("bfloat16", "float32", "int8", ...) -> FLOPs; a multiply-add is 2.
        weight_bytes: Bytes of weights that it reads; each weight once in each call of the stage.
    """

    flops: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0


@dataclass(frozen=True)
class Card:
    """Published peaks of a card, of dense matrices.

    Attributes:
        name: For people.
        tflops: dtype -> 10^12 FLOPs per second. "tf32" is that of float32 whose factors are rounded to 10 bits.
        bandwidth_gbs: Of its memory, in 10^9 bytes per second.
        source: Where they are published.
    """

    name: str
    tflops: Mapping[str, float]
    bandwidth_gbs: float
    source: str

    def seconds(self, work: Work, tf32: bool) -> float:
        """The least time for this work.

        Args:
            work: Of one stage.
            tf32: Whether products of float32 may use TF32.
        """
        arithmetic = sum(flops / (1e12 * self._peak(dtype, tf32)) for dtype, flops in work.flops.items())
        return max(arithmetic, work.weight_bytes / (1e9 * self.bandwidth_gbs))

    def _peak(self, dtype: str, tf32: bool) -> float:
        name = "tf32" if dtype == "float32" and tf32 else {"float16": "bfloat16"}.get(dtype, dtype)
        # No card computes faster in a type that is not listed, such as float64.
        return self.tflops.get(name, self.tflops["float32"])


HOPPER = "NVIDIA H100 Tensor Core GPU datasheet; figures with sparsity are halved"
H100 = {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.5, "int8": 1979.0}
# What torch calls a card -> what is published of it. The same name with more words is another card.
CARDS = {
    "NVIDIA H100 80GB HBM3": Card("H100 SXM", H100, 3350, HOPPER),
    "NVIDIA H100 PCIe": Card(
        "H100 PCIe", {"float32": 51.0, "tf32": 378.0, "bfloat16": 756.5, "int8": 1513.0}, 2000, HOPPER
    ),
    "NVIDIA H200": Card(
        "H200 SXM", H100, 4800, "NVIDIA H200 Tensor Core GPU datasheet; figures with sparsity are halved"
    ),
    "NVIDIA GeForce RTX 4090": Card(
        "RTX 4090",
        {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.2, "int8": 660.6},
        1008,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A; accumulated in float32",
    ),
}
# Every Jetson Orin calls itself "Orin"; only the AGX with 64 GB has so many multiprocessors.
ORIN_MULTIPROCESSORS = 16
ORIN = Card(
    "Jetson AGX Orin 64 GB",
    {"float32": 5.3, "tf32": 21.25, "bfloat16": 42.5, "int8": 85.0},
    204.8,
    "NVIDIA Jetson AGX Orin Series technical brief v1.2: 5.3 TFLOPS of float32, 170 TOPS of int8 with sparsity; "
    "int8 is halved for dense matrices, bfloat16 is half of that, TF32 a quarter",
)


def find_card(device: str) -> Card | None:
    """What is published of a device, such as "cuda"; None for a card, or a processor, that is not in the table."""
    if torch.device(device).type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.name == "Orin":
        return ORIN if properties.multi_processor_count == ORIN_MULTIPROCESSORS else None
    return CARDS.get(properties.name)
