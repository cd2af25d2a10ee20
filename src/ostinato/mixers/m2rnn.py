"""M²RNN: a nonlinear recurrence whose state is a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.parts import GatedNorm, ShortConvolution, log_uniform, softplus_inverse
from ostinato.ops.cells import M2RNN as M2RNNCell
from ostinato.ops.cells import Memory
from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.recurrent_scan import recurrent_scan


class M2RNNState(NamedTuple):
    """The matrix of every head, and the last inputs of the short convolution."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    convolution: Float[Tensor, "batch taps channels"]


class M2RNN(Mixer):
    """H_t = f_t H_{t−1} + (1 − f_t) tanh(H_{t−1} W + k_t v_tᵀ), y_t = H_tᵀ q_t + w_r ⊙ v_t, per head.

    One projection gives q, k, v, the forget gate and the output gate g; a short convolution and SiLU follow
    on q, k and v. The forget gate f_t = exp(−e^A softplus(x^f_t + β)) sees the input alone. The output is
    W_o RMSNorm(y ⊙ SiLU(g)), the norm over all heads together. W starts as the identity.

    Args:
        d_model: width.
        heads: number of value, forget and gate heads; None for d_model / value_dim, at least 1.
        key_dim, value_dim: of a head; its state has key_dim × value_dim numbers.
        query_heads, key_heads: how many different queries and keys there are, divisors of heads; every
            one of them serves heads / query_heads (or key_heads) neighbouring heads.
        gradient_clip: the paper's clip of the state's gradient to ±this at every step; None, the default,
            leaves the gradient the derivative.

    Raises `ConfigurationError` where the numbers of heads do not divide.
    Source: M²RNN (arXiv 2603.14360), section 3.
    """

    traits = Traits(
        engine="recurrent_scan",
        transition="data scalar, dense through tanh",
        input_gate="tied",
        state="heads × key_dim × value_dim",
        channel_mixing=True,
        linear=False,
        paper="M²RNN (arXiv 2603.14360)",
    )
    no_weight_decay = frozenset({"log_rate", "forget_bias", "residual"})

    def __init__(
        self,
        d_model: int,
        heads: int | None = None,
        key_dim: int = 64,
        value_dim: int = 16,
        query_heads: int = 1,
        key_heads: int = 1,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__(d_model)
        self.heads = max(1, d_model // value_dim) if heads is None else heads
        for name, count in (("query_heads", query_heads), ("key_heads", key_heads)):
            if count < 1 or self.heads % count:
                raise ConfigurationError(f"{name}={count} does not divide heads={self.heads}")
        self.key_dim, self.value_dim = key_dim, value_dim
        self.query_heads, self.key_heads = query_heads, key_heads
        width = self.heads * value_dim
        self.convolved = [query_heads * key_dim, key_heads * key_dim, width]
        self.to_all = nn.Linear(d_model, sum(self.convolved) + self.heads + width, bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), 4)
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(0, 16).clamp(min=1e-4).log())
        self.forget_bias = nn.Parameter(softplus_inverse(log_uniform(self.heads, 1e-3, 0.1, floor=1e-4)))
        self.transition = nn.Parameter(torch.eye(value_dim).repeat(self.heads, 1, 1))
        self.residual = nn.Parameter(torch.ones(self.heads, value_dim))
        self.norm = GatedNorm(width, gate_first=True)
        self.to_output = nn.Linear(width, d_model, bias=False)
        self.cell = M2RNNCell(gradient_clip)

    def initial_state(self, batch_size: int) -> M2RNNState:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.key_dim, self.value_dim)
        return M2RNNState(memory, self.convolution.initial_state(batch_size))

    def mix(self, x: Tensor, state: M2RNNState, reset: Tensor | None) -> tuple[Tensor, M2RNNState]:
        """Project and convolve, recur, read out, gate and norm."""
        width = self.heads * self.value_dim
        mixed, forget, gate = self.to_all(x).split([sum(self.convolved), self.heads, width], dim=-1)
        mixed, taps = self.convolution(mixed, state.convolution, reset)
        queries, keys, values = F.silu(mixed).split(self.convolved, dim=-1)
        queries = queries.unflatten(-1, (self.query_heads, self.key_dim))
        keys = keys.unflatten(-1, (self.key_heads, self.key_dim))
        values = values.unflatten(-1, (self.heads, self.value_dim))
        queries = queries.repeat_interleave(self.heads // self.query_heads, dim=-2)
        keys = keys.repeat_interleave(self.heads // self.key_heads, dim=-2)

        wide = accumulation_dtype(x.dtype)
        rate = self.log_rate.to(wide).exp() * F.softplus(forget.to(wide) + self.forget_bias.to(wide))
        inputs = (keys, values, torch.exp(-rate))
        memory, (last,) = recurrent_scan(self.cell, (self.transition,), inputs, Memory(state.memory), reset=reset)
        read = (queries.unsqueeze(-2) @ memory).squeeze(-2) + self.residual * values
        return self.to_output(self.norm(read.flatten(-2), gate)), M2RNNState(last, taps)
