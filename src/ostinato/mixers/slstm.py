"""sLSTM: the scalar memory of xLSTM, with an exponential input gate and a normaliser."""

from __future__ import annotations

import torch

from ostinato.mixers.base import Traits
from ostinato.mixers.recurrent import HeadwiseRNN
from ostinato.ops.cells import SLSTM as SLSTMCell
from ostinato.ops.cells import SLSTMState


class SLSTM(HeadwiseRNN):
    """c_t = f c_{t−1} + i tanh(z), n_t = f n_{t−1} + i, h_t = σ(o) ⊙ c_t / n_t, with i = e^ĩ and f = σ(f̂).

    Computed with a running maximum of the logarithms, so that no exponential overflows. The gates see the
    hidden vector of their own head. Forget biases start spread from 1 to 3.

    Args:
        d_model: width.
        heads: blocks of R; 1 is the dense network.
        expand: hidden width over d_model.

    Source: xLSTM (arXiv 2405.04517), section 2.2; FlashRNN (arXiv 2412.07752).
    """

    traits = Traits(
        engine="recurrent_scan",
        transition="data vector, gates see the state",
        input_gate="exponential",
        state="4 × hidden",
        channel_mixing=True,
        linear=False,
        paper="xLSTM (arXiv 2405.04517)",
    )
    cell = SLSTMCell()
    gates = 4
    state_type = SLSTMState

    def __init__(self, d_model: int, heads: int = 4, expand: float = 1.0) -> None:
        super().__init__(d_model, heads, expand)
        with torch.no_grad():
            self.to_gates.bias[self.hidden_dim : 2 * self.hidden_dim] = torch.linspace(1, 3, self.hidden_dim)
