"""CUDA graphs: a training step or a step of a rollout, launched as one piece.

A step of small kernels takes the host longer to launch than the device to compute. A graph records the
launches of one call and repeats them all at once, on the same memory: see `Replayed`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EAGER_CALLS = 3
"""Calls before the recording: in them libraries, compilers and optimisers make what they keep."""


class Replayed:
    """Calls `function` of CUDA tensors, the first `EAGER_CALLS` as usual, the later ones by a CUDA graph.

    Every call does its work once: nothing is called for warming up. The shapes of the inputs must stay what
    they are. The results lie in the graph's memory, where the next call overwrites them: copy what is to be
    kept. `function` may change tensors in place, draw random numbers and train, but must not wait for the
    device, and its Python code runs no more once recorded.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Sequence[Tensor] = ()
        self.outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.calls < EAGER_CALLS:
            self.calls += 1
            return self._aside(inputs)
        if self.graph is None:
            self._record(inputs)
        torch._foreach_copy_(list(self.inputs), list(inputs))
        self.graph.replay()
        return self.outputs

    def _aside(self, inputs: Sequence[Tensor]) -> Any:
        """A usual call, on a stream of its own: what it leaves behind must not hang on the default stream."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may copy chunks to the device meanwhile: only this thread is watched.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs)
        self.graph = graph
