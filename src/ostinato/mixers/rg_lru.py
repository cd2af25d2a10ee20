"""RG-LRU: the real-gated linear recurrent unit of Hawk and Griffin, in their recurrent block.

Source: "Griffin: Mixing Gated Linear Recurrences with Local Attention" (arXiv 2402.19427), sections 2.3 and 2.4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.parts import ShortConvolution, softplus_inverse
from ostinato.ops.diagonal_scan import diagonal_scan

_SHARPNESS = 8.0
"""c of the paper."""


class RGLRUState(NamedTuple):
    """The hidden vector, and the inputs that the short convolution still needs (None without one)."""

    hidden: Float[Tensor, "batch hidden"]
    convolution: Float[Tensor, "batch taps hidden"] | None


class RGLRU(Mixer):
    """h_t = a_t ∘ h_{t−1} + √(1 − a_t²) ∘ (i_t ∘ x_t), inside the block Linear, conv4, RG-LRU, times GELU(Linear).

    Recurrence gate r_t = σ(W_r x_t), input gate i_t = σ(W_i x_t), a_t = a^{c r_t} with c = 8 and a =
    e^{−softplus(rate)}, so log a_t = −c·softplus(rate)·r_t. At the start a^c is uniform in [0.9, 0.999].

    Args:
        d_model: width.
        expand: hidden width over d_model (4/3 in the paper).
        heads: blocks of the block-diagonal gate matrices W_r, W_i; 1 is dense.
        conv_width: taps of the causal convolution before the recurrence; 0 for none.
        gated: multiply by the GELU branch before the output projection.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="data vector",
        input_gate="sigmoid, tied",
        state="hidden",
        paper="RG-LRU, Griffin (arXiv 2402.19427)",
    )
    no_weight_decay = frozenset({"rate"})

    def __init__(
        self, d_model: int, expand: float = 1.0, heads: int = 4, conv_width: int = 4, gated: bool = True
    ) -> None:
        super().__init__(d_model)
        self.hidden_dim = int(expand * d_model)
        size = split_heads(self.hidden_dim, heads, "hidden width")
        self.to_input = nn.Linear(d_model, self.hidden_dim)
        self.to_gate = nn.Linear(d_model, self.hidden_dim) if gated else None
        self.convolution = ShortConvolution(self.hidden_dim, conv_width, bias=True) if conv_width else None
        self.gate_weight = nn.Parameter(torch.randn(2, heads, size, size) / math.sqrt(size))
        self.gate_bias = nn.Parameter(torch.zeros(2, heads, size))
        decay = torch.empty(self.hidden_dim).uniform_(0.9, 0.999)
        self.rate = nn.Parameter(softplus_inverse(-torch.log(decay) / _SHARPNESS))
        self.to_output = nn.Linear(self.hidden_dim, d_model)

    def initial_state(self, batch_size: int) -> RGLRUState:
        """Zeros."""
        past = None if self.convolution is None else self.convolution.initial_state(batch_size)
        return RGLRUState(self.zeros(batch_size, self.hidden_dim), past)

    def mix(self, x: Tensor, state: RGLRUState, reset: Tensor | None) -> tuple[Tensor, RGLRUState]:
        """The block, over the whole sequence."""
        dtype = self.state_dtype
        u, past = self.to_input(x), state.convolution
        if self.convolution is not None:
            u, past = self.convolution(u, past, reset)
        heads, size = self.gate_weight.shape[1:3]
        gates = torch.einsum("bthi,ghij->gbthj", u.unflatten(-1, (heads, size)), self.gate_weight)
        recurrence, writing = torch.sigmoid((gates + self.gate_bias[:, None, None]).flatten(-2).to(dtype))
        log_decay = -_SHARPNESS * F.softplus(self.rate.to(dtype)) * recurrence
        # At a = 1 the root has no derivative; the floor is far below any rounding of 1 − a².
        room = torch.sqrt((-torch.expm1(2 * log_decay)).clamp(min=1e-12))
        hidden, last = diagonal_scan(torch.exp(log_decay), room * writing * u, state.hidden, reset=reset)
        y = hidden.to(x.dtype)
        if self.to_gate is not None:
            y = y * F.gelu(self.to_gate(x))
        return self.to_output(y), RGLRUState(last, past)
