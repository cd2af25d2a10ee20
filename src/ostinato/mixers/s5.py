"""S5: one diagonal complex system with many inputs and many outputs, run by the scan.

Source: "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.parts import log_uniform
from ostinato.mixers.time_invariant import as_pairs, from_pairs
from ostinato.ops.checks import own_precision
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.hippo import diagonal_plus_low_rank, discretize_diagonal


class S5State(NamedTuple):
    """Real and imaginary parts of one of each pair of conjugate coordinates."""

    coordinates: Float[Tensor, "batch half 2"]


class S5(Mixer):
    """x_t = Λ̄ ∘ x_{t−1} + B̄ u_t, y_t = 2 Re(C x_t) + D ∘ u_t; then g ∘ σ(W g + b) with g = GELU(y).

    Λ̄ = e^{ΛΔ}, B̄ = ((Λ̄ − 1)/Λ) ∘ B (zero-order hold), with one step Δ per state coordinate. Λ starts as the
    diagonal part of HiPPO-LegS in `blocks` copies, B and C as normal matrices in its basis. The real part of Λ is
    clipped at −10⁻⁴ while computing.

    Args:
        d_model: width.
        d_state: P, real state coordinates in all (P/2 complex ones are stored).
        blocks: J, LegS blocks on the diagonal at the start; d_state/blocks is even.
        step_min, step_max: the range of Δ, log-uniform.
        gated: the half-GLU of the paper's layer; without it y is returned as it is.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="fixed vector",
        input_gate="none",
        state="d_state",
        paper="S5 (arXiv 2208.04933)",
    )
    no_weight_decay = frozenset({"real", "imaginary", "inputs", "log_step"})
    learning_rate_cap = dict.fromkeys(sorted(no_weight_decay), 1e-3)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 4,
        step_min: float = 0.001,
        step_max: float = 0.1,
        gated: bool = True,
    ) -> None:
        super().__init__(d_model)
        size = split_heads(d_state, blocks, "d_state")
        if size % 2:
            raise ConfigurationError(f"d_state/blocks must be even, got {d_state}/{blocks}")
        self.pairs = d_state // 2
        system = diagonal_plus_low_rank("legs", size)
        eigenvalues = system.eigenvalues.repeat(blocks)
        basis = torch.block_diag(*[system.basis] * blocks)
        dtype = torch.get_default_dtype()
        inputs = torch.randn(d_state, d_model, dtype=torch.float64) / math.sqrt(d_model)
        outputs = torch.randn(d_model, d_state, dtype=torch.complex128) / math.sqrt(d_state)
        self.real = nn.Parameter(eigenvalues.real.to(dtype).clone())
        self.imaginary = nn.Parameter(eigenvalues.imag.to(dtype).clone())
        self.inputs = nn.Parameter(as_pairs(basis.mH @ inputs.to(basis.dtype)))
        self.outputs = nn.Parameter(as_pairs(outputs @ basis))
        self.skip = nn.Parameter(torch.randn(d_model))
        self.log_step = nn.Parameter(torch.log(log_uniform(self.pairs, step_min, step_max)))
        self.to_gate = nn.Linear(d_model, d_model) if gated else None

    def initial_state(self, batch_size: int) -> S5State:
        """Zeros."""
        return S5State(self.zeros(batch_size, self.pairs, 2))

    def mix(self, x: Tensor, state: S5State, reset: Tensor | None) -> tuple[Tensor, S5State]:
        """The system over the whole sequence, the skip, the gate."""
        with own_precision(x):
            y, last = self._system(x, state, reset)
        if self.to_gate is not None:
            y = F.gelu(y)
            y = y * torch.sigmoid(self.to_gate(y))
        return y, last

    def _system(self, x: Tensor, state: S5State, reset: Tensor | None) -> tuple[Tensor, S5State]:
        dtype = self.state_dtype
        u = x.to(dtype)
        eigenvalues = torch.complex(self.real.to(dtype).clamp(max=-1e-4), self.imaginary.to(dtype))
        transition, scale = discretize_diagonal(eigenvalues, torch.exp(self.log_step.to(dtype)))
        inputs, outputs = scale.unsqueeze(-1) * from_pairs(self.inputs), from_pairs(self.outputs)
        driven = torch.complex(u @ inputs.real.mT, u @ inputs.imag.mT)
        h, last = diagonal_scan(transition.view(1, 1, -1), driven, from_pairs(state.coordinates), reset=reset)
        y = 2 * (h.real @ outputs.real.mT - h.imag @ outputs.imag.mT) + self.skip.to(dtype) * u
        return y.to(x.dtype), S5State(torch.stack([last.real, last.imag], dim=-1))
