"""A function of tensors, recorded as a CUDA graph and then replayed: the CPU launches one graph, not each kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Runs before the recording, in which libraries choose their kernels and reserve memory.
WARM_UP = 3


class RecordedFunction:
    """A function whose inputs and outputs stay at the places in memory that they had at the recording.

    What it returns is overwritten by the next call.

    Args:
        function: Of tensors, and tuples of them; waits for nothing and allocates nothing outside torch.
        fixed: Its first arguments, the same objects at each call.
        examples: Its other arguments, whose values are copied in at each call.
    """

    def __init__(self, function: Callable[..., Any], fixed: tuple[Any, ...], examples: tuple[Any, ...]) -> None:
        places = tree_map(Tensor.clone, examples)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*fixed, *places)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of cameras, may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.result = function(*fixed, *places)
        self._places: list[Tensor] = tree_leaves(places)
        # Their memory must stay.
        self._fixed = fixed

    def __call__(self, *arguments: Any) -> Any:
        """Replay with new values of the arguments that are not fixed."""
        for place, value in zip(self._places, tree_leaves(arguments), strict=True):
            place.copy_(value)
        self._graph.replay()
        return self.result
