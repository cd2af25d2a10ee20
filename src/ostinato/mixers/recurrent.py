"""What the layers over a head-wise nonlinear cell share: projections around `recurrent_scan`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, split_heads
from ostinato.ops.cells import Cell
from ostinato.ops.recurrent_scan import recurrent_scan


class HeadwiseRNN(Mixer):
    """y_t = W_o h_t, with h the output of a cell whose inputs W x_t + b are projected for all t at once.

    The hidden vector is cut into heads, and the recurrent matrix of every gate has one block per head:
    channels of different heads meet in the projections only. One head is the ordinary dense network.

    Args:
        d_model: width.
        heads: number of heads; divides the hidden width.
        expand: hidden width over d_model.

    Raises `ConfigurationError` where heads does not divide.
    """

    cell: ClassVar[Cell]
    gates: ClassVar[int]
    state_type: ClassVar[Any]

    def __init__(self, d_model: int, heads: int = 1, expand: float = 1.0) -> None:
        super().__init__(d_model)
        self.hidden_dim = int(expand * d_model)
        self.heads, self.head_dim = heads, split_heads(self.hidden_dim, heads, "hidden width")
        self.to_gates = nn.Linear(d_model, self.gates * self.hidden_dim)
        bound = 1 / math.sqrt(self.head_dim)
        self.recurrent = nn.Parameter(
            torch.empty(self.gates, heads, self.head_dim, self.head_dim).uniform_(-bound, bound)
        )
        self.to_output = nn.Linear(self.hidden_dim, d_model, bias=False)

    def initial_state(self, batch_size: int) -> Any:
        """Zeros."""
        parts = [self.zeros(batch_size, self.heads, self.head_dim) for _ in self.state_type._fields]
        return self.state_type(*parts)

    def cell_weights(self) -> tuple[Tensor, ...]:
        """What the cell is called with."""
        return (self.recurrent,)

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """Project, recur, project."""
        inputs = self.to_gates(x).unflatten(-1, (self.gates, self.heads, self.head_dim))
        hidden, state = recurrent_scan(self.cell, self.cell_weights(), inputs, state, reset=reset)
        return self.to_output(hidden.flatten(-2)), state
