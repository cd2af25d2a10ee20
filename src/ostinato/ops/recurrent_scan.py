"""`recurrent_scan`: h_t = f(h_{t−1}, x_t), step by step, for any cell.

The engine of everything that is truly sequential: Elman, LSTM, GRU, sLSTM, M²RNN. The loop is the
definition; cells whose Jacobian is cheap also run by `newton_scan`, which computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import ostinato.state
from ostinato.errors import ShapeError
from ostinato.ops.cells import Cell, Inputs, State, Weights
from ostinato.ops.checks import accumulation_dtype, check_finite, check_reset, check_sequence, own_precision
from ostinato.ops.routes import Engine

_engine = Engine("recurrent_scan")


def recurrent_scan_step(cell: Cell, weights: Weights, inputs: Inputs, state: State) -> tuple[Tensor, State]:
    """One step, the definition: h = f(h', x), and what the layer reads of it."""
    state = cell.step(weights, state, inputs)
    return cell.output(state), state


def loop(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None = None
) -> tuple[Tensor, State]:
    """The loop over `recurrent_scan_step`, on arguments that fit together."""
    steps: Any = inputs.unbind(1) if isinstance(inputs, Tensor) else zip(*(x.unbind(1) for x in inputs), strict=True)
    fresh = None if reset is None else reset.unbind(1)
    outputs = []
    for t, step_inputs in enumerate(steps):
        if fresh is not None:
            state = restart(state, fresh[t])
        output, state = recurrent_scan_step(cell, weights, step_inputs, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


@_engine.route("reference")
def _reference(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None = None
) -> tuple[Tensor, State]:
    """The loop, in the type that states are kept in."""
    weights, inputs, state = widen(cell, weights, inputs, state)
    with own_precision(inputs if isinstance(inputs, Tensor) else inputs[0]):
        return loop(cell, weights, inputs, state, reset)


def restart(state: State, fresh: Bool[Tensor, " batch"]) -> State:
    """The state with the marked rows set to zero."""
    return ostinato.state.map(lambda leaf: leaf.masked_fill(fresh.view(-1, *[1] * (leaf.ndim - 1)), 0), state)


def check(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None, validate: bool
) -> torch.dtype:
    """Check the arguments of an engine that runs cells; the type of its outputs."""
    parts = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    names = ["inputs"] if isinstance(inputs, Tensor) else [f"inputs[{i}]" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        check_sequence(name, part, "batch time" + " channels" * (part.ndim - 2))
        if part.shape[:2] != parts[0].shape[:2]:
            raise ShapeError(
                f"{name} has batch and time {tuple(part.shape[:2])} where {names[0]} has {tuple(parts[0].shape[:2])}"
            )
    check_reset(reset, parts[0].shape[0], parts[0].shape[1])
    cell.check(weights, _at_first_step(inputs))
    if validate:
        check_finite(**dict(zip(names, parts, strict=True)))
        check_finite(**{f"weights[{i}]": weight for i, weight in enumerate(weights)})
        if state is not None:
            check_finite(**{f"state.{path}": leaf for path, leaf in ostinato.state.leaves(state)})
    if state is not None:
        found = [tuple(leaf.shape) for _, leaf in ostinato.state.leaves(state)]
        start = cell.initial_state(_at_first_step(inputs))
        wanted = [tuple(leaf.shape) for _, leaf in ostinato.state.leaves(start)]
        if found != wanted:
            raise ShapeError(f"the state of {type(cell).__name__} must hold shapes {wanted} here, got {found}")
    return parts[0].dtype


def _at_first_step(inputs: Inputs) -> Inputs:
    return inputs[:, 0] if isinstance(inputs, Tensor) else tuple(part[:, 0] for part in inputs)


def widen(cell: Cell, weights: Weights, inputs: Inputs, state: State) -> tuple[Weights, Inputs, State]:
    """Weights, inputs and state in the type to compute in, the widest of inputs and weights; zeros for no state."""
    parts = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    dtype = accumulation_dtype(parts[0].dtype)
    for tensor in (*parts, *weights):
        dtype = torch.promote_types(dtype, accumulation_dtype(tensor.dtype))
    if state is None:
        state = cell.initial_state(_at_first_step(inputs))
    cast = tuple(part.to(dtype) for part in parts)
    return (
        tuple(weight.to(dtype) for weight in weights),
        cast[0] if isinstance(inputs, Tensor) else cast,
        ostinato.state.to(state, dtype),
    )


def prepare(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None, validate: bool
) -> tuple[Weights, Inputs, State, torch.dtype]:
    """Check the arguments of an engine that runs cells, and bring them to the type to compute in.

    Returns weights, inputs and a state that is never None, and the type of the outputs.
    """
    weights = tuple(weights)
    dtype = check(cell, weights, inputs, state, reset, validate)
    return (*widen(cell, weights, inputs, state), dtype)


def recurrent_scan(
    cell: Cell,
    weights: Weights,
    inputs: Float[Tensor, "batch time ..."] | tuple[Float[Tensor, "batch time ..."], ...],
    state: State = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time ..."], State]:
    """All outputs of h_t = f(h_{t−1}, x_t).

    Args:
        cell: f; see `ostinato.ops.cells`.
        weights: the cell's weights, a tuple.
        inputs: what the cell takes at each step, with time as the second axis: a tensor or a tuple of them.
        state: h_0, as the cell's state; zeros if None.
        reset: True marks the first step of a new sequence: the state that enters it counts as zero.
        validate: look for NaN and infinity in the arguments first.

    Returns:
        The cell's outputs (batch, time, …) in the type of the inputs, and the last state. Half precision is
        computed, and its state kept, in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        NonFiniteError: with `validate`.

    Source: FlashRNN (arXiv 2412.07752), section 2, for the cells that it serves.
    """
    weights = tuple(weights)
    inputs = inputs if isinstance(inputs, Tensor) else tuple(inputs)
    dtype = check(cell, weights, inputs, state, reset, validate)
    outputs, last = _engine(cell, weights, inputs, state, reset)
    return outputs.to(dtype), last
