"""ParaGRU and ParaLSTM: nonlinear cells that Newton's method evaluates for all steps at once.

Their state meets itself channel by channel only, so the Jacobian of a step is a vector or a 2×2 block a
channel; and their recurrent weights are kept in ±0.5, so three or four iterations suffice at any length.

Source: ParaRNN (arXiv 2510.21450), section 3 and appendix C.1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits
from ostinato.ops.cells import Cell, ChannelCellHidden, ChannelHidden
from ostinato.ops.cells import ParaGRU as ParaGRUCell
from ostinato.ops.cells import ParaLSTM as ParaLSTMCell
from ostinato.ops.newton_scan import newton_scan


class _ParaRNN(Mixer):
    cell: ClassVar[Cell]
    state_type: ClassVar[Any]
    no_weight_decay = frozenset({"recurrent"})

    def __init__(
        self, d_model: int, expand: float = 1.0, iterations: int | None = None, max_recurrent: float = 0.5
    ) -> None:
        super().__init__(d_model)
        self.hidden_dim = int(expand * d_model)
        self.iterations, self.max_recurrent = iterations, max_recurrent
        self.to_gates = nn.Linear(d_model, 3 * self.hidden_dim)
        nn.init.zeros_(self.to_gates.bias)
        self.recurrent = nn.Parameter(torch.randn(3, self.hidden_dim) / math.sqrt(self.hidden_dim))
        self.to_output = nn.Linear(self.hidden_dim, d_model, bias=False)

    def initial_state(self, batch_size: int) -> Any:
        """Zeros."""
        return self.state_type(*[self.zeros(batch_size, self.hidden_dim) for _ in self.state_type._fields])

    def cell_weights(self) -> tuple[Tensor, ...]:
        """The recurrent weights, bounded."""
        return (self.recurrent.clamp(-self.max_recurrent, self.max_recurrent),)

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """Project, solve, project."""
        inputs = self.to_gates(x).unflatten(-1, (3, self.hidden_dim))
        hidden, state = newton_scan(
            self.cell, self.cell_weights(), inputs, state, iterations=self.iterations, reset=reset
        )
        return self.to_output(hidden), state


class ParaGRU(_ParaRNN):
    """h' = (1 − z) ⊙ h + z ⊙ n; z, r = σ(a ⊙ h + B x + b), n = tanh(a_n ⊙ (h ⊙ r) + B_n x + b_n); y = W_o h'.

    Args:
        d_model: width.
        expand: hidden width over d_model.
        iterations: of Newton's method; None for as many as full precision needs.
        max_recurrent: bound on the recurrent weights a.

    A forward pass raises `DivergenceError` rather than return states that do not satisfy the recurrence.
    Source: ParaRNN (arXiv 2510.21450), section 3.
    """

    traits = Traits(
        engine="newton_scan",
        transition="data vector, gates see the state",
        input_gate="tied",
        state="hidden",
        linear=False,
        paper="ParaRNN (arXiv 2510.21450)",
    )
    cell = ParaGRUCell()
    state_type = ChannelHidden


class ParaLSTM(_ParaRNN):
    """c' = f ⊙ c + (1 − f) ⊙ z, h' = o ⊙ tanh(c'); the gates see h, f and o also the memory; y = W_o h'.

    f = σ(a_f ⊙ h + p_f ⊙ c + B_f x + b_f), z = tanh(a_z ⊙ h + B_z x + b_z),
    o = σ(a_o ⊙ h + p_o ⊙ c' + B_o x + b_o).

    Args:
        d_model: width.
        expand: hidden width over d_model.
        iterations: of Newton's method; None for as many as full precision needs.
        max_recurrent: bound on the recurrent weights a and p.

    A forward pass raises `DivergenceError` rather than return states that do not satisfy the recurrence.
    Source: ParaRNN (arXiv 2510.21450), section 3.
    """

    no_weight_decay = frozenset({"recurrent", "peephole"})
    traits = Traits(
        engine="newton_scan",
        transition="data vector, gates see the state",
        input_gate="tied",
        state="2 × hidden",
        linear=False,
        paper="ParaRNN (arXiv 2510.21450)",
    )
    cell = ParaLSTMCell()
    state_type = ChannelCellHidden

    def __init__(
        self, d_model: int, expand: float = 1.0, iterations: int | None = None, max_recurrent: float = 0.5
    ) -> None:
        super().__init__(d_model, expand, iterations, max_recurrent)
        self.peephole = nn.Parameter(torch.randn(2, self.hidden_dim) / math.sqrt(self.hidden_dim))

    def cell_weights(self) -> tuple[Tensor, ...]:
        """The recurrent weights and the peepholes, bounded."""
        return *super().cell_weights(), self.peephole.clamp(-self.max_recurrent, self.max_recurrent)
