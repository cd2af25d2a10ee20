"""DeltaProduct is the gated delta rule on a sequence n times as long.

The n writes of a token become n tokens: its query stands at the last of them (zeros at the others), its log-decay at
the first, and every n-th output is kept.

Source: Siems et al. 2025 (arXiv 2502.10297), section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.ops.delta_rule import delta_rule


def interleaved_delta_rule(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch steps heads key_dim"],
    values: Float[Tensor, "batch steps heads value_dim"],
    beta: Float[Tensor, "batch steps heads"] | None = None,
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """What `delta_rule` gives for n = steps / time writes a token, by calls with one write; raises what it raises."""
    writes = keys.shape[1] // queries.shape[1]
    last = torch.zeros_like(keys)
    last[:, writes - 1 :: writes] = queries
    decay = None
    if log_decay is not None:
        decay = log_decay.new_zeros(keys.shape[:3])
        decay[:, ::writes] = log_decay
    outputs, state = delta_rule(last, keys, values, beta, decay, state)
    return outputs[:, writes - 1 :: writes], state
