"""One step of a matrix memory in one launch: what streaming runs on a GPU, for three engines.

    S' = exp(g) S;   n times: S' ← S' − β e (rᵀ S') + β k vᵀ   (or, without correction, S' ← S' + k vᵀ);   y = S'ᵀ q

`linear_attention` and `delta_rule` are this; `exponential_attention` adds its running maximum and normaliser. A
program owns some value columns of one head's memory: it reads them once and writes them once. No derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.exponential_attention import ExponentialState
from ostinato.ops.kernels.triton.launch import cdiv, power_of_two, tensors_in

_COLUMNS = 32


@triton.jit
def unit(vector, dtype: tl.constexpr):
    """The vector by its length, as `unit_length` has it; rounded to `dtype`, as a tensor of its own would be."""
    return (vector * tl.rsqrt(tl.sum(vector * vector, axis=0) + 1e-6)).to(dtype).to(tl.float32)


@triton.jit
def _step(
    queries, keys, values, beta, log_decay, state, reads, erases, reset, outputs, after,
    heads, key_dim, value_dim,
    DECAY: tl.constexpr, WRITES: tl.constexpr, CORRECTS: tl.constexpr, BETA: tl.constexpr, OTHER_READ: tl.constexpr,
    OTHER_ERASE: tl.constexpr, UNIT: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    k_index, v_index = tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    k_mask, v_mask = k_index < key_dim, v_index < value_dim
    cell = row * key_dim * value_dim + k_index[:, None] * value_dim + v_index[None, :]
    cell_mask = k_mask[:, None] & v_mask[None, :]
    if STATE:
        memory = tl.load(state + cell, mask=cell_mask, other=0.0).to(tl.float32)
        if RESET:
            memory = tl.where(tl.load(reset + batch), 0.0, memory)
    else:
        memory = tl.zeros((K, V), tl.float32)
    if DECAY == 1:
        memory *= tl.exp(tl.load(log_decay + row).to(tl.float32))
    if DECAY == 2:
        memory *= tl.exp(tl.load(log_decay + row * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32))[:, None]
    for write in tl.static_range(WRITES):
        at = (batch * WRITES + write) * heads + head
        key = tl.load(keys + at * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
        if UNIT:
            key = unit(key, keys.dtype.element_ty)
        value = tl.load(values + at * value_dim + v_index, mask=v_mask, other=0.0).to(tl.float32)
        rate = 1.0
        if BETA:
            rate = tl.load(beta + at).to(tl.float32)
        value *= rate
        if CORRECTS:
            read, erase = key, key
            if OTHER_READ:
                read = tl.load(reads + at * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
            if OTHER_ERASE:
                erase = tl.load(erases + at * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
            removed = rate * tl.sum(read[:, None] * memory, axis=0)
            memory -= erase[:, None] * removed[None, :]
        memory += key[:, None] * value[None, :]
    query = tl.load(queries + row * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
    if UNIT:
        query = unit(query, queries.dtype.element_ty)
    tl.store(outputs + row * value_dim + v_index, tl.sum(query[:, None] * memory, axis=0), mask=v_mask)
    tl.store(after + cell, memory, mask=cell_mask)


@torch.library.custom_op("ostinato::matrix_step", mutates_args=())
def matrix_step(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_keys: Tensor | None,
    erase_keys: Tensor | None,
    reset: Tensor | None,
    corrects: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence at the head of this file; arguments as those of `delta_rule` for one token.

    With `normalize`, of queries and keys of unit length.
    """
    batch, _, heads, key_dim = queries.shape
    writes, value_dim = keys.shape[1], values.shape[-1]
    arguments = (queries, keys, values, beta, log_decay, state, read_keys, erase_keys, reset)
    given = [argument if argument is None else argument.contiguous() for argument in arguments]
    outputs = queries.new_empty(batch, 1, heads, value_dim)
    after = queries.new_empty(batch, heads, key_dim, value_dim, dtype=torch.float32)
    columns = min(_COLUMNS, power_of_two(value_dim))
    _step[(batch * heads, cdiv(value_dim, columns))](
        *given, outputs, after, heads, key_dim, value_dim,
        DECAY=0 if log_decay is None else log_decay.ndim - 2, WRITES=writes, CORRECTS=corrects,
        BETA=beta is not None, OTHER_READ=read_keys is not None, OTHER_ERASE=erase_keys is not None,
        UNIT=normalize, STATE=state is not None, RESET=reset is not None, K=power_of_two(key_dim), V=columns,
        num_warps=4,
    )  # fmt: skip
    return outputs, after


@matrix_step.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_keys: Tensor | None,
    erase_keys: Tensor | None,
    reset: Tensor | None,
    corrects: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    outputs = queries.new_empty(batch, 1, heads, value_dim)
    return outputs, queries.new_empty(batch, heads, key_dim, value_dim, dtype=torch.float32)


