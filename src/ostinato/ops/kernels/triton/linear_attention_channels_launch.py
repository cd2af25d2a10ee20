"""Launches of `linear_attention` with one decay per key channel: what walks where, in how many segments.

The kernels, and the mathematics, are in `linear_attention_by_key` and `linear_attention_by_value`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton import linear_attention_channels as kernels
from ostinato.ops.kernels.triton.launch import dot_precision, power_of_two
from ostinato.ops.kernels.triton.linear_attention_by_key import by_key
from ostinato.ops.kernels.triton.linear_attention_by_value import by_value
from ostinato.ops.kernels.triton.linear_attention_heads import Plan, chunk_sums, enter, rowwise, segments, state_like

MILD, MILD_FLOAT32 = 112.0, 24.0
"""What a channel may forget in a chunk, as a logarithm to base 2, and be computed without halving: half of it is to
stay within the types' range when exponentiated, and its rounding within float32's error where that matters."""


def plan_rows(dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Steps in a chunk."""
    large = power_of_two(max(key_dim, value_dim)) > 128
    if dtype == torch.bfloat16:
        return 32 if large else 64
    return 16 if large else 32


def plan_by_key(dtype: torch.dtype, key_dim: int, value_dim: int) -> Plan:
    """Every block of values scales queries and keys anew, so that it is better large."""
    large, block = power_of_two(key_dim) > 128, max(16, power_of_two(value_dim))
    rows = plan_rows(dtype, key_dim, value_dim)
    if dtype == torch.float32:
        return Plan(rows, min(32, block), warps=4, stages=1)
    return Plan(rows, min(64 if large else 128, block), warps=8, stages=1 if large else 2)


def plan_by_value(dtype: torch.dtype, key_dim: int, value_dim: int) -> Plan:
    """Blocks of values share little work, and small ones run side by side on a processor."""
    large, block = power_of_two(key_dim) > 128, max(16, power_of_two(value_dim))
    rows = plan_rows(dtype, key_dim, value_dim)
    if dtype == torch.float32:
        return Plan(rows, min(32, block), warps=4, stages=1)
    return Plan(rows, min(64, block), warps=8 if large else 4, stages=1 if large else 2)


