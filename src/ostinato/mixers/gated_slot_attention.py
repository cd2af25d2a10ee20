"""Gated slot attention: a few slots of keys and values that are overwritten by gates and read by softmax.

Source: Gated Slot Attention (arXiv 2409.07146), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import KeyValueMixer, cleared, padding, widened
from ostinato.ops.diagonal_scan import diagonal_scan


class SlotState(NamedTuple):
    """What the slots of every head hold, and the inputs that the short convolution will need (None without one)."""

    keys: Float[Tensor, "batch heads slots key_dim"]
    values: Float[Tensor, "batch heads slots value_dim"]
    window: Float[Tensor, "batch taps channels"] | None


def slot_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_decay: Float[Tensor, "batch time heads slots"],
    memory: tuple[Float[Tensor, "batch heads slots key_dim"], Float[Tensor, "batch heads slots value_dim"]],
    reset: Bool[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], tuple[Tensor, Tensor]]:
    """K_t = diag(α_t) K_{t−1} + (1 − α_t) k_tᵀ, V_t likewise with v_t, o_t = V_tᵀ softmax(K_t q_t); o and (K, V).

    Computed in the type of the decays, float32 for half precision; the outputs have the type of the values.
    """
    decay, write = log_decay.exp().unsqueeze(-1), -torch.expm1(log_decay).unsqueeze(-1)
    slot_keys, last_keys = diagonal_scan(decay, write * widened(keys).unsqueeze(3), memory[0], reset=reset)
    slot_values, last_values = diagonal_scan(decay, write * widened(values).unsqueeze(3), memory[1], reset=reset)
    attended = (slot_keys @ widened(queries).unsqueeze(-1)).squeeze(-1).softmax(-1)
    outputs = (attended.unsqueeze(-2) @ slot_values).squeeze(-2)
    return outputs.to(values.dtype), (last_keys, last_values)


class GatedSlotAttention(KeyValueMixer):
    """K_t = diag(α_t) K_{t−1} + (1 − α_t) k_tᵀ, V_t likewise with v_t, o_t = V_tᵀ softmax(K_t q_t).

    log α = logsigmoid(W_a x) / τ, per slot; q = silu(W_q x) K^{−1/2}, k = silu(W_k x), v = silu(W_v x);
    y = W_o RMSNorm(silu(o)). Two linear recurrences with a softmax over the slots in between: linear in the slots'
    values, not in their keys.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        slots: m, per head; the paper has 64.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        temperature: τ.
        conv: taps of a short convolution over q, k and v; None (the paper) for none.
    """

    traits = Traits(
        engine="diagonal_scan",
        transition="data vector",
        input_gate="tied",
        state="heads × slots × (key_dim + value_dim)",
        paper="Gated Slot Attention (arXiv 2409.07146)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        slots: int = 64,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        temperature: float = 8.0,
        conv: int | None = None,
    ) -> None:
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=conv, gate=None)
        if slots < 1:
            raise ConfigurationError(f"there must be at least one slot, got {slots}")
        self.slots, self.temperature = slots, temperature
        self.to_decay = nn.Linear(d_model, heads * slots, bias=False)

    def initial_state(self, batch_size: int) -> SlotState:  # type: ignore[override]
        """Zeros."""
        shape = (batch_size, self.heads, self.slots)
        keys, values = self.zeros(*shape, self.key_dim), self.zeros(*shape, self.value_dim)
        return SlotState(keys, values, self.project.initial_state(batch_size))

    def remember(
        self, x: Tensor, state: SlotState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, SlotState]:
        """What is read from the slots at every step."""
        queries, keys, values, window = self.project(x, state.window, reset, lengths)
        queries, keys, values = F.silu(queries) * self.key_dim**-0.5, F.silu(keys), F.silu(values)
        log_decay = F.logsigmoid(widened(self.to_decay(x))).unflatten(-1, (self.heads, -1)) / self.temperature
        log_decay = cleared(log_decay, padding(lengths, x.shape[1]))
        # In padding the decay is 1, and what is written 1 − 1.
        memory = (state.keys, state.values)
        outputs, (last_keys, last_values) = slot_attention(queries, keys, values, log_decay, memory, reset)
        return outputs, SlotState(last_keys, last_values, window)

    def read_out(self, outputs: Tensor, x: Tensor) -> Tensor:
        """W_o RMSNorm(silu(o))."""
        return self.to_output(self.norm(F.silu(outputs)).flatten(-2))
