"""`diagonal_scan`: h_t = a_t ⊙ h_{t-1} + b_t, every channel for itself.

The engine of S4D, S5, LRU, RG-LRU, minGRU, minLSTM, Mamba and every moving average. The transition is
taken as it is, not as a logarithm: it may be negative or complex, and 0 forgets everything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import accumulation_dtype, check_finite, check_reset, check_sequence
from ostinato.ops.routes import Engine
from ostinato.ops.scan import affine_scan

_engine = Engine("diagonal_scan")


def diagonal_scan_step(
    transition: Inexact[Tensor, "batch ..."],
    inputs: Inexact[Tensor, "batch ..."],
    state: Inexact[Tensor, "batch ..."],
) -> Inexact[Tensor, "batch ..."]:
    """One step, the definition: h = a ⊙ h' + b."""
    return transition * state + inputs


def _widened(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]:
    """A plain PyTorch route: one type for all, the resets as zeros of the transition, a state that is there."""

    @wraps(function)
    def route(
        transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, time = inputs.shape[:2]
        dtype = torch.promote_types(accumulation_dtype(inputs.dtype), accumulation_dtype(transition.dtype))
        b = inputs.to(dtype)
        a = transition.to(dtype).expand(batch, time, *transition.shape[2:])
        if reset is not None:
            a = a.masked_fill(reset.view(batch, time, *[1] * (a.ndim - 2)), 0)
        states = function(a, b, b.new_zeros(b[:, 0].shape) if state is None else state.to(dtype))
        last = states[:, -1]
        return states.to(inputs.dtype if inputs.is_complex() or not dtype.is_complex else dtype), last

    return route


@_engine.route("reference")
@_widened
def _reference(transition: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    states = []
    for t in range(inputs.shape[1]):
        state = diagonal_scan_step(transition[:, t], inputs[:, t], state)
        states.append(state)
    return torch.stack(states, dim=1)


def _one_step(transition: Tensor, inputs: Tensor, *_: Tensor | None) -> str | None:
    return "a single step needs no scan" if inputs.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
@_widened
def _parallel(transition: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    return affine_scan(transition, inputs, state)


def diagonal_scan(
    transition: Inexact[Tensor, "#batch #time ..."],
    inputs: Inexact[Tensor, "batch time ..."],
    state: Inexact[Tensor, "batch ..."] | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Inexact[Tensor, "batch time ..."], Inexact[Tensor, "batch ..."]]:
    """All states of h_t = a_t ⊙ h_{t-1} + b_t.

    Args:
        transition: a, real or complex, of any sign and size. It has as many axes as `inputs`; those after
            time may be of size 1, and batch and time too if the transition does not depend on them.
        inputs: b, (batch, time, …), any number of channel axes.
        state: h_0, (batch, …); zeros if None.
        reset: True marks the first step of a new sequence: there h_{t-1} counts as zero.
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The states (batch, time, …) in the type of `inputs`, and the last state. Half precision is
        accumulated, and its state kept, in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        NonFiniteError: with `validate`.

    Source: S5 (arXiv 2208.04933), section 2.2; Martin & Cundy 2018 (arXiv 1709.04057).
    """
    axes = "batch time" + " channels" * (inputs.ndim - 2)
    check_sequence("inputs", inputs, axes)
    check_sequence("transition", transition, axes)
    batch, time = inputs.shape[:2]
    check_reset(reset, batch, time)
    for axis, (size, wanted) in enumerate(zip(transition.shape, inputs.shape, strict=True)):
        if size not in (1, wanted):
            raise ShapeError(
                f"transition has size {size} along axis {axis} where inputs has {wanted}: "
                f"{tuple(transition.shape)} against {tuple(inputs.shape)}"
            )
    if state is not None and state.shape != inputs.shape[:1] + inputs.shape[2:]:
        raise ShapeError(
            f"state must have shape {tuple(inputs.shape[:1] + inputs.shape[2:])} (one step of inputs), "
            f"got {tuple(state.shape)}"
        )
    if validate:
        check_finite(transition=transition, inputs=inputs, state=state)

    states, last = _engine(transition, inputs, state, reset)
    return states, last