@triton.jit
def _exponential_step(
    queries, keys, values, log_input, log_forget, memory, normalizer, maximum, reset,
    outputs, memory_after, normalizer_after, maximum_after, heads, key_dim, value_dim, eps,
    STATE: tl.constexpr, RESET: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k_index, v_index = tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    k_mask, v_mask = k_index < key_dim, v_index < value_dim
    cell = row * key_dim * value_dim + k_index[:, None] * value_dim + v_index[None, :]
    cell_mask = k_mask[:, None] & v_mask[None, :]
    if STATE:
        held = tl.load(memory + cell, mask=cell_mask, other=0.0).to(tl.float32)
        sums = tl.load(normalizer + row * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
        before = tl.load(maximum + row).to(tl.float32)
        if RESET:
            new = tl.load(reset + row // heads)
            held, sums, before = tl.where(new, 0.0, held), tl.where(new, 0.0, sums), tl.where(new, 0.0, before)
    else:
        held, sums, before = tl.zeros((K, V), tl.float32), tl.zeros((K,), tl.float32), 0.0
    raw_input = tl.load(log_input + row).to(tl.float32)
    carried = tl.load(log_forget + row).to(tl.float32) + before
    largest = tl.maximum(carried, raw_input)
    keep = tl.exp(carried - largest)
    key = tl.load(keys + row * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
    key *= tl.exp(raw_input - largest)
    value = tl.load(values + row * value_dim + v_index, mask=v_mask, other=0.0).to(tl.float32)
    held = keep * held + key[:, None] * value[None, :]
    sums = keep * sums + key
    query = tl.load(queries + row * key_dim + k_index, mask=k_mask, other=0.0).to(tl.float32)
    numerator, denominator = tl.sum(query[:, None] * held, axis=0), tl.sum(query * sums, axis=0)
    # Everything times exp(min(m, 0)), so that exp(−m) cannot overflow.
    shift = tl.minimum(largest, 0.0)
    scale = tl.exp(shift)
    bound = tl.maximum(tl.abs(denominator) * scale, tl.exp(shift - largest)) + eps * scale
    tl.store(outputs + row * value_dim + v_index, numerator * (scale / bound), mask=v_mask)
    tl.store(memory_after + cell, held, mask=cell_mask)
    if tl.program_id(1) == 0:
        tl.store(normalizer_after + row * key_dim + k_index, sums, mask=k_mask)
        tl.store(maximum_after + row, largest)


@torch.library.custom_op("ostinato::exponential_step", mutates_args=())
def exponential_step(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor | None,
    normalizer: Tensor | None,
    maximum: Tensor | None,
    reset: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of `exponential_attention`: h, and the state's three parts."""
    batch, _, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    arguments = (queries, keys, values, log_input, log_forget, memory, normalizer, maximum, reset)
    given = [argument if argument is None else argument.contiguous() for argument in arguments]
    made = _exponential_parts(queries, values)
    columns = min(_COLUMNS, power_of_two(value_dim))
    _exponential_step[(batch * heads, cdiv(value_dim, columns))](
        *given, *made, heads, key_dim, value_dim, eps,
        STATE=memory is not None, RESET=reset is not None, K=power_of_two(key_dim), V=columns, num_warps=4,
    )  # fmt: skip
    return made


def _exponential_parts(queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    return (
        queries.new_empty(batch, 1, heads, value_dim),
        queries.new_empty(batch, heads, key_dim, value_dim, dtype=torch.float32),
        queries.new_empty(batch, heads, key_dim, dtype=torch.float32),
        queries.new_empty(batch, heads, dtype=torch.float32),
    )


@exponential_step.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor | None,
    normalizer: Tensor | None,
    maximum: Tensor | None,
    reset: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _exponential_parts(queries, values)


def refuses(queries: Tensor, *rest: Any) -> str | None:
    """Why this call is not one step without derivatives, or None."""
    if queries.shape[1] != 1:
        return "this kernel makes one step"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in((queries, *rest))):
        return "this kernel has no derivative"
    if accumulation_dtype(queries.dtype) != torch.float32:
        return f"this kernel computes in float32, not in {queries.dtype}"
    return None


def run_linear_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` for one token."""
    return matrix_step(queries, keys, values, None, log_decay, state, None, None, reset, False, False)


def run_delta_rule(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_keys: Tensor | None,
    erase_keys: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` for one token."""
    return matrix_step(queries, keys, values, beta, log_decay, state, read_keys, erase_keys, reset, True, normalize)


def run_exponential_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    state: ExponentialState | None,
    reset: Tensor | None,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, ExponentialState]:
    """`exponential_attention` for one token."""
    parts = (None, None, None) if state is None else tuple(state)
    outputs, *after = exponential_step(queries, keys, values, log_input, log_forget, *parts, reset, eps)
    return outputs, ExponentialState(*after)
