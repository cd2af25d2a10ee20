"""`rms_norm` in Triton, with its sum and its gate: one pass over memory forward, one backward.

A program holds whole rows. Backward it goes through many of them and keeps the gradient of the weight, which PyTorch
then sums over programs: in the same order every time. What the formula needs besides its inputs is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import card, cdiv, power_of_two, without_second_derivative

_ELEMENTS, _WIDEST = 2048, 16384
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def opened(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    open_gate = tl.sigmoid(gate)
    if SILU:
        return gate * open_gate, open_gate * (1 + gate * (1 - open_gate))
    return open_gate, open_gate * (1 - open_gate)


@triton.jit
def _forward(
    x, branch, gate, weight, outputs, total, rows, dim, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    place = row.to(tl.int64)[:, None] * dim + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        value += tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is that of the sum which goes on, and which the backward pass reads
    if GATE:
        open_gate, _ = opened(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), SILU)
        if FIRST:
            value = value * open_gate
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / dim + eps)
    y = value * scale[:, None] * tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    if GATE and not FIRST:
        y = y * open_gate
    tl.store(outputs + place, y, mask=inside)


@triton.jit
def _backward(
    grad, grad_total, total, gate, weight, grad_x, grad_branch, grad_gate, partial, rows, dim, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, DIM)
    wide = column < dim
    w = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, DIM), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & wide[None, :]
        place = row.to(tl.int64)[:, None] * dim + column[None, :]
        value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normed = value
        if GATE:
            open_gate, slope = opened(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), SILU)
            if FIRST:
                normed = value * open_gate
        scale = tl.rsqrt(tl.sum(normed * normed, axis=1) / dim + eps)[:, None]
        normed = normed * scale
        if GATE and not FIRST:
            tl.store(grad_gate + place, dy * normed * w * slope, mask=inside)
            dy = dy * open_gate
        of_weight += dy * normed
        # y = n w with n = u / √(mean u² + eps): du = (dn − n mean(dn n)) / √(mean u² + eps).
        dn = dy * w
        dx = scale * (dn - normed * (tl.sum(dn * normed, axis=1) / dim)[:, None])
        if GATE and FIRST:
            tl.store(grad_gate + place, dx * value * slope, mask=inside)
            dx = dx * open_gate
        if BRANCH:
            dx += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_branch + place, dx, mask=inside)
        tl.store(grad_x + place, dx, mask=inside)
    tl.store(partial + tl.program_id(0) * dim + column, tl.sum(of_weight, axis=0), mask=wide)


def _tile(dim: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: sixteen elements a thread, which leaves room for five tiles of them."""
    columns = power_of_two(dim)
    return max(1, _ELEMENTS // columns), columns, min(16, max(4, columns // 512))


def _or_nothing(x: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """Room for a tensor like x, or an empty one: operators return tensors."""
    return torch.empty(x.shape if wanted else (0,), dtype=dtype, device=x.device)


def _forward_outputs(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    widest = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    return _or_nothing(x, True, dtype), _or_nothing(x, branch is not None, widest)


@torch.library.custom_op("ostinato::rms_norm", mutates_args=())
def normalize(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    silu: bool,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y, and x + branch (empty without a branch); see `ostinato.ops.normalization`."""
    outputs, total = _forward_outputs(x, branch, dtype)
    dim = x.shape[-1]
    rows, (block, columns, warps) = x.numel() // dim, _tile(dim)
    _forward[(cdiv(rows, block),)](
        x.contiguous(), None if branch is None else branch.contiguous(), None if gate is None else gate.contiguous(),
        weight.contiguous(), outputs, total, rows, dim, eps, BRANCH=branch is not None, GATE=gate is not None,
        SILU=silu, FIRST=gate_first, ROWS=block, DIM=columns, num_warps=warps,
    )  # fmt: skip
    return outputs, total


@normalize.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    silu: bool,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x, branch, dtype)


def _backward_outputs(
    total: Tensor, x_dtype: torch.dtype, branch_dtype: torch.dtype | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    branched = branch_dtype is not None
    return (
        _or_nothing(total, True, x_dtype),
        _or_nothing(total, branched, branch_dtype or x_dtype),
        _or_nothing(total, gate is not None, x_dtype if gate is None else gate.dtype),
    )


@torch.library.custom_op("ostinato::rms_norm_backward", mutates_args=())
def normalize_backward(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    silu: bool,
    gate_first: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, branch, gate (empty where there is none) and weight."""
    outputs = _backward_outputs(total, x_dtype, branch_dtype, gate)
    dim = total.shape[-1]
    rows, (block, columns, warps) = total.numel() // dim, _tile(dim)
    programs = min(cdiv(rows, block), 4 * card(total.device).processors)
    partial = torch.empty(programs, dim, dtype=torch.float32, device=total.device)
    _backward[(programs,)](
        grad.contiguous(), grad_total.contiguous(), total.contiguous(), None if gate is None else gate.contiguous(),
        weight.contiguous(), *outputs, partial, rows, dim, eps, BRANCH=branch_dtype is not None, GATE=gate is not None,
        SILU=silu, FIRST=gate_first, ROWS=block, DIM=columns, num_warps=warps,
    )  # fmt: skip
    return *outputs, partial.sum(0).to(weight.dtype)


@normalize_backward.register_fake
def _(
    grad: Tensor,
    grad_total: Tensor,
    total: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    silu: bool,
    gate_first: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_backward_outputs(total, x_dtype, branch_dtype, gate), torch.empty_like(weight)


without_second_derivative(normalize_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, weight, eps, silu, gate_first, _ = inputs
    ctx.save_for_backward(x if branch is None else output[1], gate, weight)
    ctx.options = (eps, silu, gate_first, x.dtype, None if branch is None else branch.dtype)


def _gradients(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, gate, weight = ctx.saved_tensors
    of_x, of_branch, of_gate, of_weight = call_once(
        normalize_backward, grad, grad_total, total, gate, weight, *ctx.options
    )
    branched = ctx.options[-1] is not None
    return of_x, of_branch if branched else None, None if gate is None else of_gate, of_weight, *[None] * 4


normalize.register_autograd(_gradients, setup_context=_setup)
_normalize = eagerly(normalize, _setup, _gradients)


def refuses(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    dtype: torch.dtype,
) -> str | None:
    """Why this call cannot be served, or None."""
    for found in (dtype, *(tensor.dtype for tensor in (x, branch, gate, weight) if tensor is not None)):
        if found not in _DTYPES:
            return f"this kernel computes in float32, not in {found}"
    if x.shape[-1] > _WIDEST:
        return f"this kernel holds rows of at most {_WIDEST} elements, not {x.shape[-1]}"
    return "there is nothing to compute" if x.numel() == 0 else None


def declines(*_: Any) -> str | None:
    """Where torch.compile generates code: it joins what is written here with what stands before and after it."""
    return "the compiler makes a kernel of its own" if torch.compiler.is_compiling() else None


def run(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The route."""
    y, total = _normalize(x, branch, gate, weight, eps, activation == "silu", gate_first, dtype)
    return y, x if branch is None else total
