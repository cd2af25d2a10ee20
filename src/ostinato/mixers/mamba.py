"""Mamba: a diagonal state space system whose step, input and output depend on the input.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3; the
transition with negative eigenvalues: arXiv 2411.12537.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.parts import ShortConvolution, log_uniform, softplus_inverse
from ostinato.ops.checks import own_precision
from ostinato.ops.diagonal_scan import diagonal_scan


class MambaState(NamedTuple):
    """The state of every channel, and the inputs that the short convolution still needs."""

    hidden: Float[Tensor, "batch inner state"]
    convolution: Float[Tensor, "batch taps inner"]


class Mamba(Mixer):
    """h_t = exp(Δ_t ⊗ A) ∘ h_{t−1} + (Δ_t ∘ x_t) ⊗ B_t, y_t = h_t C_t + D ∘ x_t, times SiLU(z_t), projected.

    [x, z] = W_in u; x ← SiLU(conv(x)); [δ, B, C] = W_x x; Δ = softplus(W_δ δ + b_δ); A = −exp(log_rate), which starts
    at −(1 … N) in every channel. The input takes the Euler rule Δ·B.

    Args:
        d_model: width.
        d_state: N, state per channel.
        expand: inner width over d_model.
        conv_width: taps of the causal convolution.
        step_rank: size of δ; ⌈d_model/16⌉ if None.
        negative_eigenvalues: the transition is 2·exp(Δ ⊗ A) − 1, in (−1, 1), instead of (0, 1); the input term
            stays.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="data per-channel × state",
        input_gate="delta",
        state="2·d_model × d_state",
        paper="Mamba (arXiv 2312.00752)",
    )
    no_weight_decay = frozenset({"log_rate", "skip"})

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        conv_width: int = 4,
        step_rank: int | None = None,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(d_model)
        if d_state < 1 or expand < 1:
            raise ConfigurationError(f"d_state and expand must be positive, got {d_state} and {expand}")
        self.inner, self.d_state, self.negative_eigenvalues = expand * d_model, d_state, negative_eigenvalues
        self.step_rank = step_rank or math.ceil(d_model / 16)
        self.to_input = nn.Linear(d_model, 2 * self.inner, bias=False)
        self.convolution = ShortConvolution(self.inner, conv_width, bias=True)
        self.to_selection = nn.Linear(self.inner, self.step_rank + 2 * d_state, bias=False)
        self.to_step = nn.Linear(self.step_rank, self.inner)
        nn.init.uniform_(self.to_step.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        with torch.no_grad():
            self.to_step.bias.copy_(softplus_inverse(log_uniform(self.inner, 1e-3, 1e-1, floor=1e-4)))
        self.log_rate = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.inner, 1))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.to_output = nn.Linear(self.inner, d_model, bias=False)

    def initial_state(self, batch_size: int) -> MambaState:
        """Zeros."""
        return MambaState(self.zeros(batch_size, self.inner, self.d_state), self.convolution.initial_state(batch_size))

    def mix(self, x: Tensor, state: MambaState, reset: Tensor | None) -> tuple[Tensor, MambaState]:
        """The layer, over the whole sequence."""
        dtype = self.state_dtype
        u, gate = self.to_input(x).chunk(2, dim=-1)
        u, past = self.convolution(u, state.convolution, reset)
        u = F.silu(u)
        sizes = [self.step_rank, self.d_state, self.d_state]
        selection, inputs, outputs = self.to_selection(u).split(sizes, dim=-1)
        wide = u.to(dtype)
        step = F.softplus(self.to_step(selection).to(dtype))
        transition = torch.exp(step.unsqueeze(-1) * -torch.exp(self.log_rate.to(dtype)))
        if self.negative_eigenvalues:
            transition = 2 * transition - 1
        written = (step * wide).unsqueeze(-1) * inputs.to(dtype).unsqueeze(2)
        hidden, last = diagonal_scan(transition, written, state.hidden, reset=reset)
        with own_precision(x):
            y = torch.einsum("btdn,btn->btd", hidden, outputs.to(dtype)) + self.skip.to(dtype) * wide
        return self.to_output(y.to(x.dtype) * F.silu(gate)), MambaState(last, past)
