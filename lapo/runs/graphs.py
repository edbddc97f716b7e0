"""CUDA graphs: one launch for all kernels of a training step, or of a policy's decision.

Launching many small kernels takes the host longer than running them takes the device. A graph captures the
launches of one call and replays them at once, on the same memory, see `Replayed`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

EAGER_CALLS = 3
"""Calls before the capture, in which libraries, compilers and optimisers allocate their buffers."""


class Replayed:
    """Calls a `function` of CUDA tensors: eagerly for the first `EAGER_CALLS`, then as a CUDA graph.

    There are no extra warm-up calls: every call does its work exactly once. Each set of input shapes has its
    own graph. Outputs lie in the graph's memory and the next call overwrites them: clone what must be kept.
    `function` may change tensors in place, draw random numbers and train. It must not synchronise with the
    device. After the capture its Python code is not executed any more.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.calls: Counter[Shapes] = Counter()
        self.captured: dict[Shapes, Captured] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.captured:
            if self.calls[shapes] < EAGER_CALLS:
                self.calls[shapes] += 1
                return self._on_side_stream(inputs)
            self.captured[shapes] = self._capture(inputs)
        return self.captured[shapes].replay(inputs)

    def _on_side_stream(self, inputs: Sequence[Tensor]) -> Any:
        """Call eagerly on a side stream: buffers allocated here must not depend on the default stream."""
        current, stream = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> "Captured":
        """Capture a call without executing it. These inputs become the graph's input buffers."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread is checked: the loader's thread may copy chunks to the device meanwhile.
        stream = _side_stream(torch.cuda.current_device())
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self.function(*inputs)
        return Captured(graph, inputs, outputs)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of all eager calls and captures: freed memory is reused only on the stream that freed it."""
    return torch.cuda.Stream(device)


Shapes = tuple[torch.Size, ...]


class Captured(NamedTuple):
    """A captured call: the graph and its input and output buffers."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Any

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Copy `inputs` to the input buffers, unless they lie there already, and replay the graph."""
        for buffer, x in zip(self.inputs, inputs, strict=True):
            if buffer.data_ptr() != x.data_ptr():
                buffer.copy_(x)
        self.graph.replay()
        return self.outputs
