"""`swiglu` in Triton: one pass over both inputs forward, one over them and the gradient backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import cdiv, without_second_derivative

_BLOCK = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _forward(gate, value, outputs, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(outputs + place, g * tl.sigmoid(g) * v, mask=inside)


@triton.jit
def _backward(grad, gate, value, grad_gate, grad_value, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(grad_value + place, dy * g * share, mask=inside)
    tl.store(grad_gate + place, dy * v * share * (1 + g * (1 - share)), mask=inside)


@torch.library.custom_op("ostinato::swiglu", mutates_args=())
def gated(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) ⊙ value; see `ostinato.ops.swiglu`."""
    outputs = torch.empty_like(gate, memory_format=torch.contiguous_format)
    size = gate.numel()
    _forward[(cdiv(size, _BLOCK),)](gate.contiguous(), value.contiguous(), outputs, size, BLOCK=_BLOCK, num_warps=8)
    return outputs


@gated.register_fake
def _(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("ostinato::swiglu_backward", mutates_args=())
def gated_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and value."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate, value)]
    size = gate.numel()
    _backward[(cdiv(size, _BLOCK),)](
        grad.contiguous(), gate.contiguous(), value.contiguous(), *grads, size, BLOCK=_BLOCK, num_warps=8
    )
    return grads[0], grads[1]


@gated_backward.register_fake
def _(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate, value))
    return first, second


without_second_derivative(gated_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_value = call_once(gated_backward, grad, *ctx.saved_tensors)
    return of_gate, of_value


gated.register_autograd(_gradients, setup_context=_setup)
_gated = eagerly(gated, _setup, _gradients)


def refuses(gate: Tensor, value: Tensor) -> str | None:
    """Why this call cannot be served, or None."""
    for tensor in (gate, value):
        if tensor.dtype not in _DTYPES:
            return f"this kernel computes in float32, not in {tensor.dtype}"
    return "there is nothing to compute" if gate.numel() == 0 else None


def declines(*_: Any) -> str | None:
    """Where torch.compile generates code: it joins what is written here with what stands before and after it."""
    return "the compiler makes a kernel of its own" if torch.compiler.is_compiling() else None


def run(gate: Tensor, value: Tensor) -> Tensor:
    """The route."""
    result: Tensor = _gated(gate, value)
    return result
