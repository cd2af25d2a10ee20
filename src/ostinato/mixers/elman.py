"""The simple recurrent network of Elman 1990."""

from __future__ import annotations

from ostinato.mixers.base import Traits
from ostinato.mixers.recurrent import HeadwiseRNN
from ostinato.ops.cells import Elman, Hidden


class ElmanRNN(HeadwiseRNN):
    """h_t = tanh(W x_t + R h_{t−1} + b); y_t = W_o h_t.

    Args:
        d_model: width.
        heads: blocks of R; 1 is the dense network.
        expand: hidden width over d_model.

    Source: Elman 1990, "Finding structure in time"; heads: FlashRNN (arXiv 2412.07752).
    """

    traits = Traits(
        engine="recurrent_scan",
        transition="dense per head, through tanh",
        state="hidden",
        channel_mixing=True,
        linear=False,
        paper="Elman 1990; FlashRNN (arXiv 2412.07752)",
    )
    cell = Elman()
    gates = 1
    state_type = Hidden
