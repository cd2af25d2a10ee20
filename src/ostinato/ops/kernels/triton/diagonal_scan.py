"""The Triton route of `diagonal_scan`: operators, gradients, and how a launch is planned.

float32, half precision (accumulated in float32) and complex64. A transition that does not depend on batch,
time or some channels is read as it is, never expanded. A reset drops what enters its step, also what is not
finite. Where sequences and channels are too few to fill the card, time is cut into segments: one pass finds
what each does as a whole, a scan over segments finds the states between them, and a last pass fills them in.

Differentiable once. Sums over broadcast axes are made by tensor operations: the result is deterministic.
Source: Martin & Cundy 2018 (arXiv 1709.04057), section 2, for the scan and its adjoint.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.ops.kernels.triton import diagonal_scan_kernels as kernels
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import INTERPRETED, card, cdiv, power_of_two, without_second_derivative
from ostinato.ops.kernels.triton.tuned import tuned

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
# Segments shorter than this cost more in their second reading than they fill.
_SHORTEST_SEGMENT = 256


def refuses(transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None = None) -> str | None:
    """Why the kernels cannot serve a call."""
    for tensor in (transition, inputs) if state is None else (transition, inputs, state):
        if tensor.dtype not in _TYPES:
            return f"the kernels take float32, bfloat16, float16 and complex64, not {tensor.dtype}"
    return None


def declines(transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None = None) -> str | None:
    """Why another route had better serve it."""
    return "a single step needs no scan" if inputs.shape[1] == 1 else None


class Plan(NamedTuple):
    """The shape of a launch."""

    block_t: int
    block_c: int
    warps: int
    stages: int
    segments: int
    length: int

    def constants(self) -> dict[str, int]:
        """What the kernels and the launcher take of it."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_C": self.block_c,
            "STAGES": self.stages,
            "num_warps": self.warps,
        }


