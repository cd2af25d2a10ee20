"""Tiles of the head-wise kernels, and how they become operands and results of products.

The forward kernel's tiles are (D, COLUMNS): a head's outputs, for COLUMNS rows of the batch. The walk back has
(COLUMNS, E, PARTS), the outputs as PARTS times E: with the axes in this order, E contiguous in memory, the compiler
gives part p to warp p, and a tile becomes the operand of its own part without an exchange between warps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def four(gates, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The four tiles (D, COLUMNS) of a (4, D, COLUMNS)."""
    quads = tl.reshape(tl.permute(gates, (1, 2, 0)), (D, COLUMNS, 2, 2))
    even, odd = tl.split(quads)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def stack(
    first, second, third, fourth, GATES: tl.constexpr, COLUMNS: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr
):
    """Tiles (COLUMNS, E, PARTS) of gates as (PARTS, E · 4, COLUMNS), the gates of an output as neighbours.

    Of one gate, (PARTS, E, COLUMNS).
    """
    if GATES == 1:
        return tl.permute(first, (2, 1, 0))
    else:
        quads = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (COLUMNS, E, PARTS, 4))
        return tl.reshape(tl.permute(quads, (2, 1, 3, 0)), (PARTS, E * 4, COLUMNS))


@triton.jit
def _fold(tile, HALF: tl.constexpr, COLUMNS: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr):
    """(COLUMNS, E, PARTS, 2 · HALF) added up in pairs on the last axis."""
    one, two = tl.split(tl.reshape(tile, (COLUMNS, E, PARTS, HALF, 2)))
    return one + two


@triton.jit
def sum_of_parts(product, COLUMNS: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr):
    """The sum of a (PARTS, PARTS · E, COLUMNS) over its first axis, a tile."""
    tile = tl.permute(tl.reshape(product, (PARTS, PARTS, E, COLUMNS)), (3, 2, 1, 0))
    if PARTS >= 16:
        tile = _fold(tile, 8, COLUMNS, E, PARTS)
    if PARTS >= 8:
        tile = _fold(tile, 4, COLUMNS, E, PARTS)
    if PARTS >= 4:
        tile = _fold(tile, 2, COLUMNS, E, PARTS)
    if PARTS >= 2:
        one, two = tl.split(tile)
        return one + two
    else:
        return tl.reshape(tile, (COLUMNS, E, PARTS))
