"""M²RNN in Triton: what its kernels, in `recurrent_scan_matrix_kernels`, are handed, and the operator of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato.ops.cells import M2RNN, Inputs, Memory, Weights
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import cdiv, power_of_two, without_second_derivative
from ostinato.ops.kernels.triton.recurrent_scan_matrix_kernels import backward_kernel, forward_kernel

# Columns of a matrix that stay on chip with its weights: in half precision, and in float32, where the products are made
# of many more instructions.
_MOST_COLUMNS = {2: 64, 4: 32}


def refuses(weights: Weights, inputs: Inputs) -> str | None:
    """Why the kernels cannot serve a call."""
    value, most = inputs[1].shape[-1], _MOST_COLUMNS[inputs[0].element_size()]
    if value > most:
        return (
            f"the {value} columns of a head's matrix in {inputs[0].dtype} do not stay on chip with its weights: at "
            f"most {most} do; use more heads"
        )
    return None


def run(cell: M2RNN, weights: Weights, inputs: Inputs, state: Any, reset: Tensor | None) -> tuple[Tensor, Memory]:
    """The route for M²RNN."""
    keys, values, forget = inputs
    start = cell.initial_state(tuple(part[:, 0] for part in inputs)) if state is None else state
    outputs, last = _scan(weights[0], keys, values, forget, start[0].float(), reset, cell.gradient_clip)
    return outputs, Memory(last)


def _constants(keys: Tensor, values: Tensor, reset: Tensor | None) -> dict[str, Any]:
    key, value = keys.shape[-1], values.shape[-1]
    v = power_of_two(max(value, 16))
    # One warp for a program, or four that share the weights where these are large.
    rows = min(power_of_two(max(key, 16)), 32 if v <= 32 else 64)
    half = keys.dtype != torch.float32
    constants = {
        "KEY": key,
        "VALUE": value,
        "ROWS": rows,
        "V": v,
        "RESET": reset is not None,
        "PRECISE": keys.dtype == torch.float32,
        "num_warps": max(1, rows * v // 1024),
        "num_stages": 1,
        "STAGES": 3,
        "HALF": half,
    }
    if half and rows * v <= 512:
        # Three such warps fit a quarter of a multiprocessor. One register more for each thread, and it would be two: a
        # card's worth of programs then takes two turns (backward 4.9 ms instead of 3.4, 672 heads of 64 × 16).
        constants["maxnreg"] = 168
    return constants


@torch.library.custom_op("ostinato::m2rnn", mutates_args=())
def forward(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    start: Tensor,
    reset: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (batch, time, heads, key, value) in the type of the keys, and the last state in float32."""
    keys, values = keys.contiguous(), values.contiguous()
    batch, time, heads, _ = keys.shape
    outputs, last = _empty(keys, values, start)
    constants = _constants(keys, values, reset)
    forward_kernel[(heads, batch, cdiv(keys.shape[-1], constants["ROWS"]))](
        keys,
        values,
        forget.contiguous(),
        weight.contiguous(),
        start.contiguous(),
        keys if reset is None else reset.contiguous(),
        outputs,
        last,
        time,
        heads,
        TWO=keys.dtype == torch.float16,
        **constants,
    )
    return outputs, last


def _empty(keys: Tensor, values: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty(*keys.shape, values.shape[-1]), start.new_empty(start.shape)


@forward.register_fake
def _(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    start: Tensor,
    reset: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    return _empty(keys, values, start)


@torch.library.custom_op("ostinato::m2rnn_backward", mutates_args=())
def backward(
    grad_outputs: Tensor,
    grad_last: Tensor,
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    start: Tensor,
    reset: Tensor | None,
    outputs: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """∂W in float32; ∂k, ∂v, ∂f in their types; ∂start."""
    keys, values, forget = keys.contiguous(), values.contiguous(), forget.contiguous()
    batch, time, heads, _ = keys.shape
    constants = _constants(keys, values, reset)
    groups = cdiv(keys.shape[-1], constants["ROWS"])
    d_keys, d_start = torch.empty_like(keys), start.new_empty(start.shape)
    d_values, d_forget = (
        x.new_empty(groups, *x.shape, dtype=x.dtype if groups == 1 else torch.float32) for x in (values, forget)
    )
    d_weight = start.new_empty(groups, batch, *weight.shape)
    backward_kernel[(heads, batch, groups)](
        keys,
        values,
        forget,
        weight.contiguous(),
        start.contiguous(),
        keys if reset is None else reset.contiguous(),
        outputs,
        grad_outputs.contiguous(),
        grad_last.contiguous(),
        d_keys,
        d_values,
        d_forget,
        d_weight,
        d_start,
        time,
        heads,
        0.0 if clip is None else float(clip),
        CLIP=clip is not None,
        **constants,
    )
    d_values, d_forget = (
        d[0] if groups == 1 else d.sum(0).to(x.dtype) for d, x in ((d_values, values), (d_forget, forget))
    )
    return d_weight.sum((0, 1)), d_keys, d_values, d_forget, d_start


@backward.register_fake
def _(
    grad_outputs: Tensor,
    grad_last: Tensor,
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    start: Tensor,
    reset: Tensor | None,
    outputs: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        start.new_empty(weight.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        forget.new_empty(forget.shape),
        start.new_empty(start.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.clip = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])


def _differentiate(ctx: Any, grad_outputs: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    weight, keys, values, forget, start, reset, outputs = ctx.saved_tensors
    d_weight, *d_inputs = call_once(
        backward,
        torch.zeros_like(outputs) if grad_outputs is None else grad_outputs,
        torch.zeros_like(start) if grad_last is None else grad_last,
        *(weight, keys, values, forget, start, reset, outputs, ctx.clip),
    )
    return d_weight.to(weight.dtype), *d_inputs, None, None


forward.register_autograd(_differentiate, setup_context=_setup)
without_second_derivative(backward)
_scan = eagerly(forward, _setup, _differentiate)
