"""What the walks of `linear_attention` share: which part is a program's, and where its chunks, tiles and state lie."""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import load_tile, store_tile


@triton.jit
def role_of_program(heads, VALUE_DIM: tl.constexpr, BV: tl.constexpr):
    """Block of value channels, sequence (one of batch · heads), its batch and its head."""
    blocks = (VALUE_DIM + BV - 1) // BV
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    return program % blocks, sequence, sequence // heads, sequence % heads


@triton.jit
def chunk_start(index, count, first, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """The first step of the chunk that a walk over `count` chunks from number `first` comes to at `index`."""
    if REVERSE:
        return (first + count - 1 - index) * ROWS
    else:
        return (first + index) * ROWS


@triton.jit
def held_state(
    initial,
    where,
    first,
    by_key,
    by_value,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """State number `where`, value channels from `first`, or zeros; its offsets in memory, and which of them exist.

    Key and value channels are `by_key` and `by_value` numbers apart.
    """
    value = first + tl.arange(0, BV)
    key = tl.arange(0, BK)
    inside = (key < KEY_DIM)[:, None] & (value < VALUE_DIM)[None, :]
    place = where * (KEY_DIM * VALUE_DIM) + (key[:, None] * by_key + value[None, :] * by_value)
    if INITIAL:
        state = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], dtype=tl.float32)
    return state, place, inside


@triton.jit
def read_by_last(state, last_reader, sequence, KEY_DIM: tl.constexpr, BK: tl.constexpr):
    """What the last step reads of `state`, the last one's gradient."""
    key = tl.arange(0, BK)
    reader = tl.load(last_reader + sequence * KEY_DIM + key, mask=key < KEY_DIM, other=0.0)
    return tl.sum(state * reader.to(tl.float32)[:, None], axis=0)


@triton.jit
def tile(
    base,
    start,
    stride,
    time,
    column,
    batch,
    head,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIED: tl.constexpr,
):
    """A tile of a sequence, from a pointer to the head's first step, or (COPIED) from a descriptor of all."""
    if COPIED:
        at = [batch.to(tl.int32), start, (head * WIDTH).to(tl.int32) + column]
        return base.load(at).reshape(ROWS, COLUMNS)
    else:
        return load_tile(base, start, stride, time, column, WIDTH, ROWS, COLUMNS)


@triton.jit
def put(
    base,
    start,
    stride,
    time,
    column,
    batch,
    head,
    what,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIED: tl.constexpr,
):
    """The inverse of `tile`."""
    if COPIED:
        at = [batch.to(tl.int32), start, (head * WIDTH).to(tl.int32) + column]
        base.store(at, what.to(base.dtype).reshape(1, ROWS, COLUMNS))
    else:
        store_tile(base, start, stride, time, column, what, WIDTH, ROWS, COLUMNS)
