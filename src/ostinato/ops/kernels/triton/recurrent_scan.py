"""The Triton route of `recurrent_scan`: the head-wise cells and M²RNN, forward and backward.

Half precision keeps states and gates in float32; what enters a product with the recurrent weights, and these
weights, are in the type of the inputs. float32 multiplies in full precision. Differentiable once; sums are made
in a fixed order, so the result is deterministic.

Source: FlashRNN (arXiv 2412.07752), sections 2 and 3, for the cells and for the weights kept on chip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.ops.cells import GRU, LSTM, M2RNN, SLSTM, Cell, Elman, Inputs, State, Weights
from ostinato.ops.kernels.triton import recurrent_scan_headwise as kernels
from ostinato.ops.kernels.triton import recurrent_scan_matrix as matrix
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import card, power_of_two, tensors_in, without_second_derivative

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The number of each cell inside the kernels, and how many parts its state has.
_NUMBER = {"Elman": 0, "LSTM": 1, "GRU": 2, "SLSTM": 3}
_STATES = {"Elman": 1, "LSTM": 2, "GRU": 1, "SLSTM": 4}
# The share of a multiprocessor's shared memory that the recurrent weights of one head may take on their way to
# the registers; the rest is for what is copied ahead. 128 KB on a Hopper card, whose registers hold as much.
_SHARE = 0.57


def refuses(cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None = None) -> str | None:
    """Why the kernels cannot serve a call."""
    for tensor in tensors_in((weights, inputs, () if state is None else tuple(state))):
        if tensor.dtype not in _TYPES:
            return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if type(cell) is M2RNN:
        return matrix.refuses(weights, inputs)
    if type(cell) not in (Elman, LSTM, GRU, SLSTM):
        return f"no kernel for the cell {type(cell).__name__}"
    gates, _, dim, _ = weights[0].shape
    needed = power_of_two(gates) * power_of_two(max(dim, 16)) ** 2 * inputs.element_size()
    room = int(_SHARE * card(inputs.device).shared_memory)
    if needed > room:
        return (
            f"the recurrent weights of one head ({gates} gates of {dim} × {dim}, {needed // 1024} KB in tiles) do not "
            f"stay on chip, where there is room for {room // 1024} KB; use more heads"
        )
    return None


def declines(cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None = None) -> str | None:
    """Why another route had better serve it."""
    return None


def run(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None = None
) -> tuple[Tensor, State]:
    """The route, on arguments as `recurrent_scan` has checked them."""
    if isinstance(cell, M2RNN):
        return matrix.run(cell, weights, inputs, state, reset)
    headwise: Any = cell
    name, state_type = type(cell).__name__, headwise.state_type
    if state is None:
        batch, _, _, heads, dim = inputs.shape
        stacked = inputs.new_zeros(_STATES[name], batch, heads, dim, dtype=torch.float32)
    else:
        stacked = torch.stack([part.float() for part in state])
    bias = weights[1] if len(weights) > 1 else None
    tensors = [*weights, inputs, stacked]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    outputs, last, _, _ = _scan(name, weights[0], bias, inputs, stacked, reset, save)
    return outputs, state_type(*last.unbind(0))


class Plan(NamedTuple):
    """The shape of a launch."""

    dim: int
    columns: int
    parts: int

    def constants(self) -> dict[str, int]:
        """What the kernels and the launcher take of it."""
        return {
            "D": self.dim,
            "COLUMNS": self.columns,
            "PARTS": self.parts,
            "num_warps": self.parts,
            "num_stages": 1,
            "STAGES": 4,
        }


def plan(batch: int, heads: int, dim: int, device: torch.device) -> Plan:
    """Rows of the batch in a tile: 4 while there are multiprocessors for all programs, else 8; a warp for 16 of the
    head's outputs, one tile of a tensor-core product.

    A tile of 4 leaves two neighbours to a thread, the least that is copied to shared memory in the background.
    """
    d = power_of_two(max(dim, 16))
    columns = 8 if heads * -(-batch // 4) > 2 * card(device).processors else 4
    return Plan(d, columns, d // 16)


def _constants(name: str, inputs: Tensor, reset: Tensor | None, tile: Plan) -> dict[str, Any]:
    batch, _, gates, _, dim = inputs.shape
    return {
        "CELL": _NUMBER[name],
        "GATES": gates,
        "STATES": _STATES[name],
        "DIM": dim,
        "WHOLE": dim == tile.dim and batch % tile.columns == 0,
        "RESET": reset is not None,
        "PRECISE": inputs.dtype == torch.float32,
        **tile.constants(),
    }


@torch.library.custom_op("ostinato::recurrent_scan", mutates_args=())
def forward(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    start: Tensor,
    reset: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last state, and what the backward pass needs beside them (empty unless `save`).

    The last state and `start` are (states, batch, heads, dim) in float32. What is saved: the states other than
    the output that enter each step, (states − 1, batch, time, heads, dim), and the pre-activations of all gates.
    """
    inputs = inputs.contiguous()
    batch, time, _, heads, dim = inputs.shape
    outputs, last, memory, saved = _empty(name, inputs, start, save)
    tile = plan(batch, heads, dim, inputs.device)
    kernels.forward_kernel[(heads, -(-batch // tile.columns))](
        inputs,
        weight.contiguous(),
        inputs if bias is None else bias.contiguous(),
        start.contiguous(),
        inputs if reset is None else reset.contiguous(),
        outputs,
        last,
        memory,
        saved,
        batch,
        time,
        heads,
        SAVE=save,
        **_constants(name, inputs, reset, tile),
    )
    return outputs, last, memory, saved


def _empty(name: str, inputs: Tensor, start: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, time, _, heads, dim = inputs.shape
    memory = (_STATES[name] - 1, batch, time, heads, dim) if save else (0,)
    return (
        inputs.new_empty(batch, time, heads, dim),
        torch.empty_like(start, memory_format=torch.contiguous_format),
        start.new_empty(memory),
        start.new_empty(inputs.shape if save else (0,)),
    )


@forward.register_fake
def _(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    start: Tensor,
    reset: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(name, inputs, start, save)


@torch.library.custom_op("ostinato::recurrent_scan_backward", mutates_args=())
def backward(
    name: str,
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    weight: Tensor,
    inputs: Tensor,
    start: Tensor,
    reset: Tensor | None,
    outputs: Tensor,
    memory: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂R and (for GRU) ∂b in float32, ∂inputs in their type, ∂start."""
    inputs, start = inputs.contiguous(), start.contiguous()
    batch, time, gates, heads, dim = inputs.shape
    reset = None if reset is None else reset.contiguous()
    tile = plan(batch, heads, dim, inputs.device)
    d_inputs, d_start = torch.empty_like(inputs), torch.empty_like(start)
    d_candidate = torch.empty_like(outputs) if name == "GRU" else d_inputs
    kernels.backward_kernel[(heads, -(-batch // tile.columns))](
        inputs,
        weight.contiguous(),
        start,
        inputs if reset is None else reset,
        outputs,
        memory,
        saved,
        grad_outputs.contiguous(),
        start if grad_last is None else grad_last.contiguous(),
        d_inputs,
        d_candidate,
        d_start,
        batch,
        time,
        heads,
        LAST=grad_last is not None,
        **_constants(name, inputs, reset, tile),
    )
    through_inputs = 2 if name == "GRU" else gates
    d_weight = _weight_gradient(d_inputs.flatten(2), through_inputs, start, reset, outputs)
    d_bias = start.new_empty(0)
    if name == "GRU":
        last = _weight_gradient(d_candidate.flatten(2), 1, start, reset, outputs)
        d_weight = torch.cat([d_weight, last])
        d_bias = d_candidate.sum((0, 1), dtype=torch.float32)
    return d_weight, d_bias, d_inputs, d_start


def _weight_gradient(delta: Tensor, gates: int, start: Tensor, reset: Tensor | None, outputs: Tensor) -> Tensor:
    """Σ over batch and time of δ_t h_{t−1}ᵀ, (gates, heads, dim, dim), for the first gates of `delta`."""
    batch, time, heads, dim = outputs.shape
    d = power_of_two(max(dim, 16))
    rows = 64 if d <= 64 else 32
    programs = 4 * card(delta.device).processors
    pieces = max(1, min(-(-batch * time // rows), programs // (heads * gates)))
    chunk = -(-batch * time // (pieces * rows)) * rows
    partial = start.new_empty(gates, pieces, heads, dim, dim)
    kernels.weight_gradient_kernel[(heads, pieces, gates)](
        delta,
        start,
        outputs if reset is None else reset,
        outputs,
        partial,
        batch,
        time,
        heads,
        chunk,
        delta.shape[-1],
        DIM=dim,
        D=d,
        ROWS=rows,
        RESET=reset is not None,
        PRECISE=delta.dtype == torch.float32,
        num_warps=4 if d <= 64 else 8,
        num_stages=3 if delta.dtype != torch.float32 and d <= 128 else 1,
    )
    return partial.sum(1)


@backward.register_fake
def _(
    name: str,
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    weight: Tensor,
    inputs: Tensor,
    start: Tensor,
    reset: Tensor | None,
    outputs: Tensor,
    memory: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = (inputs.shape[3], inputs.shape[4]) if name == "GRU" else (0,)
    return (
        start.new_empty(weight.shape),
        start.new_empty(bias),
        inputs.new_empty(inputs.shape),
        start.new_empty(start.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    name, weight, bias, sequence, start, reset, _ = inputs
    outputs, _, memory, saved = output
    ctx.mark_non_differentiable(memory, saved)
    ctx.set_materialize_grads(False)
    ctx.name, ctx.bias_type = name, None if bias is None else bias.dtype
    ctx.save_for_backward(weight, sequence, start, reset, outputs, memory, saved)


def _differentiate(ctx: Any, grad_outputs: Tensor | None, grad_last: Tensor | None, *_: Any) -> tuple[Any, ...]:
    weight, sequence, start, reset, outputs, memory, saved = ctx.saved_tensors
    d_weight, d_bias, d_inputs, d_start = call_once(
        backward,
        ctx.name,
        torch.zeros_like(outputs) if grad_outputs is None else grad_outputs,
        grad_last,
        weight,
        sequence,
        start,
        reset,
        outputs,
        memory,
        saved,
    )
    d_bias = None if ctx.bias_type is None else d_bias.to(ctx.bias_type)
    return None, d_weight.to(weight.dtype), d_bias, d_inputs, d_start, None, None, None


forward.register_autograd(_differentiate, setup_context=_setup)
without_second_derivative(backward)
_scan = eagerly(forward, _setup, _differentiate)
