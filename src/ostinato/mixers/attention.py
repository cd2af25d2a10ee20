"""Softmax attention as a mixer: full, sliding, grouped; with rotary positions or none. The yardstick.

Source: Attention Is All You Need (arXiv 1706.03762); grouped queries: arXiv 2305.13245; rotary positions:
arXiv 2104.09864; norms on queries and keys: arXiv 2302.05442.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import ConfigurationError, StateError
from ostinato.layers.rotary import check_rotary_dim, positions, rotate
from ostinato.mixers.base import Mixer, State, Traits, split_heads
from ostinato.ops.attention import AttentionState, attention, empty_cache


class AttentionCache(NamedTuple):
    """The engine's cache, and how many steps of its sequence each row has seen."""

    keys: Float[Tensor, "batch cached kv_heads head_dim"]
    values: Float[Tensor, "batch cached kv_heads head_dim"]
    valid: Bool[Tensor, "batch cached"]
    position: Int[Tensor, " batch"]


class Attention(Mixer):
    """y_t = W_o Σ_j softmax_j(q_t · k_j / √d) v_j over the steps j ≤ t, or the last `window` of them.

    Args:
        d_model: width.
        heads: of queries.
        key_value_heads: of keys and values, each shared by heads / key_value_heads heads; None is `heads`.
        window: how many steps are seen, one's own among them; None is all, with a state that grows.
        rope: rotate queries and keys to their positions, which count from the start of each sequence.
        base: of the rotary frequencies.
        qk_norm: RMSNorm on queries and keys, head by head, before the rotation.
    """

    traits = Traits(
        engine="attention",
        transition="identity",
        input_gate="none",
        state="cached steps × key_value_heads × head_dim × 2",
        linear=False,
        paper="Attention Is All You Need (arXiv 1706.03762)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        key_value_heads: int | None = None,
        window: int | None = None,
        rope: bool = True,
        base: float = 10000.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(d_model)
        self.heads = heads
        self.head_dim = split_heads(d_model, heads)
        self.key_value_heads = heads if key_value_heads is None else key_value_heads
        split_heads(heads, self.key_value_heads, "heads")
        if window is not None and window < 1:
            raise ConfigurationError(f"a window holds at least the step itself, got {window}; None sees everything")
        if rope:
            check_rotary_dim(self.head_dim)
        self.window, self.rope, self.base = window, rope, base
        shared = self.key_value_heads * self.head_dim
        self.to_query = nn.Linear(d_model, d_model, bias=False)
        self.to_key = nn.Linear(d_model, shared, bias=False)
        self.to_value = nn.Linear(d_model, shared, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def initial_state(self, batch_size: int) -> AttentionCache:
        """An empty cache: no entries, or window − 1 that are not valid; position 0."""
        weight = self.to_key.weight
        width = (self.key_value_heads, self.head_dim, self.head_dim)
        cache = empty_cache(batch_size, *width, self.window, dtype=weight.dtype, device=weight.device)
        return AttentionCache(*cache, self.zeros(batch_size, dtype=torch.long))

    def mix(self, x: Tensor, state: AttentionCache, reset: Tensor | None) -> tuple[Tensor, AttentionCache]:
        """Projections, positions, attention."""
        outputs, state = self.look(*self.project(x), state, reset)
        return self.to_output(outputs.flatten(-2)), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, (batch, time, heads, head_dim), not normed and not rotated."""
        return (
            self.to_query(x).unflatten(-1, (self.heads, self.head_dim)),
            self.to_key(x).unflatten(-1, (self.key_value_heads, self.head_dim)),
            self.to_value(x).unflatten(-1, (self.key_value_heads, self.head_dim)),
        )

    def look(
        self, queries: Tensor, keys: Tensor, values: Tensor, state: AttentionCache, reset: Tensor | None
    ) -> tuple[Tensor, AttentionCache]:
        """Norms, positions, attention: what every head reads from the cache, (batch, time, heads, head_dim)."""
        queries, keys, following = self.place(queries, keys, state.position, reset)
        cache = AttentionState(state.keys, state.values, state.valid)
        outputs, cache = attention(queries, keys, values, cache, window=self.window, reset=reset)
        return outputs, AttentionCache(*cache, following)

    def place(
        self, queries: Tensor, keys: Tensor, position: Int[Tensor, " batch"], reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Int[Tensor, " batch"]]:
        """Queries and keys, normed and turned to their positions from `position` on; the position that comes next."""
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        here, following = positions(position, queries.shape[1], reset)
        if self.rope:
            turned = rotate(torch.cat([queries, keys], dim=2), here, self.base)
            queries, keys = turned.split([self.heads, self.key_value_heads], dim=2)
        return queries, keys, following

    def check_state(self, state: State, batch_size: int) -> None:
        """As any mixer's, but the cache may have any length where there is no window."""
        if self.window is not None or not isinstance(state, AttentionCache):
            return super().check_state(state, batch_size)
        template = self.initial_state(batch_size)
        cached = state.valid.shape[1] if state.valid.ndim == 2 else 0
        wanted = [
            (path, tuple(leaf.shape) if path == "position" else (batch_size, cached, *leaf.shape[2:]))
            for path, leaf in ostinato.state.leaves(template)
        ]
        found = [(path, tuple(leaf.shape)) for path, leaf in ostinato.state.leaves(state)]
        if found != wanted:
            raise StateError(
                f"this is not a state of this Attention for batch size {batch_size}: it holds {found}, wanted {wanted}"
            )
        return None
