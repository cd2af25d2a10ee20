"""Launches of `linear_attention` with one decay per head, or none: what walks where, in how many segments.

The kernels, and the mathematics, are in `linear_attention_walk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ostinato.ops.kernels.triton import linear_attention_walk as kernels
from ostinato.ops.kernels.triton.launch import cdiv, fitting, power_of_two
from ostinato.ops.kernels.triton.linear_attention_launch import (
    Plan,
    Walks,
    chunk_sums,
    chunks_of_segment,
    value_block,
)
from ostinato.ops.kernels.triton.tuned import tuned


def plan(values: Tensor, key_dim: int) -> Plan:
    """For a walk whose state has so many key channels."""
    block = value_block(values)
    if values.dtype == torch.float32:
        # 32 rows spill: four times slower.
        return Plan(rows=16, block=min(32, block), warps=4, stages=1)
    large = power_of_two(key_dim) > 128
    return Plan(64, min(64, block), warps=8 if large else 4, stages=1 if large else 2)


@dataclass(frozen=True)
class HeadWalks(Walks):
    """One decay per head, or none."""

    copies = True  # a fifth faster on an H200

    sums: Tensor | None
    """Of log-decays, cumulative in each chunk: (batch, heads, time)."""

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
        by_channel = (values.shape[-1], 1)
        return self._walk(readers, written, values, by_channel, initial=initial, last=last, kept=kept, reverse=reverse)[
            0
        ]

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
        # A state that is read by value channels lies transposed in memory.
        by_channel = (1, values.shape[-1])
        if self.log_decay is None:
            of_queries, _ = self._walk(grad, values, keys, by_channel, initial=entering)
            of_keys, _ = self._walk(values, grad, queries, by_channel, initial=behind, reverse=True)
            return of_queries, of_keys, queries.new_empty(0)
        ends = last if entering is None else torch.empty_like(entering)
        of_queries, read = self._walk(grad, values, keys, by_channel, initial=entering, last=ends, beside=queries)
        of_keys, wrote = self._walk(values, grad, queries, by_channel, initial=behind, beside=keys, reverse=True)
        # What of the loss goes through the state at the end of each segment.
        flow = None if behind is None else (ends.view_as(behind) * behind).flatten(2).sum(-1)
        return of_queries, of_keys, self._decay_gradient(self.log_decay, read, wrote, flow)

    def _walk(
        self,
        readers: Tensor,
        written: Tensor,
        values: Tensor,
        by_channel: tuple[int, int],
        *,
        initial: Tensor | None,
        last: Tensor | None = None,
        kept: Tensor | None = None,
        beside: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Any]:
        """Outputs (or nothing, with `kept`) and the inner products with `beside`, by block of value channels.

        `by_channel` are the strides of a state's key and value channels in memory, in the roles of this walk.
        """
        batch, time, heads, key_dim = written.shape
        value_dim = values.shape[-1]
        outputs = values.new_empty(values.shape if kept is None else (1,) * 4)
        two = values.dtype == torch.bfloat16 and self.sums is not None

        def launch(sizes: Plan) -> Tensor | None:
            products, last_reader = None, None
            if beside is not None:
                blocks = cdiv(value_dim, sizes.block)
                products = values.new_empty(blocks, batch, heads, time, dtype=torch.float32)
                if reverse and initial is not None:
                    last_reader = readers[:, -1].contiguous()
            arguments, constants = self.arguments(
                sizes, (readers, written, values), outputs, initial, last, reverse, by_value=(beside,)
            )
            kernels.walk[self.grid(values, sizes)](
                *arguments,
                self.sums,
                products,
                kept,
                last_reader,
                *((None,) * 3 if beside is None else beside.stride()[:3]),
                *by_channel,
                DECAY=self.sums is not None,
                LAST=last is not None,
                OUTPUTS=kept is None,
                PRODUCTS=beside is not None,
                TWO=two,
                TWO_OF_STATE=two and beside is not None,
                **constants,
            )
            return products

        sizes = plan(values, key_dim)
        sizes = tuned("linear_attention", sizes, values.dtype, key_dim, value_dim, reverse)
        key = ("linear_attention", sizes, values.dtype, self.rows, key_dim, reverse, beside is None)
        products = fitting(key, launch, sizes.smaller())
        return outputs, products

    def _decay_gradient(self, log_decay: Tensor, read: Tensor, wrote: Tensor, flow: Tensor | None) -> Tensor:
        batch, time, heads = log_decay.shape
        gradient = torch.empty_like(log_decay)
        length = self.chunks * self.rows
        kernels.decay_gradient[(batch * heads, self.segments(time))](
            read,
            wrote,
            flow,
            log_decay,
            self.reset,
            gradient,
            time,
            heads,
            length,
            read.shape[0],
            wrote.shape[0],
            RESET=self.reset is not None,
            FLOW=flow is not None,
            BLOCK=min(1024, power_of_two(length)),
        )
        return gradient


def prepared(queries: Tensor, values: Tensor, log_decay: Tensor | None, reset: Tensor | None) -> HeadWalks:
    """The walks over one problem."""
    sizes = plan(values, queries.shape[-1])
    sums, parts = chunk_sums(log_decay, reset, sizes.rows, values.dtype)
    chunks = chunks_of_segment(queries, values.shape[-1], sizes)
    return HeadWalks(log_decay, reset, parts, chunks, sizes.rows, sums)
