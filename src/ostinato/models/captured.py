"""A model's step as a CUDA graph: streaming without the cost of launching every kernel by hand.

step = CapturedStep(model, model.read(prompt))
logits = step(token)        # one replay; the state advances inside the graph's own memory
tokens = step.likeliest(64) # the tokens that greedy decoding goes on with, without a round trip to the host
state = step.state          # a copy, to keep, to fork, to go on from without the graph

A step of a small batch launches hundreds of kernels that each take a few microseconds; the graph is launched once.
Fewer, larger kernels make the graph itself faster: `fused` (our own, `ostinato.models.fused_step`) or `compile`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import BackendError, ConfigurationError, ShapeError
from ostinato.models.backbone import Block
from ostinato.models.compiled import compiled
from ostinato.models.fused_step import fused_step
from ostinato.state import State


def _compiled_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Compile the blocks, all of one shape at once, while the block runs; the model itself stays as it was."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)] or [model]
    # Only with this option is a product with one row fused with what stands before and after it.
    return compiled(blocks, dynamic=False, options={"coordinate_descent_tuning": True})


def _held(before: Tensor, after: Tensor) -> Tensor:
    """Memory for a leaf of the state: the value before a step, in the type that it has after one."""
    if before.shape != after.shape:
        raise ConfigurationError(
            "the state of this model grows with time, which a CUDA graph cannot record; "
            "use plan entries with a bounded state, e.g. attention(window=128) once its window is full"
        )
    return before.to(after.dtype, copy=True, memory_format=torch.contiguous_format)


class CapturedStep:
    """`model.step`, recorded once and replayed.

    Args:
        model: a module with `step(x, state) -> (output, state)`: a language model, a backbone, a mixer. Its
            parameters are on one CUDA device, and it is in evaluation mode.
        state: where to go on from; it is copied. Its batch size is the graph's.
        example: an input of one step, whose shape and type the graph takes; None takes token ids, (batch,).
        compile: let `torch.compile` fuse every block of the model first, its matrix–vector products too: fewer,
            larger kernels, but half a minute until the first step.
        fused: take `fused_step(model)` for the step: five launches a layer where the layer is known, the state changed
            in place. Not together with `compile`.

    The parameters are read where they are: a later change to their values shows in the next step, a change of
    their place or type does not. No derivatives.

    Raises:
        BackendError: the state is not on a CUDA device.
        ConfigurationError: the state grows with time (full attention's cache does): no graph can hold it; `compile` and
            `fused` are both asked for.
        ShapeError: an input of another shape than the graph's.
    """

    def __init__(
        self,
        model: nn.Module,
        state: State,
        *,
        example: Tensor | None = None,
        compile: bool = False,
        fused: bool = False,
    ) -> None:
        if compile and fused:
            raise ConfigurationError("a step is either compiled or fused: leave out compile=True or fused=True")
        tensors = [leaf for _, leaf in ostinato.state.leaves(state)]
        if not tensors or tensors[0].device.type != "cuda":
            where = tensors[0].device if tensors else "nowhere"
            raise BackendError(f"a CUDA graph needs a state on a CUDA device; this one is on {where}")
        device = tensors[0].device
        if example is None:
            example = torch.zeros(ostinato.state.batch_size(state), dtype=torch.long, device=device)
        self._input = example.detach().clone().to(device)
        with torch.no_grad(), _compiled_blocks(model) if compile else nullcontext():
            copy = ostinato.state.clone(state)  # a step may change its state in place
            self._state = ostinato.state.map(_held, state, model.step(self._input, copy)[1])  # type: ignore[operator]
            del copy
            self._record(fused_step(model) if fused else model.step)  # type: ignore[arg-type]
        self._stepped = False

    def _record(self, step: Any) -> None:
        start = ostinato.state.clone(self._state)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries wake up outside the recording
            for _ in range(3):
                output, _ = step(self._input, start)
            output.argmax(-1)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._advance(step)
        self._greedy: torch.cuda.CUDAGraph | None = None
        if self._output.ndim == 2 and not self._input.is_floating_point() and self._input.ndim == 1:
            self._greedy = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._greedy, pool=self._graph.pool()):
                self._input.copy_(self._output.argmax(-1))
                self._output.copy_(self._advance(step))

    def _advance(self, step: Any) -> Tensor:
        output, after = step(self._input, self._state)
        ostinato.state.map(lambda held, new: held if new is held else held.copy_(new), self._state, after)
        result: Tensor = output
        return result

    def __call__(self, x: Tensor) -> Tensor:
        """One step: the output, in memory that the next step overwrites (clone it to keep it)."""
        if x.shape != self._input.shape:
            raise ShapeError(f"this graph takes inputs of shape {tuple(self._input.shape)}, got {tuple(x.shape)}")
        self._input.copy_(x)
        self._graph.replay()
        self._stepped = True
        return self._output

    def likeliest(self, count: int) -> Int[Tensor, "batch count"]:
        """Greedy decoding: the token of the largest logit, `count` times, each fed back; the first from the last step.

        Nothing waits for the host: a token is one replay. The state advances by `count` tokens.

        Raises `ConfigurationError` before the first step, and for a model that does not map token ids to logits.
        """
        if self._greedy is None or not self._stepped:
            raise ConfigurationError(
                "greedy decoding goes on from the logits of a step: call this object with a token first"
                if self._greedy is not None
                else "greedy decoding needs a model that maps token ids (batch,) to logits (batch, vocab)"
            )
        tokens = torch.empty(len(self._input), count, dtype=self._input.dtype, device=self._input.device)
        for index in range(count):
            self._greedy.replay()
            tokens[:, index] = self._input
        return tokens

    @property
    def state(self) -> State:
        """A copy of the state after the last step."""
        return ostinato.state.clone(self._state)

    @state.setter
    def state(self, state: State) -> None:
        """Go on from another state of the same shapes; it is copied."""
        ostinato.state.map(lambda held, new: held.copy_(new), self._state, state)
