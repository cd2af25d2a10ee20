"""Launches of `linear_attention` with one decay per key channel: what walks where, in how many segments.

The kernels, and the mathematics, are in `linear_attention_by_key` and `linear_attention_by_value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ostinato.ops.kernels.triton import linear_attention_channels as kernels
from ostinato.ops.kernels.triton.launch import cdiv, fitting, power_of_two
from ostinato.ops.kernels.triton.linear_attention_by_key import by_key as key_kernel
from ostinato.ops.kernels.triton.linear_attention_by_value import by_value as value_kernel
from ostinato.ops.kernels.triton.linear_attention_launch import Plan, Walks, chunk_sums, chunks_of_segment, value_block
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


def plan_by_key(values: Tensor, key_dim: int) -> Plan:
    """Every block of values scales queries and keys anew, so that it is better large."""
    large = power_of_two(key_dim) > 128
    rows, block = plan_rows(values.dtype, key_dim, values.shape[-1]), value_block(values)
    if values.dtype == torch.float32:
        return Plan(rows, min(32, block), warps=4, stages=1)
    block = min(64 if large else 128, block)
    return Plan(rows, block, warps=8 if large or block == 128 else 4, stages=1 if large else 2)


def plan_by_value(values: Tensor, key_dim: int) -> Plan:
    """Blocks of values share little work, and small ones run side by side on a processor.

    They fill lines (see `narrowest`) with two terms beside each other, or as float32.
    """
    rows = plan_rows(values.dtype, key_dim, values.shape[-1])
    if values.dtype == torch.float32:
        return Plan(rows, min(32, value_block(values)), warps=4, stages=1)
    return Plan(rows, 32, warps=4, stages=1 if power_of_two(key_dim) > 128 else 2)


@dataclass(frozen=True)
class ChannelWalks(Walks):
    """One decay per key channel."""

    copies = False  # a twentieth slower with it on an H200

    log_decay: Tensor
    centred: Tensor
    totals: Tensor
    strong: Tensor
    """These three are what `linear_attention_channels.channel_sums` makes of them."""

    def _launch(
        self, kernel: Any, values: Tensor, sizes: Plan, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        """Both kinds of the kernel; in float32 all sequences count as strong, which loses the fewest digits."""
        fine, grid = values.dtype == torch.float32, self.grid(values, sizes)
        constants["TWO"] = values.dtype == torch.bfloat16
        shared = (self.log_decay, self.reset, self.totals, self.strong, self.rows.bit_length() - 1)
        # The longest to compile is asked for first.
        kernel[grid](*arguments, *shared, FINE=fine, STRONG=1, **{**constants, "STAGES": 1})
        if not fine:
            kernel[grid](*arguments, *shared, FINE=fine, STRONG=0, **constants)

    def outputs(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        *,
        initial: Tensor | None = None,
        last: Tensor | None = None,
        kept: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """See `Walks`."""
        outputs = values.new_empty(values.shape if kept is None else (1,) * 4)

        def launch(sizes: Plan) -> None:
            inputs, centred = (readers, written, values), (self.centred,)
            arguments, constants = self.arguments(sizes, inputs, outputs, initial, last, reverse, by_key=centred)
            constants |= {"LAST": last is not None, "OUTPUTS": kept is None}
            self._launch(key_kernel, values, sizes, (*arguments, kept), constants)

        dims = written.shape[-1], values.shape[-1]
        sizes = tuned("linear_attention by key", plan_by_key(values, dims[0]), values.dtype, *dims)
        key = ("linear_attention by key", sizes, values.dtype, self.rows, written.shape[-1], kept is None)
        fitting(key, launch, sizes.smaller())
        return outputs

    def _by_value(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        beside: Tensor,
        products: Tensor,
        *,
        initial: Tensor | None,
        last: Tensor | None = None,
        flow: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """Outputs. Forwards fills `products` and `last`; backwards reads `products` and `flow`, fills `gradient`."""
        outputs = values.new_empty(values.shape)
        reverse = gradient is not None
        last_reader = readers[:, -1].contiguous() if reverse and initial is not None else None

        def launch(sizes: Plan) -> None:
            inputs, by_value = (readers, written, values), (beside, self.centred, products, gradient)
            arguments, constants = self.arguments(sizes, inputs, outputs, initial, last, reverse, by_value=by_value)
            own = (flow, last_reader, *beside.stride()[:3])
            self._launch(value_kernel, values, sizes, (*arguments, *own), constants)

        dims = written.shape[-1], values.shape[-1]
        sizes = tuned("linear_attention by value", plan_by_value(values, dims[0]), values.dtype, *dims)
        key = ("linear_attention by value", sizes, values.dtype, self.rows, written.shape[-1], reverse)
        fitting(key, launch, sizes.smaller())
        return outputs

    def gradients(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        grad: Tensor,
        entering: Tensor | None,
        behind: Tensor | None,
        last: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Walks`."""
        products = queries.new_empty(queries.shape, dtype=torch.float32)
        ends = last if entering is None else torch.empty_like(entering)
        of_queries = self._by_value(grad, values, keys, queries, products, initial=entering, last=ends)
        # What of the loss goes through the state at the end of each segment, by key channel.
        flow = None if behind is None else (ends.view_as(behind) * behind).sum(-1)
        of_decay = torch.empty_like(self.log_decay)
        of_keys = self._by_value(values, grad, queries, keys, products, initial=behind, flow=flow, gradient=of_decay)
        return of_queries, of_keys, of_decay


def channel_sums(
    log_decay: Tensor, reset: Tensor | None, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative sums in each chunk, about the middle; those of the whole chunk; and which are strong."""
    batch, time, heads, width = log_decay.shape
    chunks = cdiv(time, rows)
    centred = torch.empty_like(log_decay, dtype=torch.float32)
    totals = centred.new_empty(batch, heads, chunks, width)
    strong = centred.new_full((batch, heads), int(dtype == torch.float32), dtype=torch.int32)
    kernels.channel_sums[(chunks, batch * heads)](
        log_decay,
        reset,
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


def prepared(queries: Tensor, values: Tensor, log_decay: Tensor, reset: Tensor | None) -> ChannelWalks:
    """The walks over one problem."""
    sizes = plan_by_key(values, queries.shape[-1])
    _, parts = chunk_sums(None, reset, sizes.rows, values.dtype)
    chunks = chunks_of_segment(queries, values.shape[-1], sizes)
    sums = channel_sums(log_decay, reset, sizes.rows, values.dtype)
    return ChannelWalks(log_decay, reset, parts, chunks, sizes.rows, *sums)
