"""S4D: one diagonal complex system per feature, trained as a convolution, run as a recurrence.

Source: "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.parts import log_uniform
from ostinato.mixers.time_invariant import TimeInvariant, as_pairs, from_pairs
from ostinato.ops.hippo import diagonal_system, discretize_diagonal
from ostinato.ops.state_space import Block, diagonal_block, to_complex, to_real


class S4D(TimeInvariant):
    """x_t = Ā ∘ x_{t−1} + B̄ u_t, y_t = 2 Re(C x_t) + D u_t for every feature; then GELU, Linear, GLU.

    Λ = −exp(log_real) + i·imaginary. Zero-order hold: Ā = e^{ΔΛ}, B̄ = B(e^{ΔΛ} − 1)/Λ; bilinear: Ā = (1 + ΔΛ/2)/(1 −
    ΔΛ/2), B̄ = ΔB/(1 − ΔΛ/2). B is the initialisation's and is not trained (C takes its place); C starts as complex
    standard normal, D as standard normal, log Δ uniform.

    Args:
        d_model: width.
        d_state: N, real state coordinates per feature (N/2 complex ones are stored).
        initialization: lin, inv, legs, quad or real (`ops.hippo.diagonal_system`).
        discretization: zoh or bilinear.
        step_min, step_max: the range of Δ.
        output: "glu" (GELU, Linear(d → 2d), GLU, as in the paper's layer), or "none" for the bare system.
        block_length: steps per convolution; longer sequences carry the state from block to block.
        rate: multiplies Δ, for input sampled at another rate.
    """

    traits = Traits(
        engine="long_convolution",
        transition="fixed vector",
        input_gate="none",
        state="d_model × d_state",
        paper="S4D (arXiv 2206.11893)",
    )
    no_weight_decay = frozenset({"log_real", "imaginary", "log_step"})
    learning_rate_cap = {"log_real": 1e-3, "imaginary": 1e-3, "log_step": 1e-3}  # noqa: RUF012

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        initialization: str = "lin",
        discretization: str = "zoh",
        step_min: float = 0.001,
        step_max: float = 0.1,
        output: str = "glu",
        block_length: int = 256,
        rate: float = 1.0,
    ) -> None:
        super().__init__(d_model, d_state, output, block_length, rate)
        if discretization not in ("zoh", "bilinear"):
            raise ConfigurationError(f"discretization must be 'zoh' or 'bilinear', got {discretization!r}")
        self.discretization = discretization
        eigenvalues, inputs = diagonal_system(initialization, d_state)
        eigenvalues = eigenvalues.expand(d_model, -1)
        dtype = torch.get_default_dtype()
        self.log_real = nn.Parameter(torch.log(-eigenvalues.real).to(dtype))
        self.imaginary = nn.Parameter(eigenvalues.imag.to(dtype).clone())
        self.inputs: Tensor
        self.register_buffer("inputs", as_pairs(inputs))
        self.outputs = nn.Parameter(torch.randn(d_model, self.pairs, 2) * math.sqrt(0.5))
        self.log_step = nn.Parameter(torch.log(log_uniform(d_model, step_min, step_max)))

    def discrete_system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ā, B̄, C, each (d_model, N/2) and complex."""
        dtype = self.state_dtype
        eigenvalues = torch.complex(-torch.exp(self.log_real.to(dtype)), self.imaginary.to(dtype))
        step = self.rate * torch.exp(self.log_step.to(dtype)).unsqueeze(-1)
        transition, scale = discretize_diagonal(eigenvalues, step, self.discretization)
        return transition, scale * from_pairs(self.inputs), from_pairs(self.outputs)

    def block(self, length: int) -> Block:
        """The system's maps over `length` steps."""
        return diagonal_block(*self.discrete_system(), length)

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recurrence."""
        transition, inputs, outputs = self.discrete_system()
        h = transition * to_complex(state) + inputs * x.unsqueeze(-1)
        return 2 * (outputs * h).sum(-1).real, to_real(h)
