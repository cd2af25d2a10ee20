"""How a call of `delta_rule` is cut up: sizes of chunks and tiles, warps and stages, from its shapes and the card."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ostinato.ops.checks import HALF
from ostinato.ops.kernels.triton.launch import card, cdiv, narrowest, power_of_two


class Plan(NamedTuple):
    """Sizes and launch options of one call."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    half: bool
    """Whether the inputs are of half precision."""
    micro: int
    """Rows to a token."""
    chunk: int
    """Rows to a chunk."""
    chunks: int
    query_block: int
    key_block: int
    value_block: int
    """Value channels of a program of the walks, and of what they keep a scale for."""
    walk_warps: int
    walk_stages: int
    again_stages: int
    """Of the walk that the backward pass repeats."""
    back_warps: int
    back_stages: int
    gradient_warps: int
    gradient_stages: int
    gradient_registers: int | None
    """At most, a thread."""
    prepare_warps: int
    prepare_registers: int | None
    segment: int
    """Chunks to a segment of the walks."""

    @property
    def segments(self) -> int:
        """Segments of the walks."""
        return cdiv(self.chunks, self.segment)

    @property
    def pairs(self) -> int:
        """Batch × heads."""
        return self.batch * self.heads

    @property
    def levels(self) -> int:
        """Halvings of a chunk's tokens."""
        return (power_of_two(self.chunk // self.micro) - 1).bit_length()

    def sizes(self) -> tuple[int, int, int]:
        """The sizes that are arguments of all kernels."""
        return self.tokens, self.heads, self.chunks

    @property
    def blocks(self) -> int:
        """Blocks of values."""
        return cdiv(self.value_dim, self.value_block)

    def constants(self, *, values: bool = False) -> dict[str, Any]:
        """The compile-time constants that all kernels share; with `values`, also the values and their blocks."""
        found = {
            "K": self.key_dim,
            "BK": self.key_block,
            "C": self.chunk,
            "MICRO": self.micro,
            "BQ": self.query_block,
        }
        return {**found, "V": self.value_dim, "BV": self.value_block} if values else found


SHORTEST_SEGMENT = 8
"""Chunks: in shorter segments the passes over their edges would cost more than they save."""

OVERRIDES: dict[str, Any] = {}
"""Launch options to try instead of the planned ones, by their names in `Plan`: for tuning."""


def plan(queries: Tensor, keys: Tensor, values: Tensor, *, channels: bool) -> Plan:
    """Choose the sizes of a call: chunks of 64 rows, or 32 where tiles are large, and value blocks to fit registers."""
    batch, tokens, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    micro = keys.shape[1] // tokens
    half = queries.dtype in HALF
    narrow = narrowest(queries.dtype)
    key_block, all_values = max(narrow, power_of_two(key_dim)), max(narrow, power_of_two(value_dim))
    large = not half or (channels and key_block > 128)
    chunk = OVERRIDES.get("chunk", 32 if large else 64)
    per_chunk = chunk // micro
    widest = 64 if half else min(32, all_values)
    wide = key_block * widest > 8192
    chunks = cdiv(tokens, per_chunk)
    found_card = card(queries.device)
    # A stage of a walk holds tiles of queries, keys (two forms of them, if decays are per channel) and values, Y and P.
    width = queries.element_size()
    stage = chunk * (key_block * (3 if channels else 2) + widest + 2 * chunk) * width
    room = found_card.shared_memory - (key_block + 2 * chunk) * widest * width
    stages = max(1, min(3, room // stage))
    found = Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        half=half,
        micro=micro,
        chunk=chunk,
        chunks=chunks,
        query_block=max(16, power_of_two(per_chunk)),
        key_block=key_block,
        value_block=widest,
        walk_warps=8 if wide else 4,
        walk_stages=stages,
        # With fewer stages two programs of it share a processor.
        again_stages=stages if channels else min(2, stages),
        # With four, an H100's registers do not hold the state and what is made of it.
        back_warps=8 if wide or (half and key_block == 128 and not channels) else 4,
        back_stages=stages,
        gradient_warps=8,
        gradient_stages=1,
        gradient_registers=None,
        prepare_warps=8 if channels else 4,
        prepare_registers=None,
        segment=chunks
        if key_block > 128
        else _segment(chunks, batch * heads * cdiv(value_dim, widest), found_card.processors),
    )
    return found._replace(**OVERRIDES) if OVERRIDES else found


def _segment(chunks: int, programs: int, processors: int) -> int:
    """Chunks to a segment: all where the heads occupy half the card, else as few as fill it, three walks then.

    16 heads and 32,768 steps, forward and back, took an H200 4.2 ms so, and 7.8 in one segment.
    The transition of a segment has to fit shared memory: there are none where keys are longer than 128.
    """
    if 2 * programs > processors:
        return chunks
    return min(chunks, max(SHORTEST_SEGMENT, cdiv(chunks, 2 * processors // programs)))
