"""Launches of `linear_attention` with one decay per key channel: what walks where, in how many segments.

The kernels, and the mathematics, are in `linear_attention_by_key` and `linear_attention_by_value`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton import linear_attention_channels as kernels
from ostinato.ops.kernels.triton import linear_attention_heads as heads
from ostinato.ops.kernels.triton.launch import dot_precision, fitting, power_of_two
from ostinato.ops.kernels.triton.linear_attention_by_key import by_key as key_kernel
from ostinato.ops.kernels.triton.linear_attention_by_value import by_value as value_kernel
from ostinato.ops.kernels.triton.linear_attention_heads import (
    TYPES,
    Plan,
    chunk_sums,
    describable,
    described,
    enter,
    rowwise,
    segments,
    state_like,
    undescribed,
)
from ostinato.ops.kernels.triton.tuned import tuned

MILD = 112.0
"""What a channel may forget in a chunk, as a logarithm to base 2, and be computed without halving: half of it is to
stay within the types' range when exponentiated."""


def plan_rows(dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Steps in a chunk. Few in float32, whose products are unrolled: more take the compiler long, and spill."""
    if dtype == torch.float32:
        return 16
    large = power_of_two(max(key_dim, value_dim)) > 128
    return (32 if large else 64) if dtype == torch.bfloat16 else (16 if large else 32)


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
    return Plan(rows, min(32, block), warps=4, stages=1 if large else 2)


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
            "TYPE": TYPES[dtype],
            "WIDE": dtype == torch.float16,
            "PRECISION": dot_precision(dtype),
            "STAGES": sizes.stages,
            "num_warps": sizes.warps,
        }

    def _grid(self, values: Tensor, sizes: Plan) -> tuple[int, int]:
        batch, time, heads, value_dim = values.shape
        blocks = triton.cdiv(value_dim, sizes.block)
        return blocks * batch * heads, triton.cdiv(time, self.chunks * self.rows)

    def _launch(
        self,
        kernel: Any,
        arguments: tuple[Any, ...],
        written: Tensor,
        values: Tensor,
        initial: Tensor | None,
        sizes: Plan,
        flags: dict[str, Any],
    ) -> None:
        """Both kinds of the kernel; in float32 all sequences count as strong, which loses the fewest digits."""
        shared = self._shared(written, values, sizes, initial) | flags
        grid = self._grid(values, sizes)
        if values.dtype != torch.float32:
            kernel[grid](*arguments, STRONG=0, **shared)
        kernel[grid](*arguments, STRONG=1, **(shared | {"STAGES": 1}))

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
        dims = written.shape[-1], values.shape[-1]
        sizes = tuned("linear_attention by key", plan_by_key(values.dtype, *dims), values.dtype, *dims)
        sizes = sizes._replace(**(options or {}))
        outputs = values.new_empty((0,) if kept is not None else values.shape)
        none = outputs

        def launch(sizes: Plan) -> None:
            centred, totals, strong_ones = self.sums
            tensors = (readers, written, values, outputs, centred)
            copied = (
                heads.COPY_ENGINE and values.element_size() == 2 and kept is None and all(map(describable, tensors))
            )
            describe = partial(described, rows=self.rows) if copied else undescribed
            width = max(16, power_of_two(written.shape[-1]))
            arguments = (
                describe(readers, width),
                describe(written, width),
                describe(values, sizes.block),
                self.log_decay,
                none if self.reset is None else self.reset,
                describe(centred, width),
                totals,
                strong_ones,
                none if self.parts is None else self.parts,
                none if initial is None else initial,
                describe(outputs, sizes.block),
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
            flags = {"LAST": last is not None, "OUTPUTS": kept is None, "COPIED": copied}
            self._launch(key_kernel, arguments, written, values, initial, sizes, flags)

        key = ("linear_attention by key", sizes, values.dtype, self.rows, written.shape[-1], kept is None)
        fitting(key, launch, sizes.smaller())
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
        dims = written.shape[-1], values.shape[-1]
        sizes = tuned("linear_attention by value", plan_by_value(values.dtype, *dims), values.dtype, *dims)
        sizes = sizes._replace(**(options or {}))
        outputs = torch.empty_like(values, memory_format=torch.contiguous_format)
        into = products if gradient is None else gradient

        def launch(sizes: Plan) -> None:
            centred, totals, strong_ones = self.sums
            tensors = (readers, written, values, beside, outputs, centred, products, into)
            copied = heads.COPY_ENGINE and values.element_size() == 2 and all(map(describable, tensors))
            describe = partial(described, rows=self.rows) if copied else undescribed
            width = max(16, power_of_two(written.shape[-1]))
            arguments = (
                describe(readers, width),
                describe(written, width),
                describe(values, sizes.block),
                describe(beside, sizes.block),
                self.log_decay,
                outputs if self.reset is None else self.reset,
                describe(centred, sizes.block),
                totals,
                strong_ones,
                outputs if self.parts is None else self.parts,
                outputs if initial is None else initial,
                describe(outputs, sizes.block),
                describe(products, sizes.block),
                products if flow is None else flow,
                describe(into, sizes.block),
                products if last is None else last,
                readers[:, -1].contiguous() if self.reverse else outputs,
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
            self._launch(value_kernel, arguments, written, values, initial, sizes, {"COPIED": copied})

        key = ("linear_attention by value", sizes, values.dtype, self.rows, written.shape[-1], self.reverse)
        fitting(key, launch, sizes.smaller())
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


def channel_sums(
    log_decay: Tensor, reset: Tensor | None, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative sums in each chunk, about the middle; those of the whole chunk; and which are strong."""
    batch, time, heads, width = log_decay.shape
    chunks = triton.cdiv(time, rows)
    centred = torch.empty_like(log_decay, dtype=torch.float32)
    totals = centred.new_empty(batch, heads, chunks, width)
    strong = centred.new_full((batch, heads), int(dtype == torch.float32), dtype=torch.int32)
    kernels.channel_sums[(chunks, batch * heads)](
        log_decay,
        centred if reset is None else reset,
        centred,
        totals,
        strong,
        time,
        heads,
        MILD=MILD,
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
    sums = channel_sums(log_decay, reset, sizes.rows, values.dtype)
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
    end, start = state_like(queries, values), state_like(queries, values)
    flowing = None if grad_last is None else grad_last.to(end.dtype).contiguous()

    entering = walks.entering(keys, values, initial, end)
    behind = back.entering(queries, grad, flowing, start)
    one_segment = behind is flowing
    products = queries.new_empty(queries.shape, dtype=torch.float32)
    ends = end if entering is None else torch.empty_like(entering)
    of_queries = walks.by_value(grad, values, keys, queries, products, initial=entering, last=ends)
    # What of the loss goes through the state at the end of each segment, by key channel.
    flow = None if behind is None else (ends.view_as(behind) * behind).sum(-1)
    of_decay = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    of_keys = back.by_value(values, grad, queries, keys, products, initial=behind, flow=flow, gradient=of_decay)
    first = start if state is not None and one_segment else None
    of_values = back.by_key(keys, queries, grad, initial=behind, last=first)
    return of_queries, of_keys, of_values, of_decay, queries.new_empty(0) if state is None else start.to(state.dtype)
