"""What the kernels of `diagonal_scan` do with a tile: products, scans in registers, loads and stores.

Complex numbers are interleaved pairs of float32; in real kernels the imaginary parts are never computed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times(xr, xi, yr, yi, COMPLEX: tl.constexpr, X_COMPLEX: tl.constexpr):
    """x y, where y is COMPLEX and x is X_COMPLEX."""
    if COMPLEX:
        if X_COMPLEX:
            return xr * yr - xi * yi, xr * yi + xi * yr
        else:
            return xr * yr, xr * yi
    else:
        return xr * yr, xi


@triton.jit
def compose(a1, b1, a2, b2):
    """(a₂, b₂) ∘ (a₁, b₁)."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def compose_forgetting(a1, b1, a2, b2):
    """The same, where a₂ = 0 forgets also what is not finite."""
    return tl.where(a2 == 0, 0.0, a1 * a2), tl.where(a2 == 0, b2, a2 * b1 + b2)


@triton.jit
def compose_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    """`compose` for pairs."""
    return (
        ar1 * ar2 - ai1 * ai2,
        ar1 * ai2 + ai1 * ar2,
        ar2 * br1 - ai2 * bi1 + br2,
        ar2 * bi1 + ai2 * br1 + bi2,
    )


@triton.jit
def compose_complex_forgetting(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    """`compose_forgetting` for pairs."""
    zero = (ar2 == 0) & (ai2 == 0)
    return (
        tl.where(zero, 0.0, ar1 * ar2 - ai1 * ai2),
        tl.where(zero, 0.0, ar1 * ai2 + ai1 * ar2),
        tl.where(zero, br2, ar2 * br1 - ai2 * bi1 + br2),
        tl.where(zero, bi2, ar2 * bi1 + ai2 * br1 + bi2),
    )


@triton.jit
def compose_pair(a1, br1, bi1, a2, br2, bi2):
    """`compose` for pairs with a real transition."""
    return a1 * a2, a2 * br1 + br2, a2 * bi1 + bi2


@triton.jit
def compose_pair_forgetting(a1, br1, bi1, a2, br2, bi2):
    """`compose_forgetting` for pairs with a real transition."""
    return (
        tl.where(a2 == 0, 0.0, a1 * a2),
        tl.where(a2 == 0, br2, a2 * br1 + br2),
        tl.where(a2 == 0, bi2, a2 * bi1 + bi2),
    )


@triton.jit
def scan_tile(
    ar,
    ai,
    br,
    bi,
    REVERSE: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    FORGETTING: tl.constexpr,
):
    """All states of a tile that starts from zero, along axis 0."""
    if COMPLEX and not A_COMPLEX:
        if FORGETTING:
            _, hr, hi = tl.associative_scan((ar, br, bi), 0, compose_pair_forgetting, reverse=REVERSE)
        else:
            _, hr, hi = tl.associative_scan((ar, br, bi), 0, compose_pair, reverse=REVERSE)
        return hr, hi
    elif COMPLEX:
        if FORGETTING:
            _, _, hr, hi = tl.associative_scan((ar, ai, br, bi), 0, compose_complex_forgetting, reverse=REVERSE)
        else:
            _, _, hr, hi = tl.associative_scan((ar, ai, br, bi), 0, compose_complex, reverse=REVERSE)
        return hr, hi
    else:
        if FORGETTING:
            _, hr = tl.associative_scan((ar, br), 0, compose_forgetting, reverse=REVERSE)
        else:
            _, hr = tl.associative_scan((ar, br), 0, compose, reverse=REVERSE)
        return hr, hr


@triton.jit
def row(tile, rows, index):
    """Row `index` of a tile. Summed as integers, so that a row held in registers is found without an addition."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((rows == index)[:, None], bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def multiply(x, y):
    """For `tl.reduce`."""
    return x * y


@triton.jit
def multiply_complex(xr, xi, yr, yi):
    """For `tl.reduce`."""
    return xr * yr - xi * yi, xr * yi + xi * yr


@triton.jit
def load_tile(pointer, offsets, mask, COMPLEX: tl.constexpr, MASKED: tl.constexpr):
    """A (steps, channels) tile as float32: real and imaginary parts."""
    if COMPLEX:
        pairs = pointer + 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        if MASKED:
            x = tl.load(pairs, mask=mask[:, :, None], other=0.0)
        else:
            x = tl.load(pairs)
        return tl.split(x)
    else:
        if MASKED:
            x = tl.load(pointer + offsets, mask=mask, other=0.0)
        else:
            x = tl.load(pointer + offsets)
        x = x.to(tl.float32)
        return x, x


@triton.jit
def store_tile(pointer, offsets, xr, xi, mask, COMPLEX: tl.constexpr, MASKED: tl.constexpr):
    """The inverse of `load_tile`, in the type of the pointer."""
    if COMPLEX:
        pairs = pointer + 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        if MASKED:
            tl.store(pairs, tl.join(xr, xi), mask=mask[:, :, None])
        else:
            tl.store(pairs, tl.join(xr, xi))
    else:
        if MASKED:
            tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty), mask=mask)
        else:
            tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty))


@triton.jit
def load_row(pointer, offsets, mask, COMPLEX: tl.constexpr):
    """One number a channel, as float32."""
    if COMPLEX:
        return tl.load(pointer + 2 * offsets, mask=mask, other=0.0), tl.load(
            pointer + 2 * offsets + 1, mask=mask, other=0.0
        )
    else:
        x = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        return x, x


@triton.jit
def store_row(pointer, offsets, xr, xi, mask, COMPLEX: tl.constexpr):
    """The inverse of `load_row`."""
    if COMPLEX:
        tl.store(pointer + 2 * offsets, xr, mask=mask)
        tl.store(pointer + 2 * offsets + 1, xi, mask=mask)
    else:
        tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def place(channels, segments, BLOCK_C: tl.constexpr):
    """Which channel block, segment and sequence a program has: neighbours in the grid are neighbours in memory."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    block = program % blocks
    program = program // blocks
    # In 64 bits: what is added to it can then be part of the instruction that loads.
    c = (block * BLOCK_C).to(tl.int64) + tl.arange(0, BLOCK_C)
    return c, program % segments, (program // segments).to(tl.int64)


@triton.jit
def covers(steps, inside, EVEN_T: tl.constexpr, EVEN_C: tl.constexpr):
    """Which elements of a tile are there, given which steps and which channels are; tiles may fit exactly."""
    if EVEN_T:
        return inside[None, :]
    elif EVEN_C:
        return steps[:, None]
    else:
        return steps[:, None] & inside[None, :]


@triton.jit
def marked(pointer, t, steps, there, BLOCK_T: tl.constexpr):
    """Which steps of a tile are marked, as a column. Few are gathered into the bits of one number: a register."""
    bytes = tl.load(pointer + t, mask=there, other=0).to(tl.int32)
    if BLOCK_T <= 32:
        bits = tl.sum(bytes << steps, axis=0)
        bytes = (bits >> steps) & 1
    return bytes[:, None] != 0
