"""DeltaProduct: several delta-rule writes per step, so that the transition is a product of Householder factors.

Source: DeltaProduct (arXiv 2502.10297), section 3.
"""

from __future__ import annotations

from torch import nn

from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.delta_net import DeltaRuleMixer
from ostinato.mixers.gated_delta_net import GatedDeltaRuleMixer


def _initialize(mixer: Mixer) -> None:
    """Xavier-uniform with gain 2^{−2.5} for every linear map, as the authors have it."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)


class DeltaProduct(DeltaRuleMixer):
    """S_t = ∏_{j=n…1} (I − β_j k_j k_jᵀ) S_{t−1} + …, the n delta-rule writes of one step; o_t = S_tᵀ q_t.

    Every write has its own key, value and β; with one it is DeltaNet. With `negative_eigenvalues` two factors
    make a rotation, and n − 1 make any permutation of n things.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        householders: n, the number of writes a step.
        expand_k, expand_v: total width of keys (of one write) and of values over d_model, rounded down per head.
        conv: taps of the short convolution over q, k and v; None for none.
        output_gate: y = W_o [RMSNorm(o) ⊙ silu(W_g x)].
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
    """

    traits = Traits(
        engine="delta_rule",
        transition="rank-n",
        input_gate="beta",
        state="heads × key_dim × value_dim, taps × channels",
        channel_mixing=True,
        paper="DeltaProduct (arXiv 2502.10297)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        householders: int = 2,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        output_gate: bool = False,
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
            writes=householders,
        )
        _initialize(self)


class GatedDeltaProduct(GatedDeltaRuleMixer):
    """DeltaProduct on S ← α_t S: one scalar decay per head and step, before the first of the n writes.

    log α = −A softplus(W_a x + b) as in Gated DeltaNet, which it is with one write.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        householders: n, the number of writes a step.
        expand_k, expand_v: total width of keys (of one write) and of values over d_model, rounded down per head.
        conv: taps of the short convolution over q, k and v; None for none.
        output_gate: whether there is the factor silu(W_g x).
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
    """

    traits = Traits(
        engine="delta_rule",
        transition="data scalar × rank-n",
        input_gate="beta",
        state="heads × key_dim × value_dim, taps × channels",
        channel_mixing=True,
        paper="Gated DeltaProduct (arXiv 2502.10297)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        householders: int = 2,
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
            writes=householders,
        )
        _initialize(self)
