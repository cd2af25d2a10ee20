"""The gradient of a training step as a CUDA graph: recorded once, launched once a step.

A step of a small model launches thousands of kernels that each take microseconds, and the device waits for the host
that launches them. A graph of them is launched by one call (`recorded`; on a processor, every step is a plain one).
`fit(…, capture=True)` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import BackendError
from ostinato.tasks.base import Batch, Task
from ostinato.training.plugs import Backward, Gradient, Objective, State
from ostinato.training.recorded import Recorded


class Step:
    """The gradient of steps of one kind, on tensors that stay where they are."""

    def __init__(
        self,
        rule: Callable[[Batch, State], tuple[Tensor, State]],
        parameters: list[nn.Parameter],
        batch: Batch,
        state: State,
    ) -> None:
        self.rule, self.parameters = rule, parameters
        self.batch, self.state = batch.each(torch.clone), ostinato.state.clone(state)
        self.loss, self.after = torch.empty(0), state
        self.gradients: list[Tensor | None] = []
        self.repeat = Recorded(self.run, batch.inputs.device)

    def run(self) -> None:
        """Compute the outputs anew, in memory of their own."""
        for parameter in self.parameters:
            parameter.grad = None
        self.gradients.clear()
        self.loss, self.after = self.rule(self.batch, self.state)
        self.gradients += [parameter.grad for parameter in self.parameters]

    def __call__(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Loss and state after another batch; leaves the gradient in the parameters."""
        for held, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            held.copy_(new, non_blocking=True)
        ostinato.state.map(lambda held, new: held.copy_(new), self.state, state)
        self.repeat()
        if self.repeat.refused is not None:
            raise BackendError(
                f"this step cannot be recorded as a CUDA graph, train without capture: {self.repeat.refused}"
            )
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone(), self.after


@dataclass
class Captured:
    """A `Gradient` that records another, and replays it; the same numbers from the same kernels.

    The first three steps of a kind (shapes and types of batch and state) are done as ever. The next is recorded and
    replayed, as are all of its kind after it. The weights are read where they are, so optimisers may change their
    values, but not their place. What a step takes from Python is fixed when it is recorded: a model's flags, a number
    in an objective, the objective itself. Only the first `most` kinds are recorded: each holds the memory of a step.

    Raises:
        BackendError: the step cannot be recorded, because it asks the device for a number, or moves data from the host.
    """

    gradient: Gradient
    most: int = 4
    _steps: dict[Hashable, Step] = field(default_factory=dict)

    def __call__(
        self, model: nn.Module, task: Task, batch: Batch, state: State, objective: Objective, backward: Backward
    ) -> tuple[Tensor, State]:
        """Leave the gradient in the parameters, in memory that the next step of the kind overwrites."""

        def rule(batch: Batch, state: State) -> tuple[Tensor, State]:
            return self.gradient(model, task, batch, state, objective, backward)

        kind = _kind(batch, state)
        if kind not in self._steps:
            if len(self._steps) == self.most:
                return rule(batch, state)
            self._steps[kind] = Step(rule, list(model.parameters()), batch, state)
        return self._steps[kind](batch, state)


def _tensors(batch: Batch) -> list[Tensor]:
    return [part for part in batch if isinstance(part, Tensor)]


def _kind(batch: Batch, state: State) -> Hashable:
    """What tells steps apart that are different graphs."""
    parts = [(part.shape, part.dtype) if isinstance(part, Tensor) else part is None for part in batch]
    return tuple(parts), tuple((name, leaf.shape, leaf.dtype) for name, leaf in ostinato.state.leaves(state))
