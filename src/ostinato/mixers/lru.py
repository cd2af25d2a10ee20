"""LRU: the linear recurrent unit, a complex diagonal recurrence on a ring inside the unit circle.

Source: "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349), section 3 and appendix A.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.time_invariant import from_pairs
from ostinato.ops.checks import own_precision
from ostinato.ops.diagonal_scan import diagonal_scan


class LRUState(NamedTuple):
    """Real and imaginary parts of the hidden vector."""

    hidden: Float[Tensor, "batch state 2"]


class LRU(Mixer):
    """h_t = λ ∘ h_{t−1} + γ ∘ (B x_t), y_t = Re(C h_t) + D ∘ x_t, with λ = e^{−e^ν + i e^θ}.

    |λ| is drawn uniformly (by area) from the ring [r_min, r_max], the phase from [0, max_phase]; γ starts at √(1 −
    |λ|²), which gives h the variance of B x, and is learned as its logarithm. B ~ N(0, 1/2d) and C ~ N(0, 1/n) per real
    part, D ~ N(0, 1).

    Args:
        d_model: width.
        d_state: n, complex state coordinates; d_model if None.
        r_min, r_max: the ring.
        max_phase: the largest initial phase; π/10 helps on very long sequences.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="fixed vector",
        input_gate="fixed vector",
        state="2 × d_state",
        paper="LRU (arXiv 2303.06349)",
    )
    no_weight_decay = frozenset({"log_log_radius", "log_phase", "log_scale"})

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(d_model)
        if not 0 <= r_min < r_max <= 1:
            raise ConfigurationError(f"the ring needs 0 <= r_min < r_max <= 1, got {r_min} and {r_max}")
        self.d_state = d_model if d_state is None else d_state
        tiny = 1e-6
        area = torch.rand(self.d_state).clamp(tiny, 1 - tiny) * (r_max**2 - r_min**2) + r_min**2
        self.log_log_radius = nn.Parameter(torch.log(-0.5 * torch.log(area)))
        self.log_phase = nn.Parameter(torch.log(max_phase * torch.rand(self.d_state).clamp(min=tiny)))
        self.log_scale = nn.Parameter(0.5 * torch.log1p(-area))
        self.inputs = nn.Parameter(torch.randn(self.d_state, d_model, 2) / math.sqrt(2 * d_model))
        self.outputs = nn.Parameter(torch.randn(d_model, self.d_state, 2) / math.sqrt(self.d_state))
        self.skip = nn.Parameter(torch.randn(d_model))

    def initial_state(self, batch_size: int) -> LRUState:
        """Zeros."""
        return LRUState(self.zeros(batch_size, self.d_state, 2))

    def mix(self, x: Tensor, state: LRUState, reset: Tensor | None) -> tuple[Tensor, LRUState]:
        """The recurrence, over the whole sequence."""
        with own_precision(x):
            return self._system(x, state, reset)

    def _system(self, x: Tensor, state: LRUState, reset: Tensor | None) -> tuple[Tensor, LRUState]:
        dtype = self.state_dtype
        u = x.to(dtype)
        radius = torch.exp(-torch.exp(self.log_log_radius.to(dtype)))
        transition = torch.polar(radius, torch.exp(self.log_phase.to(dtype)))
        inputs = torch.exp(self.log_scale.to(dtype)).view(-1, 1, 1) * self.inputs.to(dtype)
        outputs = self.outputs.to(dtype)
        driven = torch.complex(u @ inputs[..., 0].mT, u @ inputs[..., 1].mT)
        h, last = diagonal_scan(transition.view(1, 1, -1), driven, from_pairs(state.hidden), reset=reset)
        y = h.real @ outputs[..., 0].mT - h.imag @ outputs[..., 1].mT + self.skip.to(dtype) * u
        return y.to(x.dtype), LRUState(torch.stack([last.real, last.imag], dim=-1))
