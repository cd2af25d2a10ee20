"""What the launches of `linear_attention` share: plans, segments of time, tiles by the copy engine, sums in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ostinato.ops.kernels.triton import chunk_parts
from ostinato.ops.kernels.triton.launch import INTERPRETED, attend, card, cdiv, dot_precision, narrowest, power_of_two
from ostinato.ops.kernels.triton.linear_attention_walk import enter

SHORTEST_SEGMENT = 8
"""Chunks: a segment has at least as many, so that the passes over its edges cost little beside it."""

WIDE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float32}
"""The type of operands that can outgrow the inputs' range."""


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


def key_block(size: int, dtype: torch.dtype) -> int:
    """Channels of a tile that holds `size`, of those that a state is read and written by."""
    return max(narrowest(dtype), power_of_two(size))


def value_block(values: Tensor) -> int:
    """Channels of a tile that holds those of `values`."""
    return max(narrowest(values.dtype), power_of_two(values.shape[-1]))


def describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read it as (batch, time, heads · dim)."""
    batch, time, heads, dim = tensor.stride()
    width, size = tensor.shape[-1], tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and batch * size % 16 == 0 and time * size % 16 == 0
    return aligned and dim == 1 and heads == width and width >= 16 and width & (width - 1) == 0


def described(tensors: tuple[Tensor | None, ...], rows: int, columns: int) -> tuple[TensorDescriptor | None, ...]:
    """Sequences as the copy engine sees them: tiles of so many steps and columns of one head."""

    def describe(tensor: Tensor) -> TensorDescriptor:
        attend()
        batch, time, heads, dim = tensor.shape
        return TensorDescriptor(tensor, [batch, time, heads * dim], [*tensor.stride()[:2], 1], [1, rows, columns])

    return tuple(None if tensor is None else describe(tensor) for tensor in tensors)


@dataclass(frozen=True)
class Walks(ABC):
    """The kernels over one problem, in both directions of time, and where its segments begin."""

    copies: ClassVar[bool]
    """Whether tiles of half precision are moved by the card's copy engine (by descriptors of tensors), where it can."""

    log_decay: Tensor | None
    reset: Tensor | None
    parts: Tensor | None
    """Resets so far in each chunk: (batch, time)."""
    chunks: int
    """To a segment."""
    rows: int

    @abstractmethod
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
        """What is read, forwards in time or in `reverse`, and the state at the end in `last`.

        With `kept` nothing is read: it is filled with what each segment keeps of a state, `last` with what it adds.
        """

    @abstractmethod
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
        """Gradients of queries, keys and log-decays; the last is empty where there are none.

        `entering` are the states that enter the segments, `behind` the gradients of those that leave them; `last` is
        the last state's memory, to be used.
        """

    def segments(self, time: int) -> int:
        """How many there are."""
        return cdiv(time, self.chunks * self.rows)

    def entering(
        self, written: Tensor, values: Tensor, initial: Tensor | None, last: Tensor, *, reverse: bool = False
    ) -> Tensor | None:
        """The state that enters each segment; fills `last`. With one segment: as it is, and `last` is left."""
        batch, time, heads, key_dim = written.shape
        value_dim, count = values.shape[-1], self.segments(time)
        if count == 1:
            return initial
        added = last.new_empty(batch * heads, count, key_dim, value_dim)
        per_channel = self.log_decay is not None and self.log_decay.ndim == 4
        kept = last.new_empty(batch * heads, count, key_dim if per_channel else 1)
        self.outputs(written, written, values, last=added, kept=kept, reverse=reverse)
        entering, width = torch.empty_like(added), min(1024, power_of_two(key_dim * value_dim))
        enter[(batch * heads, cdiv(key_dim * value_dim, width))](
            added,
            kept,
            initial,
            entering,
            last,
            count,
            SIZE=key_dim * value_dim,
            BLOCK=width,
            PER_KEY=value_dim if per_channel else 0,
            REVERSE=reverse,
            INITIAL=initial is not None,
        )
        return entering

    def grid(self, values: Tensor, sizes: Plan) -> tuple[int, int]:
        """Blocks of value channels of all heads, and segments."""
        batch, time, heads, value_dim = values.shape
        return cdiv(value_dim, sizes.block) * batch * heads, self.segments(time)

    def arguments(
        self,
        sizes: Plan,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: Tensor,
        initial: Tensor | None,
        last: Tensor | None,
        reverse: bool,
        by_key: tuple[Tensor, ...] = (),
        by_value: tuple[Tensor | None, ...] = (),
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the kernels' arguments begin with, and their constants. What there is not, is None.

        `inputs` are readers, written and values. Sequences come in tiles of all key channels, readers, written and the
        kernel's own `by_key`, and of a block of value channels, values, outputs and `by_value`: as descriptors, if the
        copy engine can read them all.
        """
        readers, written, values = inputs
        time, heads, value_dim = values.shape[1:]
        key_dim = written.shape[-1]
        wide: tuple[Any, ...] = (readers, written, *by_key)
        narrow: tuple[Any, ...] = (values, outputs, *by_value)
        capable = INTERPRETED or card(values.device).capability >= (9, 0)
        copied = self.copies and capable and values.element_size() == 2
        copied = copied and all(tensor is None or describable(tensor) for tensor in wide + narrow)
        keys = key_block(key_dim, values.dtype)
        copied = copied and keys == key_dim and value_dim % sizes.block == 0  # heads lie side by side
        if copied:
            wide = described(wide, self.rows, keys)
            narrow = described(narrow, self.rows, sizes.block)
        sizes_and_strides = (
            time,
            cdiv(time, self.rows) * self.rows,
            heads,
            self.chunks,
            *readers.stride()[:3],
            *written.stride()[:3],
            *values.stride()[:3],
        )
        return (*wide, *narrow, self.parts, initial, last, *sizes_and_strides), {
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "ROWS": self.rows,
            "BK": keys,
            "BV": sizes.block,
            "REVERSE": reverse,
            "RESET": self.parts is not None,
            "INITIAL": initial is not None,
            "WIDE": WIDE[values.dtype],
            "COPIED": copied,
            "PRECISION": dot_precision(values.dtype),
            "STAGES": sizes.stages,
            "num_warps": sizes.warps,
        }


def chunks_of_segment(queries: Tensor, value_dim: int, sizes: Plan) -> int:
    """Chunks to a segment: all of them where heads nearly fill the card with eight warps a processor, else as few as
    do."""
    batch, time, heads, _ = queries.shape
    programs = batch * heads * cdiv(value_dim, sizes.block)
    chunks = cdiv(time, sizes.rows)
    room = card(queries.device).processors * 8
    if 4 * programs * sizes.warps > 3 * room:
        return chunks
    wanted = cdiv(room, programs * sizes.warps)
    return min(chunks, max(SHORTEST_SEGMENT, cdiv(chunks, wanted)))


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
    chunks = cdiv(time, rows)
    heads = 1 if log_decay is None else log_decay.shape[2]
    width = min(16, power_of_two(heads))
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    sums = None if log_decay is None else some.new_empty(batch, heads, chunks * rows, dtype=wide)
    parts = None if reset is None else some.new_empty(batch, chunks * rows, dtype=torch.int32)
    chunk_parts.chunk_sums[(chunks, batch, cdiv(heads, width))](
        log_decay,
        reset,
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
    return sums, parts