def plan(
    batch: int, time: int, channels: int, width: int, along_time: bool, tensors: int, device: torch.device
) -> Plan:
    """How to cut (batch, time, channels) of `width` bytes a number; `tensors` are held at a time.

    Channels contiguous: a warp spans as many channels as make its loads 16 bytes a lane, and a lane has all
    steps of a tile, so the scan is a chain of multiplications in registers. With few channels several warps
    share the steps of a tile. Time contiguous: a warp spans the steps instead.
    """
    if INTERPRETED:
        block_t, block_c, warps, stages = 8, min(4, power_of_two(channels)), 1, 1
        segments = 3 if time > 40 else 1
        length = block_t * math.ceil(time / (segments * block_t))
        return Plan(block_t, block_c, warps, stages, math.ceil(time / length), length)
    processors = card(device).processors
    if along_time:
        block_t = min(1024, max(32, power_of_two(time)))
        block_c, warps, stages = 1, 2 if block_t == 1024 else 1, 2
    else:
        # A row of which nothing is known is read a number a lane.
        lanes = 32 * max(1, 16 // width) if channels % 16 == 0 else 32
        shapes = [(lanes // 4, 4), (max(8, lanes // 8), 4)]
        if width == 4 and lanes == 128:
            shapes = [*([(256, 2)] if tensors == 3 else []), (128, 1), *shapes]
        full = [shape for shape in shapes if 1.1 * batch * math.ceil(channels / shape[0]) >= processors]
        block_c, warps = full[0] if full else shapes[-1]
        block_t, stages = (64, 4) if warps == 4 else (8, 6)
        block_c = min(block_c, power_of_two(channels))
    programs = batch * math.ceil(channels / block_c)
    # A second reading has to be repaid: by at least three times as many programs.
    segments = min(2 * processors // programs, time // _SHORTEST_SEGMENT) if 3 * programs <= 2 * processors else 1
    length = block_t * math.ceil(time / (max(1, segments) * block_t))
    # A stage is a tile of each tensor, and one fewer than the stages are under way.
    room = card(device).shared_memory * 2 // 3 // (block_t * block_c * max(width, 4) * tensors)
    return Plan(block_t, block_c, warps, max(1, min(stages, 1 + room)), math.ceil(time / length), length)


# --------------------------------------------------------------------------------------------------
# Layouts.


def _pairs(tensor: Tensor) -> Tensor:
    """Complex numbers as the pairs that the kernels read."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _flat(tensor: Tensor) -> Tensor:
    """(batch, time, channels), with channels or time contiguous, copied only where it must be."""
    flat = tensor.reshape(*tensor.shape[:2], -1)
    if flat.is_complex():
        flat = flat.resolve_conj()
    _, time, channels = flat.shape
    along_channels = flat.stride(2) == 1 or channels == 1
    along_time = flat.stride(1) == 1 or time == 1
    return flat if along_channels or along_time else flat.contiguous()


def _along_time(flat: Tensor) -> bool:
    """Whether a flat tensor has its time contiguous, and not its channels."""
    return flat.shape[2] > 1 and flat.stride(2) != 1


class _Transition(NamedTuple):
    """A transition as the kernels read it: base[b·batch + t·time + outer(c)·outer + inner(c)·inner]."""

    base: Tensor
    batch: int
    time: int
    outer: int
    inner: int
    period: int

    @property
    def flat(self) -> bool:
        """Whether one stride serves all channels."""
        return self.period == 0


def _transition(transition: Tensor, shape: torch.Size) -> _Transition:
    """Strides of a transition that broadcasts to `shape`; a broadcast axis has the stride 0."""
    if transition.is_complex():
        transition = transition.resolve_conj()
    for copied in (False, True):
        attempt = transition.contiguous() if copied else transition
        wide = attempt.expand(shape)
        # Merge channel axes that one stride can walk.
        groups: list[tuple[int, int]] = []
        for size, stride in zip(wide.shape[2:], wide.stride()[2:], strict=True):
            if size == 1:
                continue
            if groups and groups[-1][1] == stride * size:
                groups[-1] = (groups[-1][0] * size, stride)
            else:
                groups.append((size, stride))
        batch, time = (0 if attempt.shape[axis] == 1 else attempt.stride(axis) for axis in (0, 1))
        if len(groups) <= 1:
            return _Transition(attempt, batch, time, 0, groups[0][1] if groups else 0, 0)
        if len(groups) == 2:
            return _Transition(attempt, batch, time, groups[0][1], groups[1][1], groups[1][0])
    wide = transition.expand(*transition.shape[:2], *shape[2:]).contiguous()
    return _transition(wide, shape)


def _empty(batch: int, time: int, channels: int, along_time: bool, like: Tensor, dtype: torch.dtype) -> Tensor:
    if along_time:
        return like.new_empty(batch, channels, time, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, time, channels, dtype=dtype)


def _bytes(mask: Tensor | None, instead: Tensor) -> Tensor:
    return _pairs(instead) if mask is None else mask.contiguous().view(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Launches. All tensors are flat; states are float32 or complex64.


def _launch_forward(
    a: _Transition, b: Tensor, entering: Tensor | None, reset: Tensor | None, shape: Plan, totals: bool
) -> tuple[Tensor, Tensor]:
    """States and last state; with `totals` the end of each segment that starts from zero, and its product."""
    batch, time, channels = b.shape
    complex_ = b.is_complex()
    kept = torch.complex64 if complex_ else torch.float32
    last = b.new_empty((batch, shape.segments, channels) if totals else (batch, channels), dtype=kept)
    out = torch.empty_like(last) if totals else _empty(batch, time, channels, _along_time(b), b, b.dtype)
    strides = (0, 0, 0) if totals else out.stride()
    kernels.forward[(batch * shape.segments * cdiv(channels, shape.block_c),)](
        _pairs(a.base),
        _pairs(b),
        _pairs(last if entering is None else entering),
        _bytes(reset, b),
        _pairs(out),
        _pairs(last),
        _pairs(out),
        time,
        channels,
        shape.segments,
        shape.length,
        max(1, a.period),
        a.batch,
        a.time,
        a.outer,
        a.inner,
        *b.stride(),
        *strides,
        ENTERS=entering is not None,
        FRESH=reset is not None,
        TOTALS=totals,
        STEADY=a.time == 0,
        FLAT=a.flat,
        COMPLEX=complex_,
        A_COMPLEX=a.base.is_complex(),
        EVEN_T=time % shape.block_t == 0,
        EVEN_C=channels % shape.block_c == 0,
        **shape.constants(),
    )
    return out, last


def _between(products: Tensor, ends: Tensor, start: Tensor | None) -> Tensor:
    """The states that enter the segments, (batch, segments, channels); `start` enters the first."""
    head = torch.zeros_like(ends[:, :1]) if start is None else start.unsqueeze(1)
    if ends.shape[1] == 1:
        return head.contiguous()
    following = _scan(_transition(products, products.shape), ends, head.squeeze(1).contiguous(), None)[0]
    return torch.cat([head, following[:, :-1]], dim=1)


def _scan(a: _Transition, b: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, channels = b.shape
    shape = plan(batch, time, channels, b.element_size(), _along_time(b), 2, b.device)
    shape = tuned("diagonal_scan", shape, b.dtype, shape.block_t, shape.block_c)
    entering = state
    if shape.segments > 1:
        products, ends = _launch_forward(a, b, None, reset, shape, True)
        entering = _between(products, ends, state)
    return _launch_forward(a, b, entering, reset, shape, False)


def _launch_backward(
    a: _Transition,
    grad: Tensor,
    states: Tensor,
    state: Tensor | None,
    entering: Tensor,
    reset: Tensor | None,
    shape: Plan,
    totals: bool,
    grad_a_type: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """∂b, ∂a (per segment where the transition is steady) and ∂h_0; with `totals` products, None and ends."""
    batch, time, channels = states.shape
    complex_ = states.is_complex()
    kept = entering.dtype
    steady = a.time == 0
    along_time = _along_time(states)
    grad_a = None
    if totals:
        grad_b = torch.empty_like(entering)
        grad_state = torch.empty_like(entering)
    else:
        grad_b = _empty(batch, time, channels, along_time, states, states.dtype)
        grad_state = states.new_empty(batch, channels, dtype=kept)
        if grad_a_type is not None:
            if steady:
                grad_a = states.new_empty(batch, shape.segments, channels, dtype=kept)
            else:
                grad_a = _empty(batch, time, channels, along_time, states, grad_a_type)
    kernels.backward[(batch * shape.segments * cdiv(channels, shape.block_c),)](
        _pairs(a.base),
        _pairs(grad),
        _pairs(states),
        _pairs(grad_state if state is None else state),
        _pairs(entering),
        _bytes(reset, grad),
        _pairs(grad_b),
        _pairs(grad_b if grad_a is None else grad_a),
        _pairs(grad_state),
        _pairs(grad_b),
        time,
        channels,
        shape.segments,
        shape.length,
        max(1, a.period),
        a.batch,
        a.time,
        a.outer,
        a.inner,
        *grad.stride(),
        *states.stride(),
        ENTERS=state is not None,
        FRESH=reset is not None,
        TOTALS=totals,
        STEADY=steady,
        FLAT=a.flat,
        COMPLEX=complex_,
        A_COMPLEX=a.base.is_complex(),
        EVEN_T=time % shape.block_t == 0,
        EVEN_C=channels % shape.block_c == 0,
        FLIP=not along_time,
        GRAD_A=grad_a is not None,
        **shape.constants(),
    )
    return grad_b, grad_a, grad_state


# --------------------------------------------------------------------------------------------------
# Operators.


def _types(transition: Tensor, inputs: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The types of the states that are returned, and of the last one."""
    if inputs.is_complex() or transition.is_complex():
        return torch.complex64, torch.complex64
    return inputs.dtype, torch.float32


@torch.library.custom_op("ostinato::diagonal_scan", mutates_args=())
def forward(transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states in the type of the inputs, and the last one in float32 or complex64."""
    outer, kept = _types(transition, inputs)
    b = _flat(inputs.to(outer))
    h = None if state is None else state.to(kept).reshape(state.shape[0], -1).contiguous().resolve_conj()
    states, last = _scan(_transition(transition, inputs.shape), b, h, reset)
    return states.unflatten(2, inputs.shape[2:] or (1,)).view(inputs.shape), last.view(inputs[:, 0].shape)


@forward.register_fake
def _(transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    outer, kept = _types(transition, inputs)
    b = _flat(inputs.to(outer))
    batch, time, channels = b.shape
    states = _empty(batch, time, channels, _along_time(b), b, outer)
    return states.unflatten(2, inputs.shape[2:] or (1,)).view(inputs.shape), inputs.new_empty(
        inputs[:, 0].shape, dtype=kept
    )


@torch.library.custom_op("ostinato::diagonal_scan_backward", mutates_args=())
def backward(
    grad_states: Tensor,
    grad_last: Tensor,
    transition: Tensor,
    states: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    wants_transition: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂a in the shape and type of the transition (empty if not wanted), ∂b and ∂h_0 in those of the states."""
    kept = torch.complex64 if states.is_complex() else torch.float32
    shape, flat_shape = states.shape, (*states.shape[:2], -1)
    h = _flat(states)
    batch, time, channels = h.shape
    grad = grad_states.reshape(flat_shape)
    if grad.is_complex():
        grad = grad.resolve_conj()
    if grad.stride() != h.stride():
        grad = _empty(batch, time, channels, _along_time(h), h, h.dtype).copy_(grad)
    start = None if state is None else state.to(kept).reshape(batch, -1).contiguous().resolve_conj()
    entering = grad_last.to(kept).reshape(batch, 1, -1).contiguous().resolve_conj()
    a = _transition(transition, shape)
    launch = plan(batch, time, channels, h.element_size(), _along_time(h), 3, h.device)
    launch = tuned("diagonal_scan_backward", launch, h.dtype, launch.block_t, launch.block_c)
    if launch.segments > 1:
        nothing = torch.zeros_like(entering).expand(batch, launch.segments, channels).contiguous()
        # The last segment's own end: nothing enters it while totals are taken.
        products, _, ends = _launch_backward(a, grad, h, None, nothing, reset, launch, True, None)
        entering = _between(products.flip(1), ends.flip(1), entering.squeeze(1)).flip(1)
    summed = transition.shape != shape
    grad_type = None if not wants_transition else (kept if summed or transition.dtype != h.dtype else h.dtype)
    grad_b, grad_a, grad_state = _launch_backward(a, grad, h, start, entering, reset, launch, False, grad_type)
    if grad_a is None:
        found = transition.new_empty(0)
    else:
        wide = (batch, grad_a.shape[1], *shape[2:])
        found = grad_a.unflatten(2, shape[2:] or (1,)).view(wide)
        axes = [axis for axis, size in enumerate(transition.shape) if size == 1 and found.shape[axis] != 1]
        found = found.sum(axes, keepdim=True) if axes else found
        if not transition.is_complex() and found.is_complex():
            found = found.real.contiguous()
        found = found.to(transition.dtype)
    return found, grad_b.unflatten(2, shape[2:] or (1,)).view(shape), grad_state.view(states[:, 0].shape)


@backward.register_fake
def _(
    grad_states: Tensor,
    grad_last: Tensor,
    transition: Tensor,
    states: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    wants_transition: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.complex64 if states.is_complex() else torch.float32
    found = torch.empty_like(transition) if wants_transition else transition.new_empty(0)
    return found, torch.empty_like(states), states.new_empty(states[:, 0].shape, dtype=kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    transition, b, state, reset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(transition, output[0], state, reset)
    ctx.inputs_type, ctx.inputs_complex = b.dtype, b.is_complex()


def _backward(ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    transition, states, state, reset = ctx.saved_tensors
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    if grad_last is None:
        grad_last = states.new_zeros(states[:, 0].shape, dtype=torch.promote_types(states.dtype, torch.float32))
    wanted = ctx.needs_input_grad[0]
    found, grad_b, grad_state = call_once(backward, grad_states, grad_last, transition, states, state, reset, wanted)
    if grad_b.is_complex() and not ctx.inputs_complex:
        grad_b = grad_b.real
    grad_h = None
    if state is not None:
        grad_h = grad_state.real if grad_state.is_complex() and not state.is_complex() else grad_state
        grad_h = grad_h.to(state.dtype)
    return found if wanted else None, grad_b.to(ctx.inputs_type), grad_h, None


forward.register_autograd(_backward, setup_context=_setup)
without_second_derivative(backward)
_forward = eagerly(forward, _setup, _backward)


def run(transition: Tensor, inputs: Tensor, state: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the engine's routes compute."""
    return _forward(transition, inputs, state, reset)
