"""The three places where a learning rule plugs into `fit`: objective, gradient, curriculum.

Each is a plain function with the signature below. A rule that wants more (RTRL, a noisy gradient, teacher forcing)
is another function with the same signature; `fit` does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Batch, Task

State = Any

Objective = Callable[[nn.Module, Task, Batch, State], tuple[Tensor, State]]
"""What is minimised: (model, task, batch, state) -> (a scalar with its graph, the state after the batch)."""

Backward = Callable[[Tensor], None]
"""Adds the gradient of a scalar to the parameters: `backward()` with scaling and synchronisation taken care of."""

Gradient = Callable[[nn.Module, Task, Batch, State, Objective, Backward], tuple[Tensor, State]]
"""How the gradient is had: leaves it in the parameters' `.grad`, returns the loss and the state, both detached."""

Curriculum = Callable[[Task, int, int, int], Batch]
"""What is shown: (task, step, batch_size, seed) -> the batch of that step."""


def task_loss(model: nn.Module, task: Task, batch: Batch, state: State) -> tuple[Tensor, State]:
    """The default objective: the task's own loss of the model's logits."""
    logits, state = model(batch.inputs, state, reset=batch.reset)
    return task.loss(logits, batch), state


def backpropagation(
    model: nn.Module, task: Task, batch: Batch, state: State, objective: Objective, backward: Backward
) -> tuple[Tensor, State]:
    """The default gradient: back-propagation through the whole window, and no further."""
    loss, state = objective(model, task, batch, state)
    backward(loss)
    return loss.detach(), ostinato.state.detach(state)


def truncated(length: int) -> Gradient:
    """Back-propagation that reaches back at most `length` steps: the window is cut into pieces of that length.

    The loss is the mean over all scored positions, as without truncation. Williams and Peng 1990, BPTT(h; h').
    """
    if length < 1:
        raise ConfigurationError(f"the length to back-propagate through must be positive, got {length}")

    def gradient(
        model: nn.Module, task: Task, batch: Batch, state: State, objective: Objective, backward: Backward
    ) -> tuple[Tensor, State]:
        total = torch.zeros((), device=batch.inputs.device)
        scored = batch.mask.sum()
        for start in range(0, batch.inputs.shape[1], length):
            piece = batch.steps(start, start + length)
            if not bool(piece.mask.any()):
                # Nothing is asked here, yet the state must pass through.
                _, state = model(piece.inputs, state, reset=piece.reset)
                state = ostinato.state.detach(state)
                continue
            loss, state = objective(model, task, piece, state)
            loss = loss * (piece.mask.sum() / scored)
            backward(loss)
            total = total + loss.detach()
            state = ostinato.state.detach(state)
        return total, state

    return gradient


def shown_in_order(task: Task, step: int, batch_size: int, seed: int) -> Batch:
    """The default curriculum: the task's own batches, one after another."""
    return task.train_batch(step, batch_size, seed)
