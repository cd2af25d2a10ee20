"""Kimi Delta Attention: Gated DeltaNet in which every key channel has its own decay.

Source: Kimi Linear (arXiv 2510.26692), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.delta_net import DeltaRuleMixer
from ostinato.mixers.heads import decay_rates, softplus_steps, step_biases, widened


class KimiDeltaAttention(DeltaRuleMixer):
    """S' = diag(α_t) S_{t−1}; S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ, o_t = S_tᵀ q_t; y = W_o [RMSNorm(o) ⊙ σ(G x)].

    q, k, v and β are DeltaNet's; log α = −A softplus(W_2 W_1 x + b), with A per head and b per channel. Both
    W_2 W_1 and G have the rank of a head's values; G has a bias.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        conv: taps of the short convolution over q, k and v; None for none.
        gate_floor: the least log α, below 0: then log α = floor · σ(A (W_2 W_1 x + b)). None for no bound.
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
    """

    traits = Traits(
        engine="delta_rule",
        transition="data vector × rank-1",
        input_gate="beta",
        state="heads × key_dim × value_dim, taps × channels",
        channel_mixing=True,
        paper="Kimi Linear (arXiv 2510.26692)",
    )
    no_weight_decay = frozenset({"log_rate", "step_bias"})

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        gate_floor: float | None = None,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            gate="sigmoid",
            negative_eigenvalues=negative_eigenvalues,
        )
        if gate_floor is not None and gate_floor >= 0:
            raise ConfigurationError(f"gate_floor bounds the logarithm of a decay, so it is below 0, got {gate_floor}")
        self.gate_floor = gate_floor
        self.to_steps = nn.Sequential(
            nn.Linear(d_model, self.value_dim, bias=False),
            nn.Linear(self.value_dim, heads * self.key_dim, bias=False),
        )
        self.log_rate = decay_rates(heads, 1, 16)
        self.step_bias = step_biases(heads * self.key_dim)

    def gate_map(self) -> nn.Module:
        """G: a map of the rank of a head."""
        return nn.Sequential(
            nn.Linear(self.d_model, self.value_dim, bias=False),
            nn.Linear(self.value_dim, self.heads * self.value_dim),
        )

    def log_decay(self, x: Tensor) -> Tensor:
        """log α, (batch, time, heads, key_dim), in float32 at least."""
        rate = widened(self.log_rate).exp().unsqueeze(-1)
        raw = self.to_steps(x)
        if self.gate_floor is None:
            return -rate * softplus_steps(raw, self.step_bias).unflatten(-1, (self.heads, -1))
        shifted = (widened(raw) + widened(self.step_bias)).unflatten(-1, (self.heads, -1))
        return self.gate_floor * torch.sigmoid(rate * shifted)
