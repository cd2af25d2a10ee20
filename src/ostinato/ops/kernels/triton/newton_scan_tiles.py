"""Tiles (steps, channels) with a lane for each channel, so that taking one step out of them is free."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_step(tile, rows, index):
    """One step of a float32 tile: exact, and free where a lane holds all steps."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((rows == index)[:, None], bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def put_step(tile, rows, index, value):
    """The tile with one step replaced."""
    return tl.where((rows == index)[:, None], value[None, :], tile)


@triton.jit
def tile_at(pointer, start, steps, c, STRIDE: tl.constexpr, time, inside, EVEN: tl.constexpr):
    """The tile of the steps `start + steps`, zero outside of the sequence; EVEN: it is all inside.

    Channels come in 64 bits and strides are known when a kernel is compiled: so a step's place is part of the
    instruction that loads it.
    """
    at = pointer + start.to(tl.int64) * STRIDE + (steps[:, None] * STRIDE + c[None, :])
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(start + steps < time)[:, None] & inside[None, :], other=0.0)


@triton.jit
def tile_before(pointer, start, steps, c, STRIDE: tl.constexpr, time, inside, EVEN: tl.constexpr):
    """The tile of the steps before those, `start + steps − 1`; zero before the sequence."""
    at = pointer + (start.to(tl.int64) - 1) * STRIDE + (steps[:, None] * STRIDE + c[None, :])
    # Said so that it is known, when a kernel is compiled, of all steps but one.
    mask = (steps > 0) | (start > 0)
    if not EVEN:
        mask = mask & (start + steps <= time)
    return tl.load(at, mask=mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def put_tile(pointer, tile, start, steps, c, STRIDE: tl.constexpr, end, inside, EVEN: tl.constexpr):
    """The inverse of `tile_at`, up to the step `end`, in the type of the pointer."""
    at = pointer + start.to(tl.int64) * STRIDE + (steps[:, None] * STRIDE + c[None, :])
    if EVEN:
        tl.store(at, tile.to(pointer.dtype.element_ty))
    else:
        tl.store(at, tile.to(pointer.dtype.element_ty), mask=(start + steps < end)[:, None] & inside[None, :])


@triton.jit
def marks(pointer, start, steps, time):
    """Which steps of a tile are marked: bit i for step i."""
    t = start + steps
    return tl.sum(tl.load(pointer + t, mask=(t >= 0) & (t < time), other=0).to(tl.int32) << steps, axis=0)
