"""`linear_step` in Triton: a product with a few vectors, with the norm before it and the sum behind it, in one launch.

A program owns some rows of the weight and asks for all of them at once, before it knows x; the norm of x it
computes for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.kernels.triton.launch import cdiv, power_of_two
from ostinato.ops.kernels.triton.step_parts import (
    begin,
    dependent,
    entering,
    refusal,
    rows_of,
    rows_times,
    tile,
    unfit,
)


@triton.jit
def _linear(
    x, gate, norm, first, second, residual, outputs, entered, x_row, gate_row, residual_row, entered_row, eps,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, PAIRED: tl.constexpr,
    RESIDUAL: tl.constexpr, ENTERED: tl.constexpr, DEPENDENT: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, element = tl.arange(0, G), tl.arange(0, D)
    there = row < OUTPUTS
    place = group[:, None] * DIM + element[None, :]
    inside = (group < GROUPS)[:, None] & (element < DIM)[None, :]
    cell = row[:, None, None] * (GROUPS * DIM) + place[None, :, :]
    wanted = there[:, None, None] & inside[None, :, :]
    weight = tl.load(first + cell, mask=wanted, other=0.0)
    if PAIRED:
        other = tl.load(second + cell, mask=wanted, other=0.0)
    scale = element.to(tl.float32)
    if NORM:
        scale = tl.load(norm + element, mask=element < DIM, other=0.0).to(tl.float32)
    begin(DEPENDENT)
    for batch in tl.static_range(BATCH):
        z = entering(
            x + batch * x_row, gate + batch * gate_row if GATE else gate, scale, place, inside, DIM, eps,
            NORM, GATE, SILU, FIRST,
        )  # fmt: skip
        rounded = z.to(first.dtype.element_ty)  # what a product of its own would read
        z = rounded.to(tl.float32)
        if ENTERED:  # noqa: SIM102 (one is known when this is compiled, the other is not)
            if tl.program_id(0) == 0:
                tl.store(entered + batch * entered_row + place, rounded, mask=inside)
        y = rows_times(weight, z).to(first.dtype.element_ty).to(tl.float32)
        if PAIRED:
            y = y * tl.sigmoid(y) * rows_times(other, z).to(first.dtype.element_ty).to(tl.float32)
        if RESIDUAL:
            y += tl.load(residual + batch * residual_row + row, mask=there, other=0.0).to(tl.float32)
        tl.store(outputs + batch * OUTPUTS + row, y, mask=there)


def refuses(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    entered: Tensor | None,
) -> str | None:
    """Why this call cannot be served, or None."""
    if entered is not None and entered.stride(-1) != 1:
        return "what z is written into is not contiguous"
    return refusal((x, weights, norm, gate, residual, entered), x) or unfit(weights)


def declines(*_: object) -> str | None:
    """Never: it is the best where it can run."""
    return None


def run(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    entered: Tensor | None,
) -> Tensor:
    """The route."""
    (batch, inputs), outputs = x.shape, weights[0].shape[0]
    dim = inputs if norm is None else len(norm)
    dtype = weights[0].dtype if residual is None else torch.promote_types(weights[0].dtype, residual.dtype)
    y = torch.empty(batch, outputs, dtype=dtype, device=x.device)
    x, gate, residual = rows_of(x), rows_of(gate), rows_of(residual)
    rows, warps = tile(outputs, inputs, weights[0].element_size(), len(weights))
    _linear[(cdiv(outputs, rows),)](
        x, gate, None if norm is None else norm.contiguous(), weights[0], weights[-1], residual, y, entered,
        *(0 if tensor is None else tensor.stride(0) for tensor in (x, gate, residual, entered)), eps,
        OUTPUTS=outputs, GROUPS=inputs // dim, DIM=dim, NORM=norm is not None, GATE=gate is not None,
        SILU=activation == "silu", FIRST=gate_first, PAIRED=len(weights) == 2, RESIDUAL=residual is not None,
        ENTERED=entered is not None, BATCH=batch, ROWS=rows, G=power_of_two(inputs // dim), D=power_of_two(dim),
        num_warps=warps, **dependent(x.device),
    )  # fmt: skip
    return y
