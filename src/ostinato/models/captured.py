"""A model's step as a CUDA graph: streaming without the cost of launching every kernel by hand.

step = CapturedStep(model, model.read(prompt))
logits = step(token)        # one replay; the state advances inside the graph's own memory
state = step.state          # a copy, to keep, to fork, to go on from without the graph

A step of a small batch launches hundreds of kernels that each take a few microseconds; the graph is launched once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import BackendError, ConfigurationError, ShapeError
from ostinato.models.backbone import Block
from ostinato.models.compiled import compiled
from ostinato.state import State


def _compiled_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Compile the blocks, all of one shape at once, while the block runs; the model itself stays as it was."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)] or [model]
    # Only with this option is a product with one row fused with what stands before and after it.
    return compiled(blocks, dynamic=False, options={"coordinate_descent_tuning": True})


class CapturedStep:
    """`model.step`, recorded once and replayed.

    Args:
        model: a module with `step(x, state) -> (output, state)`: a language model, a backbone, a mixer. Its
            parameters are on one CUDA device, and it is in evaluation mode.
        state: where to go on from; it is copied. Its batch size is the graph's.
        example: an input of one step, whose shape and type the graph takes; None takes token ids, (batch,).
        compile: let `torch.compile` fuse every block of the model first, its matrix–vector products too: fewer,
            larger kernels, but half a minute until the first step.

    The parameters are read where they are: a later change to their values shows in the next step, a change of
    their place or type does not. No derivatives.

    Raises:
        BackendError: the state is not on a CUDA device.
        ConfigurationError: the state grows with time (full attention's cache does): no graph can hold it.
        ShapeError: an input of another shape than the graph's.
    """

    def __init__(self, model: nn.Module, state: State, *, example: Tensor | None = None, compile: bool = False) -> None:
        tensors = [leaf for _, leaf in ostinato.state.leaves(state)]
        if not tensors or tensors[0].device.type != "cuda":
            where = tensors[0].device if tensors else "nowhere"
            raise BackendError(f"a CUDA graph needs a state on a CUDA device; this one is on {where}")
        device = tensors[0].device
        if example is None:
            example = torch.zeros(ostinato.state.batch_size(state), dtype=torch.long, device=device)
        self._input = example.detach().clone().to(device)
        self._state = ostinato.state.clone(state)
        with torch.no_grad(), _compiled_blocks(model) if compile else nullcontext():
            self._record(model.step)  # type: ignore[arg-type]

    def _record(self, step: Any) -> None:
        start = ostinato.state.clone(self._state)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries wake up outside the recording
            for _ in range(3):
                _, after = step(self._input, start)
        torch.cuda.current_stream().wait_stream(side)
        before = [(path, tuple(leaf.shape)) for path, leaf in ostinato.state.leaves(start)]
        if before != [(path, tuple(leaf.shape)) for path, leaf in ostinato.state.leaves(after)]:
            raise ConfigurationError(
                "the state of this model grows with time, which a CUDA graph cannot record; "
                "use plan entries with a bounded state, e.g. attention(window=128) once its window is full"
            )
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output, after = step(self._input, self._state)
            ostinato.state.map(lambda held, new: held.copy_(new), self._state, after)

    def __call__(self, x: Tensor) -> Tensor:
        """One step: the output, in memory that the next step overwrites (clone it to keep it)."""
        if x.shape != self._input.shape:
            raise ShapeError(f"this graph takes inputs of shape {tuple(self._input.shape)}, got {tuple(x.shape)}")
        self._input.copy_(x)
        self._graph.replay()
        return self._output

    @property
    def state(self) -> State:
        """A copy of the state after the last step."""
        return ostinato.state.clone(self._state)

    @state.setter
    def state(self, state: State) -> None:
        """Go on from another state of the same shapes; it is copied."""
        ostinato.state.map(lambda held, new: held.copy_(new), self._state, state)
