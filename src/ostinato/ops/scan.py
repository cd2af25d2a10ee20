"""The associative scan: all prefixes of a product, in O(T) work and O(log T) dependent levels.

A recurrence p_t = e_t · p_{t-1}, in which the elements e_t form a monoid that acts on points p, can be
evaluated in parallel because elements can be multiplied before any point is known:

    e_t · (e_{t-1} · p) = (e_t ∘ e_{t-1}) · p.

Everything linear in this package is such a scan: diagonal recurrences, the inner solve of Newton's method,
the adjoint of both, softmax as a recurrence, Kalman filters. `associative_scan` is written once for all
monoids. `affine_scan`, the case h_t = A_t h_{t-1} + b_t, has in addition an adjoint of its own, which is
again an affine scan, run backwards: memory stays linear, and derivatives of any order are exact.

The algorithm is the blocked scan (Blelloch 1990, "Prefix sums and their applications"): time is cut into
blocks of about √T, all blocks are multiplied up at the same time, the blocks' products are scanned by the
same function, and each block's prefixes then act on the point that enters it. Small sequences are scanned by
doubling (Hillis & Steele 1986): more work, in far fewer operations.

All sequences are batch first, time second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Inexact, Shaped
from torch import Tensor

Element = tuple[Tensor, ...]
Point = tuple[Tensor, ...]

# Below this many steps a plain loop is as fast as anything.
_SHORT = 8
# Sequences of no more numbers than this are bound by the number of operations, not by their size.
_SMALL = 2**15
# Blocks longer than this gain nothing: the loop inside a block is as long as the number of its steps.
_LONGEST_BLOCK = 64


@runtime_checkable
class Monoid(Protocol):
    """Elements that multiply associatively and act on points. Both are tuples of tensors.

    The tensors of `combine` and `act` carry no time axis: axis 0 is the batch, and whatever follows must
    broadcast. (The scan calls them with (batch, blocks, …) tensors too, so index axes from the end.)
    """

    def combine(self, first: Element, second: Element) -> Element:
        """The element that does `first` and then `second`: second ∘ first."""
        ...

    def act(self, element: Element, point: Point) -> Point:
        """The point after `element`."""
        ...


def associative_scan(
    monoid: Monoid,
    elements: Sequence[Shaped[Tensor, "batch time ..."]],
    initial: Sequence[Shaped[Tensor, "batch ..."]],
    *,
    reverse: bool = False,
) -> tuple[Shaped[Tensor, "batch time ..."], ...]:
    """Points p_t = e_t · p_{t-1} for t = 1…T, with p_0 = `initial`.

    Args:
        monoid: how elements multiply, and how they act.
        elements: a tuple of tensors, each (batch, time, …).
        initial: the point before the first step, each (batch, …).
        reverse: run from the last step to the first: p_t = e_t · p_{t+1}, p_{T+1} = `initial`.

    Returns:
        The points, each (batch, time, …). Differentiable to any order by autograd.

    Source: Blelloch 1990; Martin & Cundy 2018 (arXiv 1709.04057) for its use on recurrences.
    """
    elements, initial = tuple(elements), tuple(initial)
    time = elements[0].shape[1]
    if time <= _SHORT:
        return _loop(monoid, elements, initial, reverse)
    if max(e.numel() for e in elements) <= _SMALL:
        return _doubling(monoid, elements, initial, reverse)
    width = min(_LONGEST_BLOCK, math.isqrt(time))
    blocks = time // width
    rest = time - blocks * width
    if rest:
        # The steps that fill no block are the last to be taken.
        head, tail = (slice(rest, None), slice(0, rest)) if reverse else (slice(0, -rest), slice(-rest, None))
        first = associative_scan(monoid, [e[:, head] for e in elements], initial, reverse=reverse)
        edge = 0 if reverse else -1
        last = _loop(monoid, tuple(e[:, tail] for e in elements), tuple(p[:, edge] for p in first), reverse)
        pairs = zip(last, first, strict=True) if reverse else zip(first, last, strict=True)
        return tuple(torch.cat(pair, dim=1) for pair in pairs)

    blocked = [e.unflatten(1, (blocks, width)) for e in elements]
    steps = range(width - 1, -1, -1) if reverse else range(width)
    products: list[Element] = []
    for step in steps:
        element = tuple(e[:, :, step] for e in blocked)
        products.append(monoid.combine(products[-1], element) if products else element)
    leaving = associative_scan(monoid, products[-1], initial, reverse=reverse)
    if reverse:
        entering = tuple(torch.cat([p[:, 1:], i.unsqueeze(1)], dim=1) for p, i in zip(leaving, initial, strict=True))
    else:
        entering = tuple(torch.cat([i.unsqueeze(1), p[:, :-1]], dim=1) for p, i in zip(leaving, initial, strict=True))
    points = [monoid.act(product, entering) for product in products]
    if reverse:
        points.reverse()
    return tuple(torch.stack(column, dim=2).flatten(1, 2) for column in zip(*points, strict=True))


def _loop(monoid: Monoid, elements: Element, point: Point, reverse: bool) -> Point:
    time = elements[0].shape[1]
    points = []
    for step in range(time - 1, -1, -1) if reverse else range(time):
        point = monoid.act(tuple(e[:, step] for e in elements), point)
        points.append(point)
    if reverse:
        points.reverse()
    return tuple(torch.stack(column, dim=1) for column in zip(*points, strict=True))


def _doubling(monoid: Monoid, elements: Element, initial: Point, reverse: bool) -> Point:
    """After round r each product spans 2^r steps."""
    time, span = elements[0].shape[1], 1
    while span < time:
        early, late = tuple(e[:, :-span] for e in elements), tuple(e[:, span:] for e in elements)
        longer = monoid.combine(late, early) if reverse else monoid.combine(early, late)
        if reverse:
            elements = tuple(torch.cat([p, e[:, -span:]], dim=1) for p, e in zip(longer, elements, strict=True))
        else:
            elements = tuple(torch.cat([e[:, :span], p], dim=1) for p, e in zip(longer, elements, strict=True))
        span *= 2
    return monoid.act(elements, tuple(p.unsqueeze(1) for p in initial))


# --------------------------------------------------------------------------------------------------
# Affine maps h -> A h + b, for three structures of A.


class Affine(NamedTuple):
    """The affine maps h -> A h + b whose A has one structure; elements are (A, b), points are (h,).

    A NamedTuple of functions rather than a class hierarchy: a structure *is* these four functions.
    """

    name: str
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (A, h, b or None) -> A h + b
    multiply: Callable[[Tensor, Tensor], Tensor]  # (A, B) -> A B
    adjoint: Callable[[Tensor], Tensor]  # A -> Aᴴ
    outer: Callable[[Tensor, Tensor], Tensor]  # (u, w) -> the structure's part of u wᴴ

    def combine(self, first: Element, second: Element) -> Element:
        """(A₂, b₂) ∘ (A₁, b₁) = (A₂A₁, A₂b₁ + b₂)."""
        return self.multiply(second[0], first[0]), self.apply(second[0], first[1], second[1])

    def act(self, element: Element, point: Point) -> Point:
        """h -> A h + b."""
        return (self.apply(element[0], point[0], element[1]),)


def _apply_diagonal(a: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    return a * h if b is None else torch.addcmul(b, a, h)


def _apply_block(a: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    # a: (…, k, k, channels), h: (…, k, channels). Sums over k ≤ 4 are unrolled: a matrix product of 2×2
    # matrices costs far more than its four multiplications.
    out = b
    for j in range(a.shape[-2]):
        column, entry = a[..., :, j, :], h[..., j : j + 1, :]
        out = column * entry if out is None else torch.addcmul(out, column, entry)
    assert out is not None
    return out


def _multiply_block(a: Tensor, b: Tensor) -> Tensor:
    out = a[..., :, 0, None, :] * b[..., None, 0, :, :]
    for j in range(1, a.shape[-2]):
        out = torch.addcmul(out, a[..., :, j, None, :], b[..., None, j, :, :])
    return out


def _apply_dense(a: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    product = (a @ h.unsqueeze(-1)).squeeze(-1)
    return product if b is None else product + b


DIAGONAL = Affine(
    "diagonal",
    apply=_apply_diagonal,
    multiply=lambda a, b: a * b,
    adjoint=lambda a: a.conj(),
    outer=lambda u, w: u * w.conj(),
)
"""A is a vector: A (…, channels), h (…, channels)."""

BLOCK = Affine(
    "block",
    apply=_apply_block,
    multiply=_multiply_block,
    adjoint=lambda a: a.transpose(-3, -2).conj(),
    outer=lambda u, w: u.unsqueeze(-2) * w.conj().unsqueeze(-3),
)
"""A is a small k×k matrix per channel: A (…, k, k, channels), h (…, k, channels)."""

DENSE = Affine(
    "dense",
    apply=_apply_dense,
    multiply=lambda a, b: a @ b,
    adjoint=lambda a: a.transpose(-2, -1).conj(),
    outer=lambda u, w: u.unsqueeze(-1) * w.conj().unsqueeze(-2),
)
"""A is a matrix on the last axis: A (…, d, d), h (…, d)."""

STRUCTURES = {structure.name: structure for structure in (DIAGONAL, BLOCK, DENSE)}


class _AffineScan(torch.autograd.Function):
    """h_t = A_t h_{t-1} + b_t, with the adjoint recurrence as its derivative.

    With g the gradient that reaches h from outside,
        μ_t = g_t + A_{t+1}ᴴ μ_{t+1},   ∂b_t = μ_t,   ∂A_t = μ_t h_{t-1}ᴴ,   ∂h_0 = A_1ᴴ μ_1,
    which is this function again, run backwards: so it can be differentiated any number of times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Affine, reverse: bool, transition: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
        (states,) = associative_scan(structure, (transition, inputs), (initial,), reverse=reverse)
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.reverse, transition, _, initial = inputs
        ctx.save_for_backward(transition, initial, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        structure, reverse = ctx.structure, ctx.reverse
        transition, initial, states = ctx.saved_tensors
        adjoint = structure.adjoint(transition)
        if reverse:
            first = slice(-1, None)
            following = torch.cat([torch.zeros_like(adjoint[:, :1]), adjoint[:, :-1]], dim=1)
        else:
            first = slice(0, 1)
            following = torch.cat([adjoint[:, 1:], torch.zeros_like(adjoint[:, :1])], dim=1)
        nothing = torch.zeros_like(grad[:, 0])
        mu = _AffineScan.apply(structure, not reverse, following, grad, nothing)
        grad_transition = grad_initial = None
        if ctx.needs_input_grad[2]:
            grad_transition = _sum_to(structure.outer(mu, _shift(states, initial, reverse)), transition.shape)
        if ctx.needs_input_grad[4]:
            grad_initial = structure.apply(adjoint[:, first], mu[:, first], None).squeeze(1)
        return None, None, grad_transition, mu, grad_initial


def _shift(states: Tensor, initial: Tensor, reverse: bool) -> Tensor:
    """The state that enters each step."""
    if reverse:
        return torch.cat([states[:, 1:], initial.unsqueeze(1)], dim=1)
    return torch.cat([initial.unsqueeze(1), states[:, :-1]], dim=1)


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes along which a tensor of `shape` was broadcast (same number of axes)."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and tensor.shape[axis] != 1]
    return tensor.sum(axes, keepdim=True) if axes else tensor


def affine_scan(
    transition: Inexact[Tensor, "batch time ..."],
    inputs: Inexact[Tensor, "batch time ..."],
    initial: Inexact[Tensor, "batch ..."],
    *,
    structure: Affine = DIAGONAL,
    reverse: bool = False,
) -> Inexact[Tensor, "batch time ..."]:
    """h_t = A_t h_{t-1} + b_t for all t, from h_0 = `initial`; real or complex.

    Args:
        transition: A. Diagonal: (batch, time, …) with the axes of `inputs`, any of which after time may be
            of size 1. Block: (batch, time, …, k, k, channels). Dense: (batch, time, …, d, d).
        inputs: b: diagonal (batch, time, …), block (batch, time, …, k, channels), dense (batch, time, …, d).
        initial: h_0, as one step of `inputs`.
        structure: `DIAGONAL`, `BLOCK` or `DENSE`.
        reverse: h_t = A_t h_{t+1} + b_t, from h_{T+1} = `initial`.

    Returns:
        All states, shaped as `inputs`. Computed in the type of the arguments: cast half precision first.

    Memory is linear in time; derivatives of every order are exact.
    Source: Martin & Cundy 2018 (arXiv 1709.04057), section 2; the adjoint: ParaRNN (arXiv 2510.21450).
    """
    return _AffineScan.apply(structure, reverse, transition, inputs, initial)


# --------------------------------------------------------------------------------------------------
# Softmax as a recurrence.


class Softmax:
    """The (maximum, sum, weighted sum) triple of softmax over a growing set.

    With m the largest logit so far, c = Σ e^{s_i − m}, a = Σ v_i e^{s_i − m}, two sets merge into
        m = max(m₁, m₂),   c = c₁e^{m₁−m} + c₂e^{m₂−m},   a = a₁e^{m₁−m} + a₂e^{m₂−m},
    and the softmax-weighted mean of v is a / c. The element of one token is (s, 1, v); the empty set is
    (−∞, 0, 0). m and c are (…), a is (…, dim).

    Source: Attention as an RNN (arXiv 2405.13956), section 3.2.
    """

    def combine(self, first: Element, second: Element) -> Element:
        """Merge two sets (the order does not matter)."""
        maximum = torch.maximum(first[0], second[0])
        # An empty set has weight 0; e^{−∞ − (−∞)} must not be formed, not even to be thrown away.
        finite = torch.where(maximum == -torch.inf, 0.0, maximum)
        left, right = torch.exp(first[0] - finite), torch.exp(second[0] - finite)
        return (
            maximum,
            first[1] * left + second[1] * right,
            first[2] * left.unsqueeze(-1) + second[2] * right.unsqueeze(-1),
        )

    def act(self, element: Element, point: Point) -> Point:
        """Add a set to the set so far."""
        return self.combine(point, element)


class MaxPlus:
    """The maps m -> max(a + m, b) on the reals: affine maps in which + is max and × is +.

    Elements are (a, b), points are (m,). It is the running maximum of mLSTM's exponential gate (arXiv
    2503.14376, equation 1).
    """

    def combine(self, first: Element, second: Element) -> Element:
        """max(a₂ + max(a₁ + m, b₁), b₂) = max((a₁ + a₂) + m, max(a₂ + b₁, b₂))."""
        return first[0] + second[0], torch.maximum(second[0] + first[1], second[1])

    def act(self, element: Element, point: Point) -> Point:
        """m -> max(a + m, b)."""
        return (torch.maximum(element[0] + point[0], element[1]),)


SOFTMAX = Softmax()
MAX_PLUS = MaxPlus()
