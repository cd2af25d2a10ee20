"""DeltaNet: a memory that replaces what it holds under a key, instead of adding to it.

Also what the whole delta family shares: Gated DeltaNet, DeltaProduct and Kimi Delta Attention are this with
a decay, with several writes a step, and with a decay per channel.

Source: Parallelizing Linear Transformers with the Delta Rule (arXiv 2406.06484); eigenvalues in [−1, 1]:
Unlocking State-Tracking in Linear RNNs (arXiv 2411.12537).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import FEATURES, KeyValueMixer, MatrixState, cleared, find_feature_map, padding
from ostinato.ops.delta_rule import delta_rule

# The engine divides by the Euclidean length itself: a kernel then reads and writes nothing for it.
NORMS = {"l2": lambda x: x, "l1": lambda x: F.normalize(x, p=1.0, dim=-1, eps=1e-6)}


class DeltaRuleMixer(KeyValueMixer):
    """The delta family. In each step, with the decay Λ_t of the subclass and n writes j = 1 … n:

        S ← Λ_t S;   S ← (I − β_j k_j k_jᵀ) S + β_j k_j v_jᵀ;   o_t = Sᵀ q_t after all writes,

    q = norm(silu(conv(W_q x))) K^{−1/2}, k = norm(silu(conv(W_k x))), v = silu(conv(W_v x)), β = σ(W_β x),
    or 2σ(W_β x) with `negative_eigenvalues`: the transition's eigenvalue along k is then 1 − β ∈ (−1, 1).
    """

    scan = staticmethod(delta_rule)
    qk_activation = "silu"
    qk_norm = "l2"

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        expand_k: float,
        expand_v: float,
        conv: int | None,
        gate: str | None,
        negative_eigenvalues: bool,
        writes: int = 1,
    ) -> None:
        if writes < 1:
            raise ConfigurationError(f"a step needs at least one Householder factor, got {writes}")
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=conv, gate=gate, writes=writes)
        self.writes, self.negative_eigenvalues = writes, negative_eigenvalues
        self.to_beta = nn.Linear(d_model, writes * heads, bias=False)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """log Λ: None, (batch, time, heads) or (batch, time, heads, key_dim)."""
        return None

    def beta(self, x: Tensor) -> Tensor:
        """The step sizes, (batch, writes · time, heads)."""
        return self.opened(self.to_beta(x))

    def opened(self, raw: Tensor) -> Tensor:
        """β of W_β x."""
        beta = torch.sigmoid(raw) * (2 if self.negative_eigenvalues else 1)
        return beta.reshape(len(raw), -1, self.heads)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`beta` and `log_decay`."""
        return self.beta(x), self.log_decay(x)

    def remember(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        """What is read from the memory at every step."""
        fused = self.qk_activation == "silu"
        queries, keys, values, window = self.project(x, state.window, reset, lengths, silu=(fused, fused, True))
        activation, norm = FEATURES["identity" if fused else self.qk_activation], NORMS[self.qk_norm]
        queries, keys = norm(activation(queries)), norm(activation(keys))
        beta, log_decay = self.gates(x)
        if (padded := padding(lengths, x.shape[1])) is not None:
            beta = cleared(beta, padded.repeat_interleave(self.writes, dim=1))
            log_decay = None if log_decay is None else cleared(log_decay, padded)
        unit = self.qk_norm == "l2"
        outputs, memory = self.scan(queries, keys, values, beta, log_decay, state.memory, reset=reset, normalize=unit)
        # K^{-1/2} on the way out: reading is linear in the queries, and their length is the engine's affair.
        return outputs * self.key_dim**-0.5, MatrixState(memory, window)


class DeltaNet(DeltaRuleMixer):
    """S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t; y = W_o RMSNorm(o).

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        conv: taps of the short convolution over q, k and v; None for none.
        output_gate: y = W_o [RMSNorm(o) ⊙ silu(W_g x)].
        negative_eigenvalues: β in (0, 2) instead of (0, 1).
        qk_activation: "silu", "relu", "elu" (elu + 1) or "identity", before the norm of q and k.
        qk_norm: "l2", or "l1" (the older DeltaNet, with "elu").
    """

    traits = Traits(
        engine="delta_rule",
        transition="rank-1",
        input_gate="beta",
        state="heads × key_dim × value_dim, taps × channels",
        channel_mixing=True,
        paper="DeltaNet (arXiv 2406.06484)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int | None = 4,
        output_gate: bool = False,
        negative_eigenvalues: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
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
        find_feature_map(qk_activation, "qk_activation")
        if qk_norm not in NORMS:
            raise ConfigurationError(f"qk_norm must be one of {', '.join(NORMS)}, got {qk_norm!r}")
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
