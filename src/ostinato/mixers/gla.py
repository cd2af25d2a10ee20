"""Gated linear attention: every key channel of the memory has its own data-dependent decay.

Source: GLA (arXiv 2312.06635), section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import KeyValueMixer, MatrixState, cleared, padding, widened

DECAYS = ("channel", "head", "fixed", "off")


class GLA(KeyValueMixer):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t with log α_t = logsigmoid(W_2 W_1 x + b) / τ.

    q = W_q x K^{−1/2}, k = W_k x, v = W_v x, no activation; y = W_o [RMSNorm(o) ⊙ silu(W_g x)].

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        gate_rank: the rank of W_2 W_1.
        temperature: τ; it divides the logarithm of the decay, α = σ(·)^{1/τ}.
        gate_floor: the least log α; None for no bound.
        conv: taps of a short convolution over q, k and v, followed by SiLU; None (the paper) for none.
        decay: "channel", or for ablations "head" (one data-dependent α per head), "fixed" (RetNet's constant
            α_h = 1 − 2^{−5−h}) or "off" (α = 1).

    Raises `ConfigurationError` for another decay.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        state="heads × key_dim × value_dim",
        paper="GLA (arXiv 2312.06635)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        temperature: float = 16.0,
        gate_floor: float | None = None,
        conv: int | None = None,
        decay: str = "channel",
    ) -> None:
        if decay not in DECAYS:
            raise ConfigurationError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=conv, gate="silu")
        self.temperature, self.gate_floor = temperature, gate_floor
        self.decay = decay
        if decay in ("channel", "head"):
            gates = heads * self.key_dim if decay == "channel" else heads
            self.to_decay = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, gates))

    def log_decay(self, x: Tensor) -> Tensor:
        """log α in float32 at least: (batch, time, heads, key_dim), or with other decays one number per head."""
        if self.decay in ("fixed", "off"):
            head = torch.arange(self.heads, device=x.device, dtype=self.state_dtype)
            fixed = torch.log1p(-torch.exp2(-5 - head)) if self.decay == "fixed" else torch.zeros_like(head)
            return fixed.expand(*x.shape[:2], -1)
        log_decay = F.logsigmoid(widened(self.to_decay(x))) / self.temperature
        if self.gate_floor is not None:
            log_decay = log_decay.clamp(min=self.gate_floor)
        return log_decay if self.decay == "head" else log_decay.unflatten(-1, (self.heads, -1))

    def remember(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        """What is read from the memory at every step."""
        queries, keys, values, window = self.project(x, state.window, reset, lengths)
        if window is not None:
            queries, keys, values = F.silu(queries), F.silu(keys), F.silu(values)
        queries = queries * self.key_dim**-0.5
        padded = padding(lengths, x.shape[1])
        log_decay = cleared(self.log_decay(x), padded)
        outputs, memory = self.scan(queries, cleared(keys, padded), values, log_decay, state.memory, reset=reset)
        return outputs, MatrixState(memory, window)
