"""Launches of `linear_attention` with one decay per head, or none: what walks where, in how many segments.

The kernels, and the mathematics, are in `linear_attention_walk`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton import chunk_parts
from ostinato.ops.kernels.triton import linear_attention_walk as kernels
from ostinato.ops.kernels.triton.launch import card, dot_precision, fitting, power_of_two
from ostinato.ops.kernels.triton.tuned import tuned

SHORTEST_SEGMENT = 8
"""Chunks: a segment has at least as many, so that the passes over its edges cost little beside it."""


class Plan(NamedTuple):
    """Block sizes and launch options of a walk."""

    rows: int
    """Steps in a chunk."""
    block: int
    """Value channels of a program."""
    warps: int
    stages: int

    def smaller(self) -> list[Plan]:
        """This, and what to take where it does not fit."""
        return [self, self._replace(stages=1), self._replace(stages=1, block=16)]


COPY_ENGINE = False
"""Whether tiles of half precision are moved by the card's copy engine (by descriptors of tensors), where it can."""


def plan(dtype: torch.dtype, key_dim: int, value_dim: int) -> Plan:
    """For a walk whose state is key_dim × value_dim."""
    value_block = max(16, power_of_two(value_dim))
    if dtype == torch.float32:
        return Plan(rows=32, block=min(32, value_block), warps=4, stages=1)
    large = power_of_two(key_dim) > 128
    return Plan(64, min(64, value_block), warps=8 if large else 4, stages=1 if large else 2)


def segments(tensor: Tensor, rows: int, programs: int, warps: int) -> int:
    """Chunks to a segment: all of them where heads nearly fill the card with eight warps a processor, else as few as
    do."""
    chunks = triton.cdiv(tensor.shape[1], rows)
    room = card(tensor.device).processors * 8
    if 4 * programs * warps > 3 * room:
        return chunks
    wanted = triton.cdiv(room, programs * warps)
    return min(chunks, max(SHORTEST_SEGMENT, triton.cdiv(chunks, wanted)))


