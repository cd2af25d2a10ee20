"""Retention: linear attention whose heads forget at fixed rates, with rotary positions.

Source: RetNet (arXiv 2307.08621), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ostinato.layers.rotary import check_rotary_dim, positions, rotate
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import KeyValueMixer, cleared, padding


class RetNetState(NamedTuple):
    """The memory of every head, and how many steps of the present sequence went before."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    position: Int[Tensor, " batch"]


class RetNet(KeyValueMixer):
    """S_t = γ_h S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t with γ_h = 1 − 2^{−5−h}, h = 0 … heads − 1.

    q = R_t W_q x K^{−1/2} and k = R_t W_k x are turned by their positions (rotary embedding), which start
    at 0 at every reset; y = W_o [RMSNorm(o) ⊙ silu(W_g x)]. The decays are fixed, not learned.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model and leave an even key width. The paper has 8.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        base: of the rotary frequencies.
    """

    traits = Traits(
        engine="linear_attention",
        transition="fixed scalar",
        state="heads × key_dim × value_dim, position",
        paper="RetNet (arXiv 2307.08621)",
    )

    def __init__(
        self, d_model: int, heads: int = 4, expand_k: float = 1.0, expand_v: float = 2.0, base: float = 10000.0
    ) -> None:
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=None, gate="silu")
        check_rotary_dim(self.key_dim)
        self.base = base

    def log_decay(self) -> Float[Tensor, " heads"]:
        """log γ_h. Not a buffer, which a cast of the model to half precision would round."""
        head = torch.arange(self.heads, device=self.to_output.weight.device, dtype=self.state_dtype)
        return torch.log1p(-torch.exp2(-5 - head))

    def initial_state(self, batch_size: int) -> RetNetState:  # type: ignore[override]
        """Zeros, at position 0."""
        memory = self.zeros(batch_size, self.heads, self.key_dim, self.value_dim)
        return RetNetState(memory, self.zeros(batch_size, dtype=torch.int64))

    def remember(
        self, x: Tensor, state: RetNetState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, RetNetState]:
        """What is read from the memory at every step."""
        queries, keys, values, _ = self.project(x, None, reset)
        place, following = positions(state.position, x.shape[1], reset)
        if lengths is not None:
            following = torch.cat([state.position.unsqueeze(1), place + 1], dim=1).gather(1, lengths.unsqueeze(1))[:, 0]
        padded = padding(lengths, x.shape[1])
        queries = rotate(queries, place, self.base) * self.key_dim**-0.5
        keys = cleared(rotate(keys, place, self.base), padded)
        log_decay = cleared(self.log_decay().expand(*x.shape[:2], -1), padded)
        outputs, memory = self.scan(queries, keys, values, log_decay, state.memory, reset=reset)
        return outputs, RetNetState(memory, following)
