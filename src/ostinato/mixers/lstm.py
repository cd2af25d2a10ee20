"""Long short-term memory, with forget gates and without peepholes."""

from __future__ import annotations

import torch

from ostinato.mixers.base import Traits
from ostinato.mixers.recurrent import HeadwiseRNN
from ostinato.ops.cells import LSTM as LSTMCell
from ostinato.ops.cells import HiddenCell


class LSTM(HeadwiseRNN):
    """c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g), h_t = σ(o) ⊙ tanh(c_t); (i, f, g, o) = W x_t + R h_{t−1} + b.

    With one head, W = weight_ih, R = weight_hh and b = bias_ih + bias_hh it is `torch.nn.LSTM`, followed by
    the output projection. The bias of the forget gate starts at `forget_bias`.

    Args:
        d_model: width.
        heads: blocks of R; 1 is the dense network.
        expand: hidden width over d_model.
        forget_bias: what the forget gate's bias starts from.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000; heads: FlashRNN (arXiv 2412.07752).
    """

    traits = Traits(
        engine="recurrent_scan",
        transition="data vector, gates see the state",
        input_gate="sigmoid",
        state="2 × hidden",
        channel_mixing=True,
        linear=False,
        paper="Hochreiter & Schmidhuber 1997; FlashRNN (arXiv 2412.07752)",
    )
    cell = LSTMCell()
    gates = 4
    state_type = HiddenCell

    def __init__(self, d_model: int, heads: int = 1, expand: float = 1.0, forget_bias: float = 1.0) -> None:
        super().__init__(d_model, heads, expand)
        with torch.no_grad():
            self.to_gates.bias[self.hidden_dim : 2 * self.hidden_dim] = forget_bias
