"""`tiled_attention`: the mLSTM in chunks that are cut into tiles, so that a chunk may be as long as one likes.

Between chunks the memory goes on as in `exponential_attention` (or `linear_attention`, with the sigmoid gate). Inside
a chunk, a tile of queries meets the tiles of keys up to its diagonal one by one, and what was added so far is scaled
by exp(m_old − m_new) whenever the maximum grows: no matrix larger than a tile, and no state but at the ends of chunks.
The plain text of what kernels do; the engines are faster.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.checks import check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.exponential_attention import ExponentialState
from ostinato.ops.linear_attention import check_matrix_arguments


def tiled_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    state: ExponentialState | None = None,
    *,
    normalized: bool = True,
    chunk_size: int = 128,
    query_tile: int = 64,
    key_tile: int = 64,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "batch time heads value_dim"], ExponentialState]:
    """The outputs of the mLSTM by chunks and tiles.

    With log D_ts = f_{s+1} + … + f_t + i_s, s ≤ t, and m_t the largest of its row (the state's included):

        normalized: h = (q kᵀ ⊙ exp(log D − m)) v / (max(|Σ_s of the same scores|, exp(−m)) + ε)   (mLSTMexp)
        otherwise:  h = (q kᵀ ⊙ exp(log D)) v, with i ≤ 0 the logarithm of the sigmoid gate         (mLSTMsig)

    Args:
        queries, keys, values: q (scaled by the caller), k and v.
        log_input, log_forget: i and f ≤ 0.
        state: where to go on from; zeros (the maximum too) if None. Without `normalized` only the memory counts.
        normalized: whether there are a running maximum and a normaliser.
        chunk_size: tokens between two stored states.
        query_tile, key_tile: the tiles inside a chunk.
        eps: ε.

    Returns:
        h in the type of `queries`, and the last state; half precision is computed in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk or tile below 1.

    Source: Tiled Flash Linear Attention (arXiv 2503.14376), section 3.
    """
    check_matrix_arguments(queries, keys, values, None, None if state is None else state.memory, None)
    for name, gate in (("log_input", log_input), ("log_forget", log_forget)):
        check_sequence(name, gate, "batch time heads")
        check_shape(name, gate, tuple(queries.shape[:3]), "batch time heads")
    if min(chunk_size, query_tile, key_tile) < 1:
        raise ConfigurationError(
            f"chunks and tiles hold at least one token, got {chunk_size}, {query_tile} and {key_tile}"
        )
    outputs, last = _tiled(
        queries, keys, values, log_input, log_forget, state, normalized, chunk_size, query_tile, key_tile, eps
    )
    return outputs.to(queries.dtype), last


@in_accumulation_dtype
def _tiled(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    state: ExponentialState | None,
    normalized: bool,
    chunk_size: int,
    query_tile: int,
    key_tile: int,
    eps: float,
) -> tuple[Tensor, ExponentialState]:
    q, k, v, i, f = (part.transpose(1, 2) for part in (queries, keys, values, log_input, log_forget))
    if state is None:
        memory = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        state = ExponentialState(memory, memory[..., 0], memory[..., 0, 0])
    outputs = []
    for start in range(0, q.shape[2], chunk_size):
        here = slice(start, start + chunk_size)
        query, key, value, gate, forget = (part[:, :, here] for part in (q, k, v, i, f))
        outputs.append(_inside(query, key, value, gate, forget, state, normalized, (query_tile, key_tile), eps))
        state = _carried(key, value, gate, forget, state, normalized)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _carried(k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: ExponentialState, normalized: bool) -> ExponentialState:
    """The state after a chunk."""
    # Summed from behind, never as a difference of long sums.
    left = f.flip(-1).cumsum(-1).flip(-1) - f + i
    whole = f.sum(-1)
    maximum = state.maximum
    if normalized:
        maximum = torch.maximum(whole + state.maximum, left.amax(-1))
        whole, left = whole + state.maximum - maximum, left - maximum.unsqueeze(-1)
    written = k * left.exp().unsqueeze(-1)
    kept = whole.exp().unsqueeze(-1)
    memory = state.memory * kept.unsqueeze(-1) + written.mT @ v
    return ExponentialState(memory, state.normalizer * kept + written.sum(-2), maximum)


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: ExponentialState,
    normalized: bool,
    tiles: tuple[int, int],
    eps: float,
) -> Tensor:
    """The outputs of a chunk, tile by tile."""
    total = f.cumsum(-1)
    place = torch.arange(q.shape[2], device=q.device)
    outputs = []
    for rows in place.split(tiles[0]):
        query = q[:, :, rows]
        entering = total[..., rows]
        # What the state gives comes first: with a maximum its own factor exp(b + m − m) is 1.
        maximum = entering + state.maximum.unsqueeze(-1) if normalized else torch.zeros_like(entering)
        factor = torch.ones_like(entering) if normalized else entering.exp()
        numerator = factor.unsqueeze(-1) * (query @ state.memory)
        denominator = factor * (query @ state.normalizer.unsqueeze(-1)).squeeze(-1)
        for columns in place[: int(rows[-1]) + 1].split(tiles[1]):
            gates = total[..., rows].unsqueeze(-1) - total[..., columns].unsqueeze(-2) + i[..., columns].unsqueeze(-2)
            gates = gates.masked_fill(rows.unsqueeze(-1) < columns, -torch.inf)
            if normalized:
                larger = torch.maximum(maximum, gates.amax(-1))
                shrunk = (maximum - larger).exp()
                numerator, denominator = numerator * shrunk.unsqueeze(-1), denominator * shrunk
                maximum = larger
            scores = (query @ k[:, :, columns].mT) * (gates - maximum.unsqueeze(-1)).exp()
            numerator = numerator + scores @ v[:, :, columns]
            denominator = denominator + scores.sum(-1)
        outputs.append(_divided(numerator, denominator, maximum, eps) if normalized else numerator)
    return torch.cat(outputs, dim=2)


def _divided(numerator: Tensor, denominator: Tensor, maximum: Tensor, eps: float) -> Tensor:
    """num / (max(|den|, exp(−m)) + ε), all terms times exp(min(m, 0)), without which exp(−m) overflows."""
    scale = maximum.detach().clamp(max=0)
    bound = torch.maximum(denominator.abs() * scale.exp(), (scale - maximum).exp()) + eps * scale.exp()
    return numerator * (scale.exp() / bound).unsqueeze(-1)
