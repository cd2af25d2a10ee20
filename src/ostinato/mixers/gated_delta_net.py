"""Gated DeltaNet: the delta rule on a memory that also forgets, by one data-dependent scalar per head.

Source: Gated Delta Networks (arXiv 2412.06464), section 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ostinato.mixers.base import Traits
from ostinato.mixers.delta_net import DeltaRuleMixer
from ostinato.mixers.heads import decay_rates, softplus_steps, step_biases, widened
from ostinato.mixers.parts import linear_together


class GatedDeltaRuleMixer(DeltaRuleMixer):
    """A delta-rule mixer with log Λ_t = −A softplus(W_a x + b), one scalar per head and step."""

    no_weight_decay = frozenset({"log_rate", "step_bias"})

    def __init__(self, d_model: int, heads: int, **options: Any) -> None:
        super().__init__(d_model, heads, **options)
        self.to_steps = nn.Linear(d_model, heads, bias=False)
        self.log_rate = decay_rates(heads, 0, 16)
        self.step_bias = step_biases(heads)

    def log_decay(self, x: Tensor) -> Tensor:
        """log α, (batch, time, heads), in float32 at least."""
        return self.decayed(self.to_steps(x))

    def decayed(self, raw: Tensor) -> Tensor:
        """log α of W_a x."""
        return -widened(self.log_rate).exp() * softplus_steps(raw, self.step_bias)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`beta` and `log_decay`, of one product."""
        rates, steps = linear_together(x, self.to_beta, self.to_steps)
        return self.opened(rates), self.decayed(steps)


class GatedDeltaNet(GatedDeltaRuleMixer):
    """S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t; y = W_o [RMSNorm(o) ⊙ silu(W_g x)].

    q, k, v and β are DeltaNet's; log α = −A softplus(W_a x + b), with A and b per head.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        conv: taps of the short convolution over q, k and v; None for none.
        output_gate: whether there is the factor silu(W_g x).
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
    """

    traits = Traits(
        engine="delta_rule",
        transition="data scalar × rank-1",
        input_gate="beta",
        state="heads × key_dim × value_dim, taps × channels",
        channel_mixing=True,
        paper="Gated DeltaNet (arXiv 2412.06464)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv: int | None = 4,
        output_gate: bool = True,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            gate="silu" if output_gate else None,
            negative_eigenvalues=negative_eigenvalues,
        )