def enter(added: Tensor, kept: Tensor, initial: Tensor | None, last: Tensor, reverse: bool) -> Tensor:
    """The state that enters each segment, like `added` (batch · heads, segments, key_dim, value_dim); fills `last`."""
    rows, count, key_dim, value_dim = added.shape
    size = key_dim * value_dim
    entering, block = torch.empty_like(added), min(1024, power_of_two(size))
    kernels.enter[(rows, triton.cdiv(size, block))](
        added,
        kept,
        last if initial is None else initial,
        entering,
        last,
        count,
        SIZE=size,
        BLOCK=block,
        PER_KEY=value_dim if kept.ndim == 3 else 0,
        REVERSE=reverse,
        INITIAL=initial is not None,
    )
    return entering


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read it as (batch, time, heads · dim)."""
    batch, time, heads, dim = tensor.stride()
    width, size = tensor.shape[-1], tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and batch * size % 16 == 0 and time * size % 16 == 0
    return aligned and dim == 1 and heads == width and width >= 16 and width & (width - 1) == 0


def described(tensor: Tensor, columns: int, *, rows: int) -> TensorDescriptor:
    """A sequence as the copy engine sees it: tiles of so many steps and columns of one head."""
    batch, time, heads, dim = tensor.shape
    return TensorDescriptor(tensor, [batch, time, heads * dim], [*tensor.stride()[:2], 1], [1, rows, columns])


def undescribed(tensor: Tensor, columns: int) -> Tensor:
    """The sequence itself, read by pointers: in the place of `described`."""
    return tensor


def rowwise(tensor: Tensor) -> Tensor:
    """`tensor` with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Walk(NamedTuple):
    """One direction of time over one problem, and where its segments begin."""

    sums: Tensor | None
    """Of log-decays, cumulative in each chunk: (batch, heads, time)."""
    parts: Tensor | None
    """Resets so far in each chunk: (batch, time)."""
    reverse: bool
    chunks: int
    """To a segment."""
    rows: int

    def __call__(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        strides: tuple[int, int],
        *,
        initial: Tensor | None = None,
        last: Tensor | None = None,
        kept: Tensor | None = None,
        beside: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (or nothing, with `kept`) and the inner products with `beside`, by block of value channels.

        `strides` are those of a state's key and value channels in memory, in the roles of this walk.
        """
        roles = (readers, written, values, strides, initial, last, kept, beside)
        dims = written.shape[-1], values.shape[-1]
        sizes = tuned("linear_attention", plan(values.dtype, *dims), values.dtype, *dims, self.reverse)
        sizes = sizes._replace(**(options or {}))
        key = ("linear_attention", sizes, values.dtype, self.rows, written.shape[-1], self.reverse, beside is None)
        return fitting(key, partial(self._launch, *roles), sizes.smaller())

    def _launch(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        strides: tuple[int, int],
        initial: Tensor | None,
        last: Tensor | None,
        kept: Tensor | None,
        beside: Tensor | None,
        sizes: Plan,
    ) -> tuple[Tensor, Tensor]:
        batch, time, heads, key_dim = written.shape
        value_dim = values.shape[-1]
        blocks, count = triton.cdiv(value_dim, sizes.block), triton.cdiv(time, self.chunks * self.rows)
        outputs = values.new_empty((1,) * 4 if kept is not None else (batch, time, heads, value_dim))
        products = values.new_empty(0 if beside is None else (blocks, batch, heads, time), dtype=torch.float32)
        none = outputs
        tensors = (readers, written, values, outputs)
        copied = COPY_ENGINE and values.element_size() == 2 and kept is None and all(map(describable, tensors))
        describe = partial(described, rows=self.rows) if copied else undescribed
        block_of_keys = max(16, power_of_two(key_dim))
        last_reader = readers[:, -1].contiguous() if beside is not None and self.reverse else none
        kernels.walk[(blocks * batch * heads, count)](
            describe(readers, block_of_keys),
            describe(written, block_of_keys),
            describe(values, sizes.block),
            describe(values if beside is None else beside, sizes.block),
            none if self.sums is None else self.sums,
            none if self.parts is None else self.parts,
            none if initial is None else initial,
            describe(outputs, sizes.block),
            products,
            none if last is None else last,
            none if kept is None else kept,
            last_reader,
            time,
            triton.cdiv(time, self.rows) * self.rows,
            heads,
            self.chunks,
            *readers.stride()[:3],
            *written.stride()[:3],
            *values.stride()[:3],
            *(values if beside is None else beside).stride()[:3],
            *strides,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            ROWS=self.rows,
            BK=block_of_keys,
            BV=sizes.block,
            REVERSE=self.reverse,
            DECAY=self.sums is not None,
            RESET=self.parts is not None,
            INITIAL=initial is not None,
            LAST=last is not None,
            OUTPUTS=kept is None,
            PRODUCTS=beside is not None,
            WIDE=values.dtype == torch.float16,
            TYPE=TYPES[values.dtype],
            COPIED=copied,
            PRECISION=dot_precision(values.dtype),
            STAGES=sizes.stages,
            num_warps=sizes.warps,
        )
        return outputs, products

    def entering(self, written: Tensor, values: Tensor, initial: Tensor | None, last: Tensor) -> Tensor | None:
        """The state that enters each segment; fills `last`. With one segment: as it is, and `last` is left."""
        batch, time, heads = written.shape[:3]
        count = triton.cdiv(time, self.chunks * self.rows)
        if count == 1:
            return initial
        added = last.new_empty(batch * heads, count, *last.shape[2:])
        kept = last.new_empty(batch * heads, count)
        self(written, written, values, (values.shape[-1], 1), last=added, kept=kept)
        return enter(added, kept, initial, last, self.reverse)


def chunk_sums(
    log_decay: Tensor | None, reset: Tensor | None, rows: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Cumulative sums, in chunks of `rows` steps, of log-decays (batch, heads, time) and of resets (batch, time).

    The log-decays are to base 2, and time is filled up to whole chunks.
    """
    some = reset if log_decay is None else log_decay
    if some is None:
        return None, None
    batch, time = some.shape[:2]
    chunks = triton.cdiv(time, rows)
    heads = 1 if log_decay is None else log_decay.shape[2]
    width = min(16, power_of_two(heads))
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    sums = some.new_empty(0 if log_decay is None else (batch, heads, chunks * rows), dtype=wide)
    parts = some.new_empty(0 if reset is None else (batch, chunks * rows), dtype=torch.int32)
    chunk_parts.chunk_sums[(chunks, batch, triton.cdiv(heads, width))](
        sums if log_decay is None else log_decay.contiguous(),
        parts if reset is None else reset.contiguous(),
        sums,
        parts,
        time,
        heads,
        ROWS=rows,
        HEADS=width,
        DECAY=log_decay is not None,
        RESET=reset is not None,
        num_warps=1,
    )
    return None if log_decay is None else sums, None if reset is None else parts


def state_like(queries: Tensor, values: Tensor) -> Tensor:
    """An empty state."""
    batch, _, heads, key_dim = queries.shape
    return queries.new_empty(batch, heads, key_dim, values.shape[-1], dtype=accumulation_dtype(queries.dtype))


def _prepared(
    queries: Tensor, values: Tensor, log_decay: Tensor | None, state: Tensor | None, reset: Tensor | None
) -> tuple[Walk, Tensor | None]:
    batch, _, heads, key_dim = queries.shape
    sizes = plan(values.dtype, key_dim, values.shape[-1])
    programs = batch * heads * triton.cdiv(values.shape[-1], sizes.block)
    sums, parts = chunk_sums(log_decay, reset, sizes.rows, values.dtype)
    walk = Walk(sums, parts, False, segments(queries, sizes.rows, programs, sizes.warps), sizes.rows)
    return walk, None if state is None else state.to(accumulation_dtype(queries.dtype)).contiguous()


def forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    queries, keys, values = rowwise(queries), rowwise(keys), rowwise(values)
    walk, initial = _prepared(queries, values, log_decay, state, reset)
    last = state_like(queries, values)
    entering = walk.entering(keys, values, initial, last)
    ends = last if entering is initial else None
    outputs, _ = walk(queries, keys, values, (values.shape[-1], 1), initial=entering, last=ends)
    return outputs, last


def backward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, log-decays and state; empty where there is no such argument."""
    queries, keys, values, grad = (rowwise(tensor) for tensor in (queries, keys, values, grad.to(queries.dtype)))
    walk, initial = _prepared(queries, values, log_decay, state, reset)
    back = walk._replace(reverse=True)
    width = values.shape[-1]
    end, start = state_like(queries, values), state_like(queries, values)
    flowing = None if grad_last is None else grad_last.to(end.dtype).contiguous()

    entering = walk.entering(keys, values, initial, end)
    behind = back.entering(queries, grad, flowing, start)
    one_segment = behind is flowing
    # Roles: readers, written, values; a state that is read by value channels lies transposed in memory.
    if log_decay is None:
        of_queries, _ = walk(grad, values, keys, (1, width), initial=entering)
        of_keys, _ = back(values, grad, queries, (1, width), initial=behind)
        of_decay = queries.new_empty(0)
    else:
        ends = end if entering is None else torch.empty_like(entering)
        of_queries, read = walk(grad, values, keys, (1, width), initial=entering, last=ends, beside=queries)
        of_keys, wrote = back(values, grad, queries, (1, width), initial=behind, beside=keys)
        # What of the loss goes through the state at the end of each segment.
        flow = None if behind is None else (ends.view_as(behind) * behind).flatten(2).sum(-1)
        of_decay = _decay_gradient(walk, log_decay, reset, read, wrote, flow)
    first = start if state is not None and one_segment else None
    of_values, _ = back(keys, queries, grad, (width, 1), initial=behind, last=first)
    return of_queries, of_keys, of_values, of_decay, queries.new_empty(0) if state is None else start.to(state.dtype)


def _decay_gradient(
    walk: Walk, log_decay: Tensor, reset: Tensor | None, read: Tensor, wrote: Tensor, flow: Tensor | None
) -> Tensor:
    batch, time, heads = log_decay.shape
    gradient = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    length = walk.chunks * walk.rows
    kernels.decay_gradient[(batch * heads, triton.cdiv(time, length))](
        read,
        wrote,
        gradient if flow is None else flow,
        log_decay.contiguous(),
        gradient if reset is None else reset.contiguous(),
        gradient,
        time,
        heads,
        length,
        read.shape[0],
        wrote.shape[0],
        RESET=reset is not None,
        FLOW=flow is not None,
        BLOCK=min(1024, power_of_two(length)),
    )
    return gradient
