"""Causal attention cut into blocks of queries, each with the keys that it can see: memory is linear in time.

How scores become outputs inside a block is the caller's (see `ostinato.ops.attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_BLOCKS_AT_ONCE = 64

AttendBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""attend_block(queries, keys, values, visible, distance) -> outputs, heads on axis 1: see `attend`."""


def attend_by_blocks(
    attend_block: AttendBlock,
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch seen kv_heads key_dim"],
    values: Float[Tensor, "batch seen kv_heads value_dim"],
    sequence: Int[Tensor, "batch seen"],
    window: int | None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """The outputs of `attend_block`, block of queries by block of queries, put together.

    Args:
        attend_block: is given the queries of one block and the keys and values that any of them sees, in the type
            of `queries`, which of them each query sees (batch, 1, queries, keys), and the distances (queries, keys).
        queries: of the last `time` entries.
        keys, values: of all entries, the seen − time before the first query too; with a window these are window − 1,
            as in the cache.
        sequence: a number for every entry; a query sees what has its own.
        window: see the last `window` entries only, one's own among them; None sees all.
    """
    time = queries.shape[1]
    cached = keys.shape[1] - time
    size = min(_block_size(window), time)
    rows = queries.transpose(1, 2)
    columns = keys.transpose(1, 2).to(queries.dtype), values.transpose(1, 2).to(queries.dtype)

    def block(q: Tensor, k: Tensor, v: Tensor, asking: Tensor, asked: Tensor, ahead: int) -> Tensor:
        # `ahead`: how many keys stand before the one that belongs to the first query.
        steps = torch.arange(ahead, ahead + q.shape[2], device=q.device)
        distance = steps.unsqueeze(1) - torch.arange(k.shape[2], device=q.device)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        visible = visible & (asking.unsqueeze(-1) == asked.unsqueeze(-2))
        return attend_block(q, k, v, visible.unsqueeze(1), distance)

    outputs = []
    if window is None:
        # The weights of all blocks together are quadratic in time: they are computed again in the backward pass
        # instead of being kept.
        if time > size and _may_recompute():

            def run(*arguments: Any) -> Tensor:
                return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            run = block
        for start in range(0, time, size):
            stop = min(start + size, time)
            seen, own = slice(0, cached + stop), slice(cached + start, cached + stop)
            q, k, v = rows[:, :, start:stop], columns[0][:, :, seen], columns[1][:, :, seen]
            outputs.append(run(q, k, v, sequence[:, own], sequence[:, seen], cached + start))
    else:
        # Blocks see equally many keys, so that many of them are one batch. Not all: each brings window − 1 keys again.
        for start in range(0, time, size * _BLOCKS_AT_ONCE):
            stop = min(start + size * _BLOCKS_AT_ONCE, time)
            seen, own = slice(start, cached + stop), slice(cached + start, cached + stop)
            q, k, v = rows[:, :, start:stop], columns[0][:, :, seen], columns[1][:, :, seen]
            outputs.append(_as_batch(block, q, k, v, sequence[:, own], sequence[:, seen], size))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _as_batch(
    block: Callable[..., Tensor],
    queries: Float[Tensor, "batch heads time key_dim"],
    keys: Float[Tensor, "batch kv_heads seen key_dim"],
    values: Float[Tensor, "batch kv_heads seen value_dim"],
    asking: Int[Tensor, "batch time"],
    asked: Int[Tensor, "batch seen"],
    size: int,
) -> Float[Tensor, "batch heads time value_dim"]:
    """Blocks of `size` queries, each with the seen − time keys before it and its own, as the rows of one batch."""
    batch, _, time, _ = queries.shape
    before = keys.shape[2] - time
    lacking = -time % size
    if lacking:
        queries, keys, values = (F.pad(x, (0, 0, 0, lacking)) for x in (queries, keys, values))
        # A sequence of its own: a query that sees nothing at all would be NaN in torch's kernel.
        beyond = torch.iinfo(asking.dtype).max
        asking, asked = F.pad(asking, (0, lacking), value=beyond), F.pad(asked, (0, lacking), value=beyond)
    q = queries.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    k, v = (_overlapping(x.transpose(1, 2), size, before).flatten(0, 1).transpose(1, 2) for x in (keys, values))
    numbers = asking.unflatten(1, (-1, size)).flatten(0, 1), _overlapping(asked, size, before).flatten(0, 1)
    outputs = block(q, k, v, *numbers, before)
    return outputs.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :time]


def _overlapping(x: Shaped[Tensor, "batch seen *axes"], size: int, before: int) -> Shaped[Tensor, "batch n long *axes"]:
    """Axis 1 cut into n blocks of `size` entries, each with the `before` entries that stand before it.

    As Tensor.unfold, whose derivative has no rule under torch.func.
    """
    blocks_before = -(-before // size)
    front = blocks_before * size - before
    padded = torch.cat([x.new_zeros(x.shape[0], front, *x.shape[2:]), x], dim=1).unflatten(1, (-1, size))
    count = padded.shape[1] - blocks_before
    pieces = [padded[:, start : start + count] for start in range(blocks_before + 1)]
    pieces[0] = pieces[0][:, :, front:]
    return torch.cat(pieces, dim=2)


def _block_size(window: int | None) -> int:
    # About as long as the window, so that half of the scores that are computed are used.
    return 256 if window is None else max(64, min(256, window))


def _may_recompute() -> bool:
    # Where autograd is not plain (torch.func, torch.compile) recomputation is theirs to arrange.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not under_torch_func()


def under_torch_func() -> bool:
    """Whether a transform of torch.func is at work, for which not every operation has a rule."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
