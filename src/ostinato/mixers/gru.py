"""The gated recurrent unit, reset gate after the matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ostinato.mixers.base import Traits
from ostinato.mixers.recurrent import HeadwiseRNN
from ostinato.ops.cells import GRU as GRUCell
from ostinato.ops.cells import Hidden


class GRU(HeadwiseRNN):
    """h_t = z ⊙ h_{t−1} + (1 − z) ⊙ n, n = tanh(W^n x + b^n + r ⊙ (R^n h + b)); r, z = σ(W x + R h_{t−1} + b).

    With one head it is `torch.nn.GRU`, followed by the output projection: to_gates.bias is bias_ih, plus
    bias_hh for r and z; `recurrent_bias` is the n part of bias_hh.

    Args:
        d_model: width.
        heads: blocks of R; 1 is the dense network.
        expand: hidden width over d_model.

    Source: Cho et al. 2014 in the form of cuDNN; heads: FlashRNN (arXiv 2412.07752).
    """

    traits = Traits(
        engine="recurrent_scan",
        transition="data vector, gates see the state",
        input_gate="tied",
        state="hidden",
        channel_mixing=True,
        linear=False,
        paper="Cho et al. 2014; FlashRNN (arXiv 2412.07752)",
    )
    no_weight_decay = frozenset({"recurrent_bias"})
    cell = GRUCell()
    gates = 3
    state_type = Hidden

    def __init__(self, d_model: int, heads: int = 1, expand: float = 1.0) -> None:
        super().__init__(d_model, heads, expand)
        self.recurrent_bias = nn.Parameter(torch.zeros(heads, self.head_dim))

    def cell_weights(self) -> tuple[Tensor, ...]:
        """R and the bias that the reset gate multiplies."""
        return self.recurrent, self.recurrent_bias
