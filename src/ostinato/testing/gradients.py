"""Functions of tensors held to one another: what they return, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor | None]) -> list[Any]:
    """What `function(*arguments)` returns, and the gradients of one random combination of it, the same every time."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in arguments]
    results = function(*leaves)
    random = torch.Generator().manual_seed(0)
    terms = [(r * torch.randn(r.shape, generator=random).to(r.dtype)).sum() for r in results]
    return [*results, *torch.autograd.grad(torch.stack(terms).sum(), [leaf for leaf in leaves if leaf is not None])]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """|found − wanted| ≤ tolerance (1 + max |wanted|), tensor by tensor; raises `AssertionError`."""
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape:
            raise AssertionError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        error, bound = (ours.double() - theirs.double()).abs().max(), tolerance * (1 + theirs.abs().max())
        if not error <= bound:
            raise AssertionError(f"off by {error:.2e}, {bound:.2e} is allowed")
