"""`delta_step` in Triton: a step of the delta rule with its gates and unit lengths, the memory in place, in one launch.

A program owns some value columns of one head's memory, which it asks for before queries, keys and values are there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.kernels.triton.launch import cdiv, power_of_two
from ostinato.ops.kernels.triton.matrix_step import unit
from ostinato.ops.kernels.triton.step_parts import begin, dependent, refusal

COLUMNS, WARPS = 8, 2
LARGEST_KEY = 512


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + u), u = exp(−|x|), where u keeps its digits beside the 1 (Kahan's correction)."""
    u = tl.exp(-tl.abs(x))
    above = 1.0 + u
    return tl.maximum(x, 0.0) + tl.where(above == 1.0, u, tl.log(above) * (u / (above - 1.0)))


@triton.jit
def _delta(
    queries, keys, values, rates, steps, log_rate, step_bias, memory, outputs,
    q_row, k_row, v_row, rate_row, step_row, largest_rate, scale,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WRITES: tl.constexpr, DECAY: tl.constexpr,
    UNIT: tl.constexpr, DEPENDENT: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    k_index, v_index = tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    k_mask, v_mask = k_index < KEY_DIM, v_index < VALUE_DIM
    cell = memory + pair * KEY_DIM * VALUE_DIM + k_index[:, None] * VALUE_DIM + v_index[None, :]
    cell_mask = k_mask[:, None] & v_mask[None, :]
    held = tl.load(cell, mask=cell_mask, other=0.0).to(tl.float32)
    if DECAY:
        speed = -tl.exp(tl.load(log_rate + head).to(tl.float32))
        offset = tl.load(step_bias + head).to(tl.float32)
    begin(DEPENDENT)
    query = tl.load(queries + batch * q_row + head * KEY_DIM + k_index, mask=k_mask, other=0.0).to(tl.float32)
    if UNIT:
        query = unit(query, queries.dtype.element_ty)
    if DECAY:
        raw = tl.load(steps + batch * step_row + head).to(tl.float32) + offset
        held *= tl.exp(speed * softplus(raw))
    for write in tl.static_range(WRITES):
        at = write * HEADS + head
        key = tl.load(keys + batch * k_row + at * KEY_DIM + k_index, mask=k_mask, other=0.0).to(tl.float32)
        value = tl.load(values + batch * v_row + at * VALUE_DIM + v_index, mask=v_mask, other=0.0).to(tl.float32)
        opened = tl.sigmoid(tl.load(rates + batch * rate_row + at).to(tl.float32))
        rate = (opened.to(rates.dtype.element_ty).to(tl.float32) * largest_rate).to(rates.dtype.element_ty)
        if UNIT:
            key = unit(key, keys.dtype.element_ty)
        found = tl.sum(key[:, None] * held, axis=0)
        held += key[:, None] * (rate.to(tl.float32) * (value - found))[None, :]
    read = tl.sum(query[:, None] * held, axis=0).to(outputs.dtype.element_ty).to(tl.float32)
    tl.store(outputs + pair * VALUE_DIM + v_index, read * scale, mask=v_mask)
    tl.debug_barrier()  # in place: nobody reads any more
    tl.store(cell, held, mask=cell_mask)


def refuses(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    steps: Tensor | None,
    log_rate: Tensor | None,
    step_bias: Tensor | None,
    memory: Tensor,
    *_: object,
) -> str | None:
    """Why this call cannot be served, or None."""
    if reason := refusal((queries, keys, values, rates, steps, log_rate, step_bias, memory), queries):
        return reason
    if not memory.is_contiguous():
        return "the memory is not contiguous"
    if queries.shape[-1] > LARGEST_KEY:
        return f"this kernel holds keys of at most {LARGEST_KEY} channels, not {queries.shape[-1]}"
    return None


def declines(*_: object) -> str | None:
    """Never: it is the best where it can run."""
    return None


def _rows(x: Tensor) -> Tensor:
    """x, or a copy, in which the channels of one row of the batch stand side by side."""
    return x if x[0].is_contiguous() else x.contiguous()


def run(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    steps: Tensor | None,
    log_rate: Tensor | None,
    step_bias: Tensor | None,
    memory: Tensor,
    largest_rate: float,
    unit: bool,
    scale: float,
) -> Tensor:
    """The route."""
    batch, heads, key_dim = queries.shape
    writes, value_dim = keys.shape[1], values.shape[-1]
    outputs = torch.empty(batch, heads, value_dim, dtype=queries.dtype, device=queries.device)
    queries, keys, values, rates = _rows(queries), _rows(keys), _rows(values), _rows(rates)
    steps = None if steps is None else _rows(steps)
    columns = min(COLUMNS, power_of_two(value_dim))
    _delta[(batch * heads, cdiv(value_dim, columns))](
        queries, keys, values, rates, steps, log_rate, step_bias, memory, outputs, queries.stride(0), keys.stride(0),
        values.stride(0), rates.stride(0), 0 if steps is None else steps.stride(0), largest_rate, scale,
        HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, WRITES=writes, DECAY=steps is not None, UNIT=unit,
        K=power_of_two(key_dim), V=columns, num_warps=WARPS, **dependent(queries.device),
    )  # fmt: skip
    return outputs
