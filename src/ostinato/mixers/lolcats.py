"""LoLCATs attention: softmax over a sliding window, learned features for all that went before, normalised together.

Source: LoLCATs (arXiv 2410.10254), section 3; the feature map is Hedgehog's (arXiv 2402.04347). The control of Liger
(arXiv 2503.01496): it has parameters that softmax attention has not, which `ostinato.training.attention_transfer`
learns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.attention import Attention, AttentionCache
from ostinato.mixers.base import State, Traits
from ostinato.mixers.heads import widened
from ostinato.mixers.hedgehog import feature_weights, hedgehog
from ostinato.ops.attention import AttentionState, attention
from ostinato.ops.checks import accumulation_dtype, own_precision
from ostinato.ops.linear_attention import linear_attention


class LolcatsState(NamedTuple):
    """What the features remember of all steps that the window has lost, and the window's cache."""

    memory: Float[Tensor, "batch heads features value_dim"]
    normalizer: Float[Tensor, "batch heads features"]
    window: AttentionCache


class LoLCATs(Attention):
    """y = W_o o, and o_t, per head, is the mean of values v_j under the weights, divided by their sum,

    - γ exp(q_t · k_j / √D − c_t) in the window, t − w < j ≤ t, with c_t the largest score there;
    - φ_q(q_t) · φ_k(k_j) before it, j ≤ t − w, φ(x) = softmax([W x, −W x]).

    q and k are rotated to their positions in both. φ_q and φ_k have a matrix W per head of queries, the identity at
    first; γ = σ(g) is learned per head, g = 0 at first. Keys and values are repeated for the heads that share them.
    Scores, exponentials, features, sums and the memory are in float32 at least; where the projections are in bfloat16
    (autocast's too), the features are rounded to it for their products, as the values are.

    Args:
        d_model, heads, key_value_heads, rope, base, qk_norm: as `Attention`'s.
        window: w, how many steps softmax sees; 64 in the paper.
    """

    traits = Traits(
        engine="linear_attention",
        transition="identity",
        state="heads × 2 head_dim × (head_dim + 1) + window × key_value_heads × head_dim × 2",
        linear=False,  # the memory is; the window is softmax attention
        paper="LoLCATs (arXiv 2410.10254)",
    )
    no_weight_decay = frozenset({"query_features", "key_features", "window_factor"})

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        key_value_heads: int | None = None,
        window: int = 16,
        rope: bool = True,
        base: float = 10000.0,
        qk_norm: bool = False,
    ) -> None:
        if window is None:
            raise ConfigurationError("the window of LoLCATs is a number of steps; None is softmax attention")
        super().__init__(d_model, heads, key_value_heads, window, rope, base, qk_norm)
        self.query_features = feature_weights(heads, self.head_dim)
        self.key_features = feature_weights(heads, self.head_dim)
        self.window_factor = nn.Parameter(torch.zeros(heads))

    def initial_state(self, batch_size: int) -> LolcatsState:  # type: ignore[override]
        """Zeros, and an empty cache."""
        shape = (batch_size, self.heads, 2 * self.head_dim)
        return LolcatsState(self.zeros(*shape, self.head_dim), self.zeros(*shape), super().initial_state(batch_size))

    def check_state(self, state: State, batch_size: int) -> None:
        """As any mixer's: the cache has one length."""
        super(Attention, self).check_state(state, batch_size)

    def mix(self, x: Tensor, state: LolcatsState, reset: Tensor | None) -> tuple[Tensor, LolcatsState]:  # type: ignore[override]
        """Both parts over the whole sequence, and their common mean."""
        queries, keys, values = self.project(x)
        with own_precision(x):
            outputs, state = self._read(queries, keys, values, state, reset)
        return self.to_output(outputs.to(x.dtype).flatten(-2)), state

    def _read(
        self, queries: Tensor, keys: Tensor, values: Tensor, state: LolcatsState, reset: Tensor | None
    ) -> tuple[Float[Tensor, "batch time heads head_dim"], LolcatsState]:
        """o at every step, and the state after the last."""
        queries, keys, following = self.place(queries, keys, state.window.position, reset)
        # float16 has no room for sums over thousands of steps.
        product = torch.bfloat16 if queries.dtype == torch.bfloat16 else accumulation_dtype(queries.dtype)
        # An entry of ones beside the values gathers the weights' sum.
        queries, keys, values = widened(queries), widened(keys), with_ones(widened(values))
        held = AttentionState(widened(state.window.keys), with_ones(widened(state.window.values)), state.window.valid)
        near, cache = attention(queries, keys, values, held, window=self.window, weight=exponentials, reset=reset)
        lost_keys, lost_values, again = self._lost(keys, values, held, reset)
        far, memory = linear_attention(
            # One step more: what the window loses at the last step is remembered before the next.
            F.pad(hedgehog(queries, self.query_features).to(product), (0, 0, 0, 0, 0, 1)),
            hedgehog(self._shared(lost_keys), self.key_features).to(product),
            self._shared(lost_values.to(product)),
            None,
            torch.cat([state.memory, state.normalizer.unsqueeze(-1)], dim=-1),
            reset=again,
        )
        factor = torch.sigmoid(widened(self.window_factor))[:, None]
        sums = factor * near + far[:, :-1]
        dtype = state.window.keys.dtype
        window = AttentionCache(cache.keys.to(dtype), cache.values[..., :-1].to(dtype), cache.valid, following)
        return sums[..., :-1] / sums[..., -1:], LolcatsState(memory[..., :-1], memory[..., -1], window)

    def _shared(self, x: Tensor) -> Tensor:
        """(batch, time, kv_heads, …) repeated for the heads that share it."""
        return x.repeat_interleave(self.heads // self.key_value_heads, dim=2)

    def _lost(
        self, keys: Tensor, values: Tensor, held: AttentionState, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Bool[Tensor, "batch longer"] | None]:
        """Keys and values that the window had at step t − 1 and has not at t, for t up to the one after the last.

        A value (and its one) is zero where there is nothing, or what there is belongs to an earlier sequence than t.
        The resets of so many steps are the third.
        """
        time = keys.shape[1]
        before = torch.cat([held.keys, keys], dim=1)[:, :time]
        written = torch.cat([held.values, values], dim=1)[:, :time]
        started = keys.new_zeros(keys.shape[:2], dtype=torch.long) if reset is None else reset.cumsum(1)
        owner = torch.cat([torch.where(held.valid, 0, -1), started], dim=1)[:, :time]
        reader = torch.cat([started[:, 1:], started[:, -1:]], dim=1)
        written = written.masked_fill((owner != reader)[:, :, None, None], 0)
        later = [0, 0, 0, 0, 1, 0]
        again = None if reset is None else F.pad(reset, (0, 1))
        return F.pad(before, later), F.pad(written, later), again


def with_ones(x: Float[Tensor, "*axes dim"]) -> Float[Tensor, "*axes longer"]:
    """x with an entry of one behind its last."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def exponentials(scores: Float[Tensor, "*axes keys"], visible: Bool[Tensor, "*#axes keys"]) -> Tensor:
    """exp(score − the largest visible one) at the visible keys: softmax before it is divided by its sum.

    As a `Weight` of `ostinato.ops.attention`, which does not look at what it gives to other keys.
    """
    masked = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    # Whatever is taken off cancels in a softmax, but not here, beside other weights: its derivative counts.
    return torch.exp(masked - masked.amax(-1, keepdim=True))
