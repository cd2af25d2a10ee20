"""minGRU and minLSTM: gates that look at the input alone, so the recurrence is linear.

Source: "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits
from ostinato.ops.diagonal_scan import diagonal_scan


class MinGRUState(NamedTuple):
    """The hidden vector."""

    hidden: Float[Tensor, "batch hidden"]


class MinGRU(Mixer):
    """h_t = (1 − z_t) ⊙ h_{t−1} + z_t ⊙ h̃_t with z_t = σ(W_z x_t), h̃_t = W_h x_t; y_t = W_o h_t.

    Args:
        d_model: width.
        expand: hidden width over d_model.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="data vector",
        input_gate="tied",
        state="hidden",
        paper="minGRU (arXiv 2410.01201)",
    )

    def __init__(self, d_model: int, expand: float = 1.0) -> None:
        super().__init__(d_model)
        self.hidden_dim = int(expand * d_model)
        self.to_update = nn.Linear(d_model, self.hidden_dim)
        self.to_candidate = nn.Linear(d_model, self.hidden_dim)
        self.to_output = nn.Linear(self.hidden_dim, d_model, bias=False)

    def initial_state(self, batch_size: int) -> MinGRUState:
        """Zeros."""
        return MinGRUState(self.zeros(batch_size, self.hidden_dim))

    def mix(self, x: Tensor, state: MinGRUState, reset: Tensor | None) -> tuple[Tensor, MinGRUState]:
        """The recurrence, over the whole sequence."""
        update = torch.sigmoid(self.to_update(x))
        hidden, last = diagonal_scan(1 - update, update * self.to_candidate(x), state.hidden, reset=reset)
        return self.to_output(hidden), MinGRUState(last)
