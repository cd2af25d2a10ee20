"""What every engine asks of its arguments, and the rule for the types that it computes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

import ostinato.state
from ostinato.errors import DtypeError, NonFiniteError, ShapeError

HALF = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which states and gates are kept: float32 for half precision, else the type itself."""
    return torch.float32 if dtype in HALF else dtype


def in_accumulation_dtype(route: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for plain PyTorch routes: all floating tensors come in the type that states are kept in.

    That of the first argument decides: float32 where it is half precision, else its own. Kernels are
    handed the arguments as they are, and widen what they load.
    """

    def cast(argument: Any, dtype: torch.dtype) -> Any:
        if isinstance(argument, Tensor):
            return argument.to(dtype) if argument.is_floating_point() else argument
        if isinstance(argument, tuple):
            return ostinato.state.to(argument, dtype)
        return argument

    @wraps(route)
    def widened(first: Tensor, *rest: Any) -> Any:
        dtype = accumulation_dtype(first.dtype)
        with own_precision(first):
            return route(first.to(dtype), *(cast(argument, dtype) for argument in rest))

    return widened


def own_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast, if it is on, leaves the types alone: for what must stay in float32.

    Autocast turns every matrix product into half precision, also those of states and of a system's own matrices.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a matrix product would take `tensor` here: autocast's where it is on, else its own.

    What is computed for matrix products alone can be rounded to it at once, instead of before each of them.
    """
    kind = tensor.device.type
    if tensor.dtype in (torch.float32, *HALF) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def check_sequence(name: str, tensor: Tensor, axes: str) -> None:
    """Raise unless `tensor` is floating (or complex), has the axes named in `axes`, and no axis is empty.

    `axes` is for people and for counting: "batch time heads key_dim".
    """
    names = axes.split()
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} must be a tensor ({axes}), got {type(tensor).__name__}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise DtypeError(f"{name} must be floating point, got {tensor.dtype}; convert it, e.g. {name}.float()")
    if tensor.ndim != len(names):
        raise ShapeError(f"{name} must have {len(names)} axes ({axes}), got shape {tuple(tensor.shape)}")
    for axis, size in zip(names, tensor.shape, strict=True):
        if size == 0:
            raise ShapeError(f"{name} is empty along {axis}: shape {tuple(tensor.shape)}; pass at least one element")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise unless `tensor.shape == shape`; `axes` names them."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} must have shape {shape} ({axes}), got {tuple(tensor.shape)}")


def check_reset(reset: Tensor | None, batch: int, time: int) -> None:
    """Raise unless `reset` is None or a (batch, time) tensor of bool."""
    if reset is None:
        return
    if reset.dtype != torch.bool:
        raise DtypeError(f"reset must be bool (True marks the first step of a new sequence), got {reset.dtype}")
    check_shape("reset", reset, (batch, time), "batch time")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise `NonFiniteError` at the first tensor that holds NaN or infinity, and say where."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise NonFiniteError(
                f"{name} holds {tensor[where].item()} at index {where} ({int(bad.sum())} of {tensor.numel()} "
                "elements are not finite); look at what produced it"
            )
