"""Mamba-2: a selective state space whose heads forget by one scalar each (state space duality).

Source: Mamba-2 (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import MatrixState, decay_rates, softplus_steps, step_biases, widened
from ostinato.mixers.parts import ShortConvolution
from ostinato.ops.linear_attention import linear_attention


class Mamba2(Mixer):
    """S_t = e^{−A Δ_t} S_{t−1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t + D x_t; out = W_o RMSNorm(y ⊙ silu(z)).

    [z, x, B, C, Δ'] = W_in u; x, B, C = silu(conv(·)); Δ = softplus(Δ' + b). A, D and b are per head, B and C
    are shared by the heads of a group; in the words of linear attention, k = B, v = Δx and q = C, unscaled.

    Args:
        d_model: width.
        heads: number of heads; must divide expand · d_model. The paper has heads of width 64.
        state_dim: N, the width of B and C; the paper has 128, its minimal code 64.
        groups: how many B and C there are; must divide heads.
        expand: inner width over d_model.
        conv: taps of the convolution over x, B and C.
        eps: of the norm, which is over the channels of a group.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data scalar",
        input_gate="delta",
        state="heads × state_dim × head_dim, taps × channels",
        paper="Mamba-2 (arXiv 2405.21060)",
    )
    no_weight_decay = frozenset({"log_rate", "step_bias", "skip", "norm_weight"})

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        state_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        conv: int = 4,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        inner = expand * d_model
        self.heads, self.head_dim = heads, split_heads(inner, heads, "expand · d_model")
        if groups < 1 or heads % groups:
            raise ConfigurationError(f"groups={groups} must divide heads={heads}")
        self.state_dim, self.groups, self.eps = state_dim, groups, eps
        convolved = [inner, groups * state_dim, groups * state_dim]
        self.outer_widths, self.inner_widths = [inner, sum(convolved), heads], convolved
        self.to_input = nn.Linear(d_model, sum(self.outer_widths), bias=False)
        self.convolution = ShortConvolution(sum(convolved), conv, bias=True)
        self.log_rate = decay_rates(heads, 1, 16)
        self.step_bias = step_biases(heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.to_output = nn.Linear(inner, d_model, bias=False)

    scan = staticmethod(linear_attention)
    """The engine. An instance may be given another one with the same arguments."""

    def initial_state(self, batch_size: int) -> MatrixState:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.state_dim, self.head_dim)
        return MatrixState(memory, self.convolution.initial_state(batch_size))

    def mix(self, x: Tensor, state: MatrixState, reset: Tensor | None) -> tuple[Tensor, MatrixState]:
        """The recurrence, over the whole sequence."""
        gate, mixed, raw_steps = self.to_input(x).split(self.outer_widths, dim=-1)
        mixed, window = self.convolution(mixed, state.window, reset)
        values, keys, queries = F.silu(mixed).split(self.inner_widths, dim=-1)
        values = values.unflatten(-1, (self.heads, -1))
        steps = softplus_steps(raw_steps, self.step_bias)
        outputs, memory = self.scan(
            self._per_head(queries),
            self._per_head(keys),
            values * steps.unsqueeze(-1),
            -widened(self.log_rate).exp() * steps,
            state.memory,
            reset=reset,
        )
        outputs = (outputs + self.skip.unsqueeze(-1) * values).flatten(-2) * F.silu(gate)
        grouped = outputs.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * self.norm_weight
        return self.to_output(normed), MatrixState(memory, window)

    def _per_head(self, x: Tensor) -> Tensor:
        """(batch, time, groups · state_dim) -> (batch, time, heads, state_dim): a group's is its heads'."""
        grouped = x.unflatten(-1, (self.groups, 1, -1)).expand(-1, -1, -1, self.heads // self.groups, -1)
        return grouped.flatten(2, 3)
