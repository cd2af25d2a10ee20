"""What the kernels of a single step share: how they follow one another, and how x enters a product.

A step of a small batch is a chain of short kernels, each of which waits for the one before it. On Hopper and later,
within `ostinato.ops.chained`, a kernel is started while the one before it still runs (programmatic dependent launch):
it asks for its weights and its state, and only then waits for what the other one writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.chained import in_chain
from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton.launch import INTERPRETED, card, cdiv, power_of_two, tensors_in

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    DEPENDENT = not INTERPRETED
except ImportError:  # an older Triton
    DEPENDENT = False

EARLY = True
"""Whether a kernel lets the next one start before its own wait, so that several stand in line, or after it."""
BYTES = 12288
"""Of weights, that a program of a product reads at most, if that leaves enough programs."""
PROGRAMS = 264
"""Two for each processor of an H100: a product is not cut into fewer as long as there are rows."""
THREAD_BYTES = 128
"""Of weights, that a thread reads: it asks for all of them at once."""
LARGEST_BATCH = 8
WIDEST = 16384


def dependent(device: torch.device) -> dict[str, Any]:
    """How a kernel of a step is launched on this device."""
    if DEPENDENT and in_chain() and device.type == "cuda" and card(device).capability >= (9, 0):
        return {"DEPENDENT": 2 if EARLY else 1, "launch_pdl": True}
    return {"DEPENDENT": 0}


def tile(rows: int, inputs: int, size: int, matrices: int = 1) -> tuple[int, int]:
    """Rows of a program and its warps, for products with `matrices` weights of `size` bytes an element."""
    block, row = 16, inputs * size * matrices
    while block > 1 and (block * row > BYTES or cdiv(rows, block) < PROGRAMS):
        block //= 2
    return block, min(8, power_of_two(max(1, block * row // (32 * THREAD_BYTES))))


def refusal(arguments: Any, x: Tensor) -> str | None:
    """Why no kernel of a step can take these arguments, or None."""
    if torch.compiler.is_compiling():
        return "the compiler makes kernels of its own"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(arguments)):
        return "this kernel has no derivative"
    for tensor in tensors_in(arguments):
        if accumulation_dtype(tensor.dtype) != torch.float32:
            return f"this kernel computes in float32, not in {tensor.dtype}"
    if len(x) > LARGEST_BATCH:
        return f"this kernel is for batches of at most {LARGEST_BATCH}, not {len(x)}"
    return None


def unfit(weights: tuple[Tensor, ...]) -> str | None:
    """Why these weights cannot be read row by row, or None."""
    if any(weight.dtype != weights[0].dtype for weight in weights):
        return "the weights are of different types"
    if not all(weight.is_contiguous() for weight in weights):
        return "a weight is not contiguous"
    if weights[0].shape[1] > WIDEST:
        return f"this kernel holds rows of at most {WIDEST} elements, not {weights[0].shape[1]}"
    return None


def rows_of(x: Any) -> Any:
    """x, or a copy, with its last axis contiguous; None stays None."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Wait for the kernel before this one, and let the one behind it start: before the wait if DEPENDENT is 2."""
    if DEPENDENT == 2:
        gdc_launch_dependents()
    if DEPENDENT:
        gdc_wait()
    if DEPENDENT == 1:
        gdc_launch_dependents()


@triton.jit
def entering(
    x, gate, scale, place, inside, dim, eps,
    NORM: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """x (groups, dim), gated and to RMS norm 1 per group, times `scale` (dim,), as asked for; in float32."""
    z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        raw = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        opened = tl.sigmoid(raw)
        if SILU:
            opened *= raw
        if FIRST:
            z *= opened
    if NORM:
        z *= tl.rsqrt(tl.sum(z * z, axis=1) / dim + eps)[:, None] * scale[None, :]
    if GATE and not FIRST:
        z *= opened
    return z


@triton.jit
def rows_times(weight, z):
    """Σ over the last two axes of weight (rows, groups, dim) ⊙ z (groups, dim), in float32."""
    return tl.sum(tl.sum(weight.to(tl.float32) * z[None, :, :], axis=2), axis=1)
