"""The gradient of a training step as a CUDA graph: recorded once, launched once a step.

A step of a small model launches thousands of kernels that each take microseconds, and the device waits for the host
that launches them. A graph of them is launched by one call. `fit(…, capture=True)` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import BackendError
from ostinato.tasks.base import Batch, Task
from ostinato.training.plugs import Backward, Gradient, Objective, State

Outputs = tuple[Tensor, State, list[Tensor | None]]
"""Of a step: the loss, the state after it, and a gradient for each parameter that has one."""


def record(step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """What `step` returns, and a function that computes it anew, in the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """A stream of its own, as recording has: libraries wake up, kernels are compiled, for that one."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


@dataclass
class Recorded:
    """A step on memory of its own."""

    batch: Batch
    state: State
    outputs: Outputs
    repeat: Callable[[], None]


@dataclass
class Captured:
    """A `Gradient` that records another, and replays it; the same numbers from the same kernels.

    The first `eager` steps of a kind (shapes and types of batch and state) are done as ever. The next is recorded and
    replayed, as are all of its kind after it. The weights are read where they are, so optimisers may change their
    values, but not their place. What a step takes from Python is fixed when it is recorded: a model's flags, a number
    in an objective. Kinds beyond the first `most` are not recorded: each holds the memory of a step.

    Raises:
        BackendError: the step cannot be recorded, because it asks the device for a number, or moves data from the host.
    """

    gradient: Gradient
    eager: int = 3
    most: int = 4
    _done: dict[Hashable, int] = field(default_factory=dict)
    _recorded: dict[Hashable, Recorded] = field(default_factory=dict)

    def __call__(
        self, model: nn.Module, task: Task, batch: Batch, state: State, objective: Objective, backward: Backward
    ) -> tuple[Tensor, State]:
        """Leave the gradient in the parameters, in memory that the next step of the kind overwrites."""
        kind = _kind(batch, state)
        done = self._done[kind] = self._done.get(kind, 0) + 1
        if done <= self.eager or (kind not in self._recorded and len(self._recorded) == self.most):
            with beside(batch.inputs.device):
                return self.gradient(model, task, batch, state, objective, backward)
        parameters = list(model.parameters())
        if kind not in self._recorded:
            self._recorded[kind] = self._record(model, parameters, task, batch, state, objective, backward)
        recorded = self._recorded[kind]
        for held, new in zip(_tensors(recorded.batch), _tensors(batch), strict=True):
            held.copy_(new, non_blocking=True)
        ostinato.state.map(lambda held, new: held.copy_(new), recorded.state, state)
        recorded.repeat()
        loss, after, gradients = recorded.outputs
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss.clone(), after

    def _record(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        task: Task,
        batch: Batch,
        state: State,
        objective: Objective,
        backward: Backward,
    ) -> Recorded:
        held, before = batch.each(torch.clone), ostinato.state.clone(state)

        def step() -> Outputs:
            for parameter in parameters:
                parameter.grad = None
            loss, after = self.gradient(model, task, held, before, objective, backward)
            return loss, after, [parameter.grad for parameter in parameters]

        try:
            outputs, repeat = record(step)
        except RuntimeError as error:
            raise BackendError(
                f"this step cannot be recorded as a CUDA graph, train without capture: {str(error).splitlines()[0]}"
            ) from error
        return Recorded(held, before, outputs, repeat)


def _tensors(batch: Batch) -> list[Tensor]:
    return [part for part in batch if isinstance(part, Tensor)]


def _kind(batch: Batch, state: State) -> Hashable:
    """What tells steps apart that are different graphs."""
    parts = [(part.shape, part.dtype) if isinstance(part, Tensor) else part is None for part in batch]
    return tuple(parts), tuple((name, leaf.shape, leaf.dtype) for name, leaf in ostinato.state.leaves(state))
