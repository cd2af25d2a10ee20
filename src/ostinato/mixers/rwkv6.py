"""RWKV-6 ("Finch"): a decay per channel that depends on the data, and a read before the write.

Source: RWKV-5 and 6 (arXiv 2404.05892), section 4, as the comparison of GLA (arXiv 2312.06635) has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import HeadNorm, widened
from ostinato.mixers.parts import TokenShift
from ostinato.mixers.rwkv7 import RWKV7State as RWKV6State
from ostinato.ops.linear_attention import linear_attention


class RWKV6(Mixer):
    """o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ r_t, S_t = diag(w_t) S_{t−1} + k_t v_tᵀ; y = W_o [GroupNorm(o) ⊙ silu(g)].

    With δ_t = x_{t−1} − x_t, each of r, w, k, v, g sees a mix of its own, which depends on the data:

        x_* = x + δ ⊙ (μ_* + tanh((x + δ ⊙ μ) A)_* B_*),   w = exp(−exp(ω + tanh(x_w A_w) B_w))

    and r, k, v, g are linear maps of theirs. The paper fixes no initial values that a layer alone would need; here
    all μ and u start at 1/2, B at 0, ω rises from −6 to −1 over the channels.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        mix_rank: the rank of each of the five mixes.
        decay_rank: the rank of the decay's map.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        state="heads × key_dim × value_dim, d_model",
        paper="RWKV-6 (arXiv 2404.05892)",
    )
    no_weight_decay = frozenset({"shift_mix", "common_mix", "decay_bias", "bonus"})

    def __init__(self, d_model: int, heads: int = 4, mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__(d_model)
        self.heads, self.head_dim = heads, split_heads(d_model, heads)
        self.shift = TokenShift(d_model)
        self.common_mix = nn.Parameter(torch.full((d_model,), 0.5))
        self.shift_mix = nn.Parameter(torch.full((5, d_model), 0.5))  # of r, w, k, v, g
        self.mix_down = nn.Linear(d_model, 5 * mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.zeros(5, mix_rank, d_model))
        self.to_receptance, self.to_keys, self.to_values, self.to_gate, self.to_output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        self.decay_down = nn.Linear(d_model, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, d_model, bias=False)
        nn.init.zeros_(self.decay_up.weight)
        self.decay_bias = nn.Parameter(torch.linspace(-6, -1, d_model))
        self.bonus = nn.Parameter(torch.full((heads, self.head_dim), 0.5))
        self.norm = HeadNorm(heads, self.head_dim, eps=self.head_dim * 1e-5, bias=True)

    def initial_state(self, batch_size: int) -> RWKV6State:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.head_dim, self.head_dim)
        return RWKV6State(memory, self.zeros(batch_size, self.d_model, dtype=self.to_keys.weight.dtype))

    def mix(self, x: Tensor, state: RWKV6State, reset: Tensor | None) -> tuple[Tensor, RWKV6State]:
        """The recurrence, over the whole sequence."""
        before, previous = self.shift(x, state.previous, reset)
        delta = before - x
        low = torch.tanh(self.mix_down(x + delta * self.common_mix)).unflatten(-1, (5, -1))
        amounts = (self.shift_mix[i] + low[..., i, :] @ self.mix_up[i].to(low.dtype) for i in range(5))
        for_r, for_w, for_k, for_v, for_g = (x + delta * amount for amount in amounts)
        raw = widened(self.decay_up(torch.tanh(self.decay_down(for_w)))) + self.decay_bias
        log_decay = self._split(-raw.exp())
        receptance, keys, values = (
            self._split(part) for part in (self.to_receptance(for_r), self.to_keys(for_k), self.to_values(for_v))
        )
        # The engine reads what it has written. Given each write a step late, it reads S_{t−1}; the last is made here.
        late_keys, late_values, late_decay = (
            F.pad(part, (0, 0, 0, 0, 1, 0))[:, :-1] for part in (keys, values, log_decay)
        )
        if reset is not None:
            late_keys = late_keys.masked_fill(reset[..., None, None], 0)
        outputs, memory = linear_attention(receptance, late_keys, late_values, late_decay, state.memory, reset=reset)
        key, value = keys[:, -1].to(memory.dtype), values[:, -1].to(memory.dtype)
        memory = log_decay[:, -1].exp().unsqueeze(-1) * memory + key.unsqueeze(-1) * value.unsqueeze(-2)
        outputs = outputs + (receptance * keys * self.bonus).sum(-1, keepdim=True) * values
        y = self.to_output(self.norm(outputs) * F.silu(self.to_gate(for_g)))
        return y, RWKV6State(memory, previous)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
