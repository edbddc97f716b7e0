"""CUDA graphs: a training step or an env step of a rollout, launched as a whole.

Launching many small kernels takes the host longer than the device takes to compute them. A graph records the
launches of one call and replays them at once, on the same memory: see `Replayed`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EAGER_CALLS = 3
"""Calls before the recording, in which libraries, compilers and optimisers allocate what they keep."""


class Replayed:
    """Calls a `function` of CUDA tensors: eagerly for the first `EAGER_CALLS`, then as a CUDA graph.

    There are no warm-up calls: every call does its work exactly once. Each set of input shapes has a graph of
    its own. Outputs lie in the graph's memory and are overwritten by the next call: clone what is to be kept.
    `function` may change tensors in place, draw random numbers and train. It must not wait for the device,
    and after the recording its Python code is not executed any more.
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
                return self._on_side_stream(inputs)
            self.recorded[shapes] = self._record(inputs)
        return self.recorded[shapes].replay(inputs)

    def _on_side_stream(self, inputs: Sequence[Tensor]) -> Any:
        """An eager call on a side stream, as what it allocates must not depend on the default stream."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> "Recorded":
        """Record a call without executing it. These inputs become the graph's input buffers."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread is checked: the loader's may copy chunks to the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.function(*inputs)
        return Recorded(graph, inputs, outputs)


Shapes = tuple[torch.Size, ...]


class Recorded(NamedTuple):
    """A recorded call: the graph and its input and output buffers."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Any

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Copy `inputs` into the buffers, where they do not lie there already, and replay the graph."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        self.graph.replay()
        return self.outputs
