"""CUDA graphs: a training step or a step of a rollout, launched as one piece.

A step of small kernels takes the host longer to launch than the device to compute. A graph records the
launches of one call and repeats them all at once, on the same memory: see `Replayed`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EAGER_CALLS = 3
"""Calls before the recording: in them libraries, compilers and optimisers make what they keep."""


class Replayed:
    """Calls `function` of CUDA tensors, the first `EAGER_CALLS` as usual, the later ones by a CUDA graph.

    Every call does its work once: nothing is called for warming up. Inputs of other shapes get a graph of
    their own. The results lie in the graph's memory, where the next call overwrites them: copy what is to be
    kept. `function` may change tensors in place, draw random numbers and train, but must not wait for the
    device, and once recorded, its Python code runs no more.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.calls: Counter[Shapes] = Counter()
        self.recorded: dict[Shapes, Recorded] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            if self.calls[shapes] < EAGER_CALLS:
                self.calls[shapes] += 1
                return self._aside(inputs)
            self.recorded[shapes] = self._record(inputs)
        return self.recorded[shapes].replay(inputs)

    def _aside(self, inputs: Sequence[Tensor]) -> Any:
        """A usual call, on a stream of its own: what it leaves behind must not hang on the default stream."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> "Recorded":
        """Record a call without making it. The graph's inputs lie from now on where these ones lie."""
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may copy chunks to the device meanwhile: only this thread is watched.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.function(*inputs)
        return Recorded(graph, inputs, outputs)


Shapes = tuple[torch.Size, ...]


class Recorded(NamedTuple):
    """A recorded call: the graph, and where its inputs and outputs lie."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Any

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Make the call on `inputs`."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        self.graph.replay()
        return self.outputs
