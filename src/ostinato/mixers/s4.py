"""S4: one HiPPO system per feature, diagonal plus low rank, trained as a convolution, run as a recurrence.

Source: "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.parts import log_uniform
from ostinato.mixers.time_invariant import TimeInvariant, as_pairs, from_pairs
from ostinato.ops.hippo import diagonal_plus_low_rank
from ostinato.ops.state_space import Block, DplrSystem, dplr_block, dplr_step

MEASURES = ("legs", "legt", "fout", "random")


class S4(TimeInvariant):
    """x' = (Λ − P P*) x + B u, y = 2 Re(C x) + D u per feature, by the bilinear rule; then GELU, Linear, GLU.

    Λ = −exp(log_real) + i·imaginary. The parameter is C, not C̄ = C(I − Ā^L): C̄ is computed for the length in use
    from Ā^L, which the state needs anyway, so the same weights step, convolve and serve any length. Low rank,
    Λ and B exist `copies` times and are shared by the features in turn.

    Args:
        d_model: width.
        d_state: N, real state coordinates per feature (N/2 complex ones are stored).
        measure: legs (default), legt (rank 2), fout, or random (an ablation).
        copies: independent (Λ, P, B); divides d_model.
        step_min, step_max: the range of Δ, log-uniform.
        clamp_inputs: limit the imaginary part of B to [−2, 2], as the authors' code optionally does.
        output: "glu" (GELU, Linear(d → 2d), GLU, as in the paper's layer), or "none" for the bare system.
        block_length: steps per convolution; longer sequences carry the state from block to block.
        rate: multiplies Δ, for input sampled at another rate.

    The real part of Λ starts at −10⁻⁴ where the measure has 0 (legt, fout): it is kept negative by −exp.
    """

    traits = Traits(
        engine="long_convolution",
        transition="fixed vector + rank-1",
        input_gate="none",
        state="d_model × d_state",
        channel_mixing=True,
        paper="S4 (arXiv 2111.00396)",
    )
    no_weight_decay = frozenset({"log_real", "imaginary", "low_rank", "inputs", "log_step"})
    learning_rate_cap = dict.fromkeys(sorted(no_weight_decay), 1e-3)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        copies: int = 1,
        step_min: float = 0.001,
        step_max: float = 0.1,
        clamp_inputs: bool = False,
        output: str = "glu",
        block_length: int = 64,
        rate: float = 1.0,
    ) -> None:
        super().__init__(d_model, d_state, output, block_length, rate)
        if measure not in MEASURES:
            raise ConfigurationError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if copies < 1 or d_model % copies:
            raise ConfigurationError(f"copies={copies} does not divide d_model={d_model}")
        self.copies = copies
        systems = [diagonal_plus_low_rank(measure, d_state) for _ in range(copies)]
        eigenvalues, low_rank, inputs = (torch.stack([system[part] for system in systems]) for part in range(3))
        if clamp_inputs:
            inputs = torch.complex(inputs.real, inputs.imag.clamp(-2, 2))
        dtype = torch.get_default_dtype()
        self.log_real = nn.Parameter(torch.log((-eigenvalues.real).clamp(min=1e-4)).to(dtype))
        self.imaginary = nn.Parameter(eigenvalues.imag.to(dtype).clone())
        self.low_rank = nn.Parameter(as_pairs(low_rank))
        self.inputs = nn.Parameter(as_pairs(inputs))
        self.outputs = nn.Parameter(torch.randn(d_model, self.pairs, 2) * math.sqrt(0.5))
        self.log_step = nn.Parameter(torch.log(log_uniform(d_model, step_min, step_max)))

    def system(self) -> DplrSystem:
        """The continuous system and the steps, for every feature."""
        dtype, shared = self.state_dtype, self.d_model // self.copies
        eigenvalues = torch.complex(-torch.exp(self.log_real.to(dtype)), self.imaginary.to(dtype))
        return DplrSystem(
            eigenvalues.repeat(shared, 1),
            from_pairs(self.low_rank).repeat(shared, 1, 1),
            from_pairs(self.inputs).repeat(shared, 1),
            from_pairs(self.outputs),
            self.rate * torch.exp(self.log_step.to(dtype)).unsqueeze(-1),
        )

    def block(self, length: int) -> Block:
        """The system's maps over `length` steps."""
        return dplr_block(self.system(), length)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step, in O(N) per feature."""
        return dplr_step(self.system(), x, state)
