"""Liger attention: softmax attention's own projections as a gated recurrence, averaged with a sliding window.

Source: Liger (arXiv 2503.01496), section 3. The mixer has the parameters of `Attention` and no other; but for two
controls of section 4, a gate and a feature map that are learned anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.attention import Attention, AttentionCache
from ostinato.mixers.base import State, Traits
from ostinato.mixers.gated_slot_attention import slot_attention
from ostinato.mixers.heads import widened
from ostinato.mixers.hedgehog import feature_weights, hedgehog
from ostinato.ops.linear_attention import linear_attention

RECURRENCES = ("gla", "hgrn2", "gsa")
GATES = ("pooled", "fresh", "none")
FEATURES = ("softmax", "learned")


class LigerState(NamedTuple):
    """The memory of every head, and the cache of the window."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    """With slots: (batch, heads, slots, value_dim), the slots' values. Learned features: twice as many rows."""
    slot_keys: Float[Tensor, "batch heads slots key_dim"] | None
    window: AttentionCache


class Liger(Attention):
    """y = W_o [λ o_lin + (1 − λ) o_win]: a gated recurrence and windowed attention over the same q, k and v.

    The window's half is `Attention`'s: rotated, scaled by D^{−1/2}. The recurrence is neither; its gate is read off
    the keys, u = pool(k), a mean of neighbouring channels, and is the identity where there is a gate per channel:

    - gla: S_t = diag(α_t) S_{t−1} + softmax(k_t) v_tᵀ, o = S_tᵀ softmax(q_t), log α = logsigmoid(u) / τ;
    - hgrn2: the same with keys 1 − α_t, log α = logsigmoid(u);
    - gsa: m slots, K_t = diag(α_t) K_{t−1} + (1 − α_t) k_tᵀ, V_t likewise, o = V_tᵀ softmax(K_t q_t), log α as gla's.

    Softmax of q and k is over the channels of a head. Keys, values and gates are repeated for the heads that share
    them. The recurrence is computed in float32 at least.

    Args:
        d_model, heads, key_value_heads, rope, base, qk_norm: as `Attention`'s; the norms are the window's alone.
        window: how many steps the window sees.
        recurrence: "gla", "hgrn2" or "gsa".
        mix: λ, in (0, 1]; 1 is the recurrence alone.
        gate_normalizer: τ.
        slots: m, for gsa.
        gate: "pooled", or a control: "fresh", u from a learned projection of x; "none", α = 1 (gla alone).
        features: of q and k, for gla: "softmax", or a control: "learned", Hedgehog's softmax([x W, −x W]) with a matrix
            W per head for q and one for k, the identity at first. The memory then has 2 head_dim rows, of which row
            i and head_dim + i share a decay.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        state="heads × head_dim × head_dim + window × key_value_heads × head_dim × 2",
        linear=False,  # the memory is; the window is softmax attention
        paper="Liger (arXiv 2503.01496)",
    )
    no_weight_decay = frozenset({"query_features", "key_features"})

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        key_value_heads: int | None = None,
        window: int = 64,
        recurrence: str = "gla",
        mix: float = 0.5,
        gate_normalizer: float = 16.0,
        slots: int = 16,
        gate: str = "pooled",
        rope: bool = True,
        base: float = 10000.0,
        qk_norm: bool = False,
        features: str = "softmax",
    ) -> None:
        if window is None:
            raise ConfigurationError("the window of Liger attention is a number of steps; None is softmax attention")
        super().__init__(d_model, heads, key_value_heads, window, rope, base, qk_norm)
        if recurrence not in RECURRENCES:
            raise ConfigurationError(f"recurrence must be one of {', '.join(RECURRENCES)}, got {recurrence!r}")
        if gate not in GATES:
            raise ConfigurationError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
        if gate == "none" and recurrence != "gla":
            raise ConfigurationError(f"{recurrence} writes 1 − α: without a gate it writes nothing; use recurrence=gla")
        if features not in FEATURES:
            raise ConfigurationError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
        if features == "learned" and recurrence != "gla":
            raise ConfigurationError(f"{recurrence} has no feature map of its keys to learn; use recurrence=gla")
        if not 0 < mix <= 1:
            raise ConfigurationError(
                f"mix must be in (0, 1], got {mix}; without the recurrence it is attention(window)"
            )
        if gate_normalizer <= 0 or slots < 1:
            raise ConfigurationError(
                f"gate_normalizer must be positive and slots at least 1, got {gate_normalizer} and {slots}"
            )
        self.recurrence, self.mixed, self.gate_normalizer = recurrence, mix, gate_normalizer
        self.slots, self.gate = slots, gate
        gates = slots if recurrence == "gsa" else self.head_dim
        self.to_gate = nn.Linear(d_model, self.key_value_heads * gates, bias=False) if gate == "fresh" else None
        learned = features == "learned"
        self.query_features = feature_weights(heads, self.head_dim) if learned else None
        self.key_features = feature_weights(heads, self.head_dim) if learned else None

    @classmethod
    def from_softmax(
        cls,
        attention: Attention,
        *,
        recurrence: str = "gla",
        window: int = 64,
        mix: float = 0.5,
        gate_normalizer: float = 16.0,
        slots: int = 16,
        gate: str = "pooled",
        features: str = "softmax",
    ) -> Liger:
        """Liger attention with the parameters of softmax attention: the same tensors, under the same names."""
        liger = cls(
            attention.d_model,
            attention.heads,
            attention.key_value_heads,
            window,
            recurrence,
            mix,
            gate_normalizer,
            slots,
            gate,
            attention.rope,
            attention.base,
            attention.query_norm is not None,
            features,
        )
        liger.to(attention.to_key.weight)
        for name, part in attention.named_children():
            setattr(liger, name, part)
        return liger.train(attention.training)

    def initial_state(self, batch_size: int) -> LigerState:  # type: ignore[override]
        """Zeros, and an empty cache."""
        rows = self.slots if self.recurrence == "gsa" else self.head_dim * (1 if self.key_features is None else 2)
        width = (batch_size, self.heads, rows, self.head_dim)
        slot_keys = self.zeros(*width) if self.recurrence == "gsa" else None
        return LigerState(self.zeros(*width), slot_keys, super().initial_state(batch_size))

    def check_state(self, state: State, batch_size: int) -> None:
        """As any mixer's: the cache has one length."""
        super(Attention, self).check_state(state, batch_size)

    def mix(self, x: Tensor, state: LigerState, reset: Tensor | None) -> tuple[Tensor, LigerState]:  # type: ignore[override]
        """Both halves over the whole sequence, and their average."""
        queries, keys, values = self.project(x)
        outputs, window = self.look(queries, keys, values, state.window, reset)
        gates = self.gate_source(x, keys)
        queries, keys, values, gates = (widened(y) for y in (queries, keys, values, gates))
        read, memory, slot_keys = self._remember(queries, keys, values, gates, state, reset)
        outputs = self.mixed * read.to(outputs.dtype) + (1 - self.mixed) * outputs
        return self.to_output(outputs.flatten(-2)), LigerState(memory, slot_keys, window)

    def gate_source(self, x: Tensor, keys: Tensor) -> Float[Tensor, "batch time kv_heads gates"]:
        """u: the keys, pooled to one number a slot where there are slots."""
        if self.to_gate is not None:
            return self.to_gate(x).unflatten(-1, (self.key_value_heads, -1))
        if self.recurrence == "gsa":
            return keys @ pooling(self.head_dim, self.slots).to(keys)
        return keys

    def _shared(self, x: Tensor) -> Tensor:
        """(batch, time, kv_heads, …) repeated for the heads that share it."""
        return x.repeat_interleave(self.heads // self.key_value_heads, dim=2)

    def _remember(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor,
        state: LigerState,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is read from the memory at every step, and the memory after the last; slots' values, then keys.

        What the heads that share keys have in common is computed before it is repeated for them.
        """
        log_decay = None if self.gate == "none" else F.logsigmoid(gates)
        if self.recurrence == "hgrn2":
            keys = torch.sigmoid(-gates)
        elif log_decay is not None:
            log_decay = log_decay / self.gate_normalizer
        if self.recurrence == "gla" and self.key_features is None:
            keys = keys.softmax(-1)
        keys, values = self._shared(keys), self._shared(values)
        log_decay = None if log_decay is None else self._shared(log_decay)
        if self.recurrence == "gsa":
            assert log_decay is not None and state.slot_keys is not None
            slots = (state.slot_keys, state.memory)
            outputs, (slot_keys, slot_values) = slot_attention(queries, keys, values, log_decay, slots, reset)
            return outputs, slot_values, slot_keys
        if self.query_features is not None and self.key_features is not None:
            queries, keys = hedgehog(queries, self.query_features), hedgehog(keys, self.key_features)
            log_decay = None if log_decay is None else torch.cat([log_decay, log_decay], dim=-1)
        else:
            queries = queries.softmax(-1)
        outputs, memory = linear_attention(queries, keys, values, log_decay, state.memory, reset=reset)
        return outputs, memory, None


def pooling(inputs: int, outputs: int) -> Float[Tensor, "inputs outputs"]:
    """The matrix of adaptive average pooling: output i is the mean of inputs ⌊i n / m⌋ … ⌈(i + 1) n / m⌉ − 1."""
    matrix = torch.zeros(inputs, outputs)
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[start:end, i] = 1 / (end - start)
    return matrix
