"""minGRU and minLSTM: gates that look at the input alone, so the recurrence is linear.

Source: "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class MinLSTMState(NamedTuple):
    """The hidden vector."""

    hidden: Float[Tensor, "batch hidden"]


class MinLSTM(Mixer):
    """h_t = f′_t ⊙ h_{t−1} + i′_t ⊙ h̃_t with f′ = f/(f + i), i′ = i/(f + i), h̃_t = W_h x_t; y_t = W_o h_t.

    f = σ(W_f x_t), i = σ(W_i x_t). The quotient is formed from logarithms, f′ = σ(log f − log i), so that gates
    which both vanish do not make 0/0.

    Args:
        d_model: width.
        expand: hidden width over d_model.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="data vector",
        input_gate="tied",
        state="hidden",
        paper="minLSTM (arXiv 2410.01201)",
    )

    def __init__(self, d_model: int, expand: float = 1.0) -> None:
        super().__init__(d_model)
        self.hidden_dim = int(expand * d_model)
        self.to_forget = nn.Linear(d_model, self.hidden_dim)
        self.to_input = nn.Linear(d_model, self.hidden_dim)
        self.to_candidate = nn.Linear(d_model, self.hidden_dim)
        self.to_output = nn.Linear(self.hidden_dim, d_model, bias=False)

    def initial_state(self, batch_size: int) -> MinLSTMState:
        """Zeros."""
        return MinLSTMState(self.zeros(batch_size, self.hidden_dim))

    def mix(self, x: Tensor, state: MinLSTMState, reset: Tensor | None) -> tuple[Tensor, MinLSTMState]:
        """The recurrence, over the whole sequence."""
        balance = F.logsigmoid(self.to_forget(x)) - F.logsigmoid(self.to_input(x))
        written = torch.sigmoid(-balance) * self.to_candidate(x)
        hidden, last = diagonal_scan(torch.sigmoid(balance), written, state.hidden, reset=reset)
        return self.to_output(hidden), MinLSTMState(last)
