"""Prefix linear attention: a prompt is read with all of it in sight, and then the model goes on as a recurrence.

Source: Just read twice (arXiv 2407.05483), section 4 (JRT-RNN) and the authors' code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import widened
from ostinato.ops.checks import check_reset
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import whole_attention
from ostinato.ops.taylor_attention import taylor_attention, taylor_features, taylor_memory, taylor_width


class PrefixState(NamedTuple):
    """S, and the normaliser z as one more value channel."""

    memory: Float[Tensor, "batch heads features value_dim_and_one"]


class PrefixLinearAttention(Mixer):
    """y_i = φ(q_i)ᵀ(Sᵉ + Σ_{j≤i} φ(k_j) v_jᵀ) / (φ(q_i)ᵀ(zᵉ + Σ_{j≤i} φ(k_j)) + ε),   Sᵉ = Σ_{j ≤ M} φ(kᵉ_j) vᵉ_jᵀ.

    M steps are the prefix. q, k, v = W_q x, W_k x, W_v x with q and k of f numbers a head, φ their Taylor features; zᵉ
    is Sᵉ with 1 for v, kᵉ and vᵉ have maps of their own. Every step, those of the prefix too, sees the whole prefix by
    way of Sᵉ and its own past once more; afterwards S = Sᵉ + Σ φ(k) vᵀ is an ordinary state, of the causal size.

    `prefix` is something that the mixer takes besides x: a (batch, time) bool, True on the steps of the prompt. What
    it keeps of the law:

    - without a prefix, all of it: the layer is causal linear attention ("Based");
    - with one, a sequence may be cut, and stepped, anywhere but before a step of the prefix that belongs to the same
      sequence: the prompt is read in one piece. Resets separate sequences exactly, each with its own prefix.

    `keep`, a (batch, time) bool too, is False on padding: nothing is written there.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model. The paper has 16.
        feature_dim: f, the width of queries and keys before φ.
        eps: added to the normaliser.
    """

    traits = Traits(
        engine="taylor_attention",
        transition="identity",
        state="heads × (1 + f + f²) × (head_dim + 1)",
        paper="JRT-RNN (arXiv 2407.05483)",
    )
    takes = ("prefix", "keep")

    def __init__(self, d_model: int, heads: int = 4, feature_dim: int = 16, eps: float = 1e-12) -> None:
        super().__init__(d_model)
        self.heads, self.head_dim, self.eps = heads, split_heads(d_model, heads), eps
        self.features = taylor_width(feature_dim)
        self.to_queries = nn.Linear(d_model, heads * feature_dim, bias=False)
        self.to_keys = nn.Linear(d_model, heads * feature_dim, bias=False)
        self.to_values = nn.Linear(d_model, d_model, bias=False)
        self.to_prefix_keys = nn.Linear(d_model, heads * feature_dim, bias=False)
        self.to_prefix_values = nn.Linear(d_model, d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size: int) -> PrefixState:
        """Zeros."""
        return PrefixState(self.zeros(batch_size, self.heads, self.features, self.head_dim + 1))

    def mix(
        self,
        x: Tensor,
        state: PrefixState,
        reset: Tensor | None,
        prefix: Bool[Tensor, "batch time"] | None = None,
        keep: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Tensor, PrefixState]:
        """The recurrence, over the whole sequence, begun from what the prefix left."""
        for mask in (prefix, keep):
            check_reset(mask, x.shape[0], x.shape[1])
        queries = widened(self._heads(self.to_queries(x)))
        keys, values = self._written(self.to_keys(x), self.to_values(x), keep)
        memory = state.memory
        if prefix is None:
            outputs, memory = taylor_attention(queries, keys, values, memory, reset=reset)
        else:
            seen = prefix if keep is None else prefix & keep
            prompt = self._written(self.to_prefix_keys(x), self.to_prefix_values(x), seen)
            if reset is None:
                outputs, memory = taylor_attention(queries, keys, values, memory + taylor_memory(*prompt))
            else:
                outputs, memory = taylor_attention(queries, keys, values, memory, reset=reset)
                read, written = taylor_features(queries), taylor_features(prompt[0])
                outputs = outputs + whole_attention(read, written, prompt[1], reset=reset)
                memory = memory + linear_attention(read, written, prompt[1], reset=reset)[1]
        outputs = outputs[..., :-1] / (outputs[..., -1:] + self.eps)
        return self.to_output(outputs.flatten(-2).to(x.dtype)), PrefixState(memory)

    def _written(self, keys: Tensor, values: Tensor, written: Tensor | None) -> tuple[Tensor, Tensor]:
        """k, and v with one more channel of ones, 0 where nothing is written.

        The values are masked, not the keys: φ(0) has a 1 in it.
        """
        padded = F.pad(widened(self._heads(values)), (0, 1), value=1.0)
        if written is not None:
            padded = padded.masked_fill(~written[:, :, None, None], 0)
        return widened(self._heads(keys)), padded

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
