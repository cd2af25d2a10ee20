"""Gated linear attention: every key channel of the memory has its own data-dependent decay, every value channel too if
wanted.

Source: GLA (arXiv 2312.06635), section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import KeyValueMixer, MatrixState, cleared, padding, widened
from ostinato.ops.outer_gated_attention import outer_gated_attention

DECAYS = ("channel", "head", "fixed", "off")


class GLA(KeyValueMixer):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t with log α_t = logsigmoid(W_2 W_1 x + b) / τ.

    q = W_q x K^{−1/2}, k = W_k x, v = W_v x, no activation; y = W_o [RMSNorm(o) ⊙ silu(W_g x)].

    With `gate_values`, the general form, which the paper derives and then sets β = 1:
    S_t = (α_t β_tᵀ) ⊙ S_{t−1} + k_t v_tᵀ, log β with a W_2 W_1 x + b of its own (that it is made as α is: inferred).

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
        gate_values: whether the channels of the values decay too, by β.

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
        gate_values: bool = False,
    ) -> None:
        if decay not in DECAYS:
            raise ConfigurationError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=conv, gate="silu")
        self.temperature, self.gate_floor = temperature, gate_floor
        self.decay = decay
        if decay in ("channel", "head"):
            self.to_decay = _low_rank(d_model, gate_rank, heads * self.key_dim if decay == "channel" else heads)
        self.to_value_decay = _low_rank(d_model, gate_rank, heads * self.value_dim) if gate_values else None
        if gate_values:
            self.scan = outer_gated_attention  # type: ignore[method-assign]

    def log_decay(self, x: Tensor) -> Tensor:
        """log α in float32 at least: (batch, time, heads, key_dim), or with other decays one number per head."""
        if self.decay in ("fixed", "off"):
            head = torch.arange(self.heads, device=x.device, dtype=self.state_dtype)
            fixed = torch.log1p(-torch.exp2(-5 - head)) if self.decay == "fixed" else torch.zeros_like(head)
            return fixed.expand(*x.shape[:2], -1)
        log_decay = self._log_gate(self.to_decay(x))
        return log_decay if self.decay == "head" else log_decay.unflatten(-1, (self.heads, -1))

    def _log_gate(self, raw: Tensor) -> Tensor:
        """logsigmoid(raw) / τ, not below the floor."""
        log_gate = F.logsigmoid(widened(raw)) / self.temperature
        return log_gate if self.gate_floor is None else log_gate.clamp(min=self.gate_floor)

    def remember(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        """What is read from the memory at every step."""
        queries, keys, values, window = self.project(x, state.window, reset, lengths)
        if window is not None:
            queries, keys, values = F.silu(queries), F.silu(keys), F.silu(values)
        queries = queries * self.key_dim**-0.5
        padded = padding(lengths, x.shape[1])
        decays = [cleared(self.log_decay(x), padded)]
        if self.to_value_decay is not None:
            by_value = self._log_gate(self.to_value_decay(x)).unflatten(-1, (self.heads, -1))
            decays.insert(0, cleared(by_value, padded))
        outputs, memory = self.scan(queries, cleared(keys, padded), values, *decays, state.memory, reset=reset)
        return outputs, MatrixState(memory, window)


def _low_rank(d_model: int, rank: int, gates: int) -> nn.Sequential:
    """W_2 W_1 x + b: the raw gates."""
    return nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, gates))
