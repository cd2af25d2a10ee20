"""A training step that a GPU replays: launched once, as one CUDA graph, instead of kernel by kernel.

    step = Recorded(update, device)
    for batch in batches:
        tokens.copy_(batch)      # what changes goes into tensors that stay where they are
        step()

Small models take longer to launch than to compute; replayed, a step costs what it computes. On a processor, and where
a step cannot be recorded (it looks at a value, say), every call is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PLAIN = 3
"""Calls before the recording: the optimiser and the libraries must have met their shapes."""


class Recorded:
    """Calls `function`, recorded from the fourth call on where the device is a GPU.

    Args:
        function: reads and writes tensors that are the same ones at every call, and returns nothing. What it does in
            Python happens in the plain calls and at the recording only. It starts by dropping old gradients.
        device: where those tensors are.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function, self._device = function, device
        self._plain_calls = 0
        self._graph: Any = None
        self.refused: str | None = None
        """Why the step could not be recorded; None if it was, or was not tried yet."""

    def __call__(self) -> None:
        """Run the function, or replay it."""
        if self._graph is not None:
            self._graph.replay()
        elif self._device.type != "cuda" or self.refused is not None:
            self._function()
        elif self._plain_calls < _PLAIN:
            # On a stream of its own, as the recording will be.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._function()
            torch.cuda.current_stream().wait_stream(stream)
            self._plain_calls += 1
        else:
            self._record()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._function()
        except RuntimeError as error:  # nothing was computed: a recording runs no kernel
            self.refused = str(error).splitlines()[0]
            torch.cuda.synchronize()
            self._function()
        else:
            self._graph = graph
            graph.replay()
