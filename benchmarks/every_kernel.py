"""Two training calls of every kernel at a small size: do they agree bit for bit? And a memory checker can watch.

    compute-sanitizer --tool memcheck python benchmarks/every_kernel.py
    compute-sanitizer --tool racecheck python benchmarks/every_kernel.py delta linear

Odd lengths, so that the last chunk is not full; a reset inside a chunk; float32 and bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato import ops
from ostinato.ops import cells

B, T, H, K, V = 2, 131, 2, 64, 32
Made = tuple[Callable[..., Any], tuple[Tensor, ...]]


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def matrices(dtype: torch.dtype) -> tuple[Tensor, ...]:
    keys = F.normalize(torch.randn(B, T, H, K, device="cuda"), dim=-1).to(dtype).requires_grad_()
    decay = F.logsigmoid(torch.randn(B, T, H, device="cuda") + 3).requires_grad_()
    return leaf(B, T, H, K, dtype=dtype), keys, leaf(B, T, H, V, dtype=dtype), decay


def per_channel(decay: Tensor) -> Tensor:
    return decay.detach().unsqueeze(-1).repeat(1, 1, 1, K).requires_grad_()


def delta(dtype: torch.dtype, reset: Tensor, channels: bool = False, writes: int = 1) -> Made:
    q, k, v, g = matrices(dtype)
    k, v = (torch.cat([t.detach()] * writes, 1).requires_grad_() for t in (k, v))
    beta = torch.rand(B, writes * T, H, device="cuda").requires_grad_()
    g = per_channel(g) if channels else g
    return lambda *a: ops.delta_rule(*a, reset=reset, normalize=True), (q, k, v, beta, g)


def linear(dtype: torch.dtype, reset: Tensor, channels: bool = False) -> Made:
    q, k, v, g = matrices(dtype)
    return lambda *a: ops.linear_attention(*a, reset=reset), (q, k, v, per_channel(g) if channels else g)


def exponential(dtype: torch.dtype, reset: Tensor) -> Made:
    q, k, v, g = matrices(dtype)
    return lambda *a: ops.exponential_attention(*a, reset=reset), (q, k, v, leaf(B, T, H), g)


def recurrent(dtype: torch.dtype, reset: Tensor, cell: Any) -> Made:
    weight = leaf(cell.gates, H, 32, 32, dtype=dtype)
    weights = (weight, leaf(H, 32, dtype=dtype)) if isinstance(cell, cells.GRU) else (weight,)
    x = leaf(B, T, cell.gates, H, 32, dtype=dtype)
    return lambda x, *w: ops.recurrent_scan(cell, w, x, reset=reset), (x, *weights)


def matrix_cell(dtype: torch.dtype, reset: Tensor) -> Made:
    k, v, weight = leaf(B, T, H, 64, dtype=dtype), leaf(B, T, H, 16, dtype=dtype), leaf(H, 16, 16, dtype=dtype)
    forget = torch.rand(B, T, H, device="cuda").to(dtype).requires_grad_()
    return lambda k, v, f, w: ops.recurrent_scan(cells.M2RNN(), (w,), (k, v, f), reset=reset), (k, v, forget, weight)


def mixer(dtype: torch.dtype, reset: Tensor, name: str) -> Made:
    module = ostinato.mixer(name, 64).cuda()
    return lambda x: module(x, reset=reset), (leaf(B, T, 64),)


def diagonal(dtype: torch.dtype, reset: Tensor) -> Made:
    a = torch.rand(B, T, 100, device="cuda").requires_grad_()
    return lambda a, b: ops.diagonal_scan(a, b, reset=reset), (a, leaf(B, T, 100, dtype=dtype))


def convolution(dtype: torch.dtype, reset: Tensor) -> Made:
    return lambda x, w: ops.short_convolution(x, w, reset=reset), (leaf(B, T, 100, dtype=dtype), leaf(4, 100))


KERNELS: dict[str, Callable[[torch.dtype, Tensor], Made]] = {
    "delta": delta,
    "delta_channels": lambda dtype, reset: delta(dtype, reset, channels=True),
    "delta_two_writes": lambda dtype, reset: delta(dtype, reset, writes=2),
    "linear": linear,
    "linear_channels": lambda dtype, reset: linear(dtype, reset, channels=True),
    "exponential": exponential,
    "diagonal": diagonal,
    "short_convolution": convolution,
    "elman": lambda dtype, reset: recurrent(dtype, reset, cells.Elman()),
    "lstm": lambda dtype, reset: recurrent(dtype, reset, cells.LSTM()),
    "gru": lambda dtype, reset: recurrent(dtype, reset, cells.GRU()),
    "slstm": lambda dtype, reset: recurrent(dtype, reset, cells.SLSTM()),
    "m2rnn": matrix_cell,
    "para_gru": lambda dtype, reset: mixer(dtype, reset, "para_gru"),
    "para_lstm": lambda dtype, reset: mixer(dtype, reset, "para_lstm"),
}


def training_call(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and gradients."""
    found = function(*arguments)
    outputs = found[0] if isinstance(found, tuple) else found
    cotangent = torch.linspace(-1, 1, outputs.numel(), device=outputs.device, dtype=outputs.dtype).view_as(outputs)
    return [outputs, *torch.autograd.grad(outputs, arguments, cotangent)]


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    reset = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    reset[0, 70] = reset[1, 0] = True
    for name in names or KERNELS:
        for dtype in (torch.float32, torch.bfloat16):
            function, arguments = KERNELS[name](dtype, reset)
            first = training_call(function, arguments)
            same = all(map(torch.equal, first, training_call(function, arguments)))
            finite = all(bool(tensor.isfinite().all()) for tensor in first)
            print(
                f"{name}, {dtype}: {'the same twice' if same else 'DIFFERENT'}, {'' if finite else 'NOT '}finite",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