class Walks(NamedTuple):
    """Both kernels in one direction of time over one problem."""

    log_decay: Tensor
    reset: Tensor | None
    sums: tuple[Tensor, Tensor, Tensor]
    """What `linear_attention_channels.channel_sums` makes of them."""
    parts: Tensor | None
    reverse: bool
    chunks: int
    """To a segment."""
    rows: int

    def _shared(self, written: Tensor, values: Tensor, sizes: Plan, initial: Tensor | None) -> dict[str, Any]:
        dtype = values.dtype
        return {
            "KEY_DIM": written.shape[-1],
            "VALUE_DIM": values.shape[-1],
            "ROWS": self.rows,
            "BK": max(16, power_of_two(written.shape[-1])),
            "BV": sizes.block,
            "REVERSE": self.reverse,
            "RESET": self.reset is not None,
            "INITIAL": initial is not None,
            "FINE": dtype == torch.float32,
            "WIDE": dtype == torch.float16,
            "PRECISION": dot_precision(dtype),
            "STAGES": sizes.stages,
            "num_warps": sizes.warps,
        }

    def _grid(self, values: Tensor, sizes: Plan) -> tuple[int, int]:
        batch, time, heads, value_dim = values.shape
        blocks = triton.cdiv(value_dim, sizes.block)
        return blocks * batch * heads, triton.cdiv(time, self.chunks * self.rows)

    def by_key(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        *,
        initial: Tensor | None = None,
        last: Tensor | None = None,
        kept: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Outputs, or nothing with `kept`."""
        sizes = plan_by_key(values.dtype, written.shape[-1], values.shape[-1])._replace(**(options or {}))
        outputs = values.new_empty((0,) if kept is not None else values.shape)
        none = outputs
        arguments = (
            readers,
            written,
            values,
            self.log_decay,
            none if self.reset is None else self.reset,
            *self.sums,
            none if self.parts is None else self.parts,
            none if initial is None else initial,
            outputs,
            none if last is None else last,
            none if kept is None else kept,
            values.shape[1],
            triton.cdiv(values.shape[1], self.rows) * self.rows,
            values.shape[2],
            self.chunks,
            self.rows.bit_length() - 1,
            *readers.stride()[:3],
            *written.stride()[:3],
            *values.stride()[:3],
        )
        shared = self._shared(written, values, sizes, initial)
        for strong in (0, 1):
            by_key[self._grid(values, sizes)](
                *arguments, LAST=last is not None, OUTPUTS=kept is None, STRONG=strong, **shared
            )
        return outputs

    def by_value(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        beside: Tensor,
        products: Tensor,
        *,
        initial: Tensor | None = None,
        last: Tensor | None = None,
        flow: Tensor | None = None,
        gradient: Tensor | None = None,
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Outputs. Forwards fills `products` and `last`; backwards reads `products` and `flow`, fills `gradient`."""
        sizes = plan_by_value(values.dtype, written.shape[-1], values.shape[-1])._replace(**(options or {}))
        outputs = torch.empty_like(values, memory_format=torch.contiguous_format)
        arguments = (
            readers,
            written,
            values,
            beside,
            self.log_decay,
            outputs if self.reset is None else self.reset,
            *self.sums,
            outputs if self.parts is None else self.parts,
            outputs if initial is None else initial,
            outputs,
            products,
            products if flow is None else flow,
            products if gradient is None else gradient,
            products if last is None else last,
            readers[:, -1].contiguous(),
            values.shape[1],
            triton.cdiv(values.shape[1], self.rows) * self.rows,
            values.shape[2],
            self.chunks,
            self.rows.bit_length() - 1,
            *readers.stride()[:3],
            *written.stride()[:3],
            *values.stride()[:3],
            *beside.stride()[:3],
        )
        shared = self._shared(written, values, sizes, initial)
        for strong in (0, 1):
            by_value[self._grid(values, sizes)](*arguments, STRONG=strong, **shared)
        return outputs

    def entering(self, written: Tensor, values: Tensor, initial: Tensor | None, last: Tensor) -> Tensor | None:
        """The state that enters each segment; fills `last`. With one segment: as it is, and `last` is left."""
        batch, time, heads, key_dim = written.shape
        count = triton.cdiv(time, self.chunks * self.rows)
        if count == 1:
            return initial
        added = last.new_empty(batch * heads, count, *last.shape[2:])
        kept = last.new_empty(batch * heads, count, key_dim)
        self.by_key(written, written, values, last=added, kept=kept)
        return enter(added, kept, initial, last, self.reverse)


def channel_sums(log_decay: Tensor, reset: Tensor | None, rows: int, mild: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative sums in each chunk, about the middle; those of the whole chunk; and which are strong."""
    batch, time, heads, width = log_decay.shape
    chunks = triton.cdiv(time, rows)
    centred = torch.empty_like(log_decay, dtype=torch.float32)
    totals = centred.new_empty(batch, heads, chunks, width)
    strong = centred.new_zeros(batch, heads, dtype=torch.int32)
    kernels.channel_sums[(chunks, batch * heads)](
        log_decay,
        centred if reset is None else reset,
        centred,
        totals,
        strong,
        time,
        heads,
        MILD=mild,
        WIDTH=width,
        ROWS=rows,
        COLUMNS=max(16, power_of_two(width)),
        RESET=reset is not None,
        num_warps=4,
    )
    return centred, totals, strong


def _prepared(
    queries: Tensor, values: Tensor, log_decay: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Walks, Tensor | None]:
    batch, _, heads, key_dim = queries.shape
    sizes = plan_by_key(values.dtype, key_dim, values.shape[-1])
    programs = batch * heads * triton.cdiv(values.shape[-1], sizes.block)
    _, parts = chunk_sums(None, reset, sizes.rows, values.dtype)
    reset = None if reset is None else reset.contiguous()
    chunks = segments(queries, sizes.rows, programs, sizes.warps)
    log_decay = log_decay.contiguous()
    sums = channel_sums(log_decay, reset, sizes.rows, MILD_FLOAT32 if values.dtype == torch.float32 else MILD)
    walks = Walks(log_decay, reset, sums, parts, False, chunks, sizes.rows)
    return walks, None if state is None else state.to(accumulation_dtype(queries.dtype)).contiguous()


def forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    queries, keys, values = rowwise(queries), rowwise(keys), rowwise(values)
    walks, initial = _prepared(queries, values, log_decay, state, reset)
    last = state_like(queries, values)
    entering = walks.entering(keys, values, initial, last)
    ends = last if entering is initial else None
    return walks.by_key(queries, keys, values, initial=entering, last=ends), last


def backward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, log-decays and state; empty where there is no such argument."""
    queries, keys, values, grad = (rowwise(tensor) for tensor in (queries, keys, values, grad.to(queries.dtype)))
    walks, initial = _prepared(queries, values, log_decay, state, reset)
    back = walks._replace(reverse=True)
    batch, time, heads, key_dim = queries.shape
    end, start = state_like(queries, values), state_like(queries, values)
    flowing = None if grad_last is None else grad_last.to(end.dtype).contiguous()

    entering = walks.entering(keys, values, initial, end)
    behind = back.entering(queries, grad, flowing, start)
    one_segment = behind is flowing
    products = queries.new_empty(batch * heads, time, key_dim, dtype=torch.float32)
    ends = end if entering is None else torch.empty_like(entering)
    of_queries = walks.by_value(grad, values, keys, queries, products, initial=entering, last=ends)
    # What of the loss goes through the state at the end of each segment, by key channel.
    flow = None if behind is None else (ends.view_as(behind) * behind).sum(-1)
    of_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    of_keys = back.by_value(values, grad, queries, keys, products, initial=behind, flow=flow, gradient=of_decay)
    first = start if state is not None and one_segment else None
    of_values = back.by_key(keys, queries, grad, initial=behind, last=first)
    return of_queries, of_keys, of_values, of_decay, queries.new_empty(0) if state is None else start.to(state.dtype)
