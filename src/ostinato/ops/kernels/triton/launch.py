"""When a Triton kernel can run, and what all launches share. Does not import Triton."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.errors import BackendError
from ostinato.ops.checks import HALF

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = find_spec("triton") is not None


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples of arguments."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from tensors_in(argument)


def unavailable(arguments: Any) -> str | None:
    """Why no Triton kernel can run on these arguments, or None."""
    for tensor in tensors_in(arguments):
        if tensor.device.type != "cuda" and not INTERPRETED:
            return f"Triton kernels need tensors on a CUDA device, got {tensor.device}"
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "Triton kernels have no rule for torch.func transforms"
    if not _INSTALLED:
        return "the package triton is not installed"
    return None


class Card(NamedTuple):
    """What a launch is planned by."""

    processors: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Bytes of shared memory that one block can have."""
    capability: tuple[int, int]


@cache
def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Card(found.multi_processor_count, shared, (found.major, found.minor))


def card(device: torch.device) -> Card:
    """The card that `device` names; for the interpreter, a small one."""
    if device.type != "cuda":
        return Card(4, 99 * 1024, (8, 0))
    return _card(torch.cuda.current_device() if device.index is None else device.index)


LINE = 64
"""Numbers of half precision in a line of 128 bytes, as tiles lie in shared memory for Hopper's matrix units."""


def narrowest(dtype: torch.dtype) -> int:
    """Columns of the narrowest tiles: in half precision those that fill a line.

    `ptxas` 12.8, with which Triton 3.5 to 3.7 assemble for Hopper, is at fault where one place in shared memory is
    described to the matrix units in two ways, as a tile 64 bytes wide and as a wider one: the place is computed from a
    register that holds something else by then, and the product reads beyond the shared memory, or something else in it.
    Tiles that fill lines are described in one way, however wide they are.
    """
    return LINE if dtype in HALF else 16


_thread = threading.local()


def attend() -> None:
    """Make this thread one that the card knows: a descriptor of a tensor cannot be made in any other.

    Autograd's own threads are not, until they have launched something or have reserved memory from the driver.
    """
    if not INTERPRETED and not getattr(_thread, "attends", False):
        torch.cuda.Event().record()
        _thread.attends = True


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` is to multiply operands of this type: float32 in full precision, never as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def without_second_derivative(operator: Any) -> None:
    """Make differentiating `operator`, a backward pass, an error that says what to do."""

    def refuse(*_: Any) -> Any:
        raise BackendError(
            f"{operator._qualname} has no derivative of its own: the Triton kernels are differentiable once. "
            'For second derivatives compute under ostinato.backend("parallel")'
        )

    operator.register_autograd(refuse)


def power_of_two(size: int) -> int:
    """The least power of two that is no less than `size`."""
    return 1 << max(0, size - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels can call too, takes the host 30 times as long: 1.5 µs."""
    return -(-a // b)


_FITS: dict[Hashable, int] = {}


def fitting(key: Hashable, launch: Callable[[Any], Any], choices: Sequence[Any]) -> Any:
    """`launch` with the first of `choices`, from large to small, whose kernels the card has room for.

    Which one that is is remembered for `key`. Raises what the last one raises.
    """
    from triton.runtime.errors import OutOfResources

    for index in range(_FITS.get(key, 0), len(choices)):
        try:
            result = launch(choices[index])
        except OutOfResources:
            if index == len(choices) - 1:
                raise
            continue
        _FITS[key] = index
        return result
    raise ValueError("no choices")
