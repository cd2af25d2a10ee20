"""Operators that are differentiable once, called without the dispatcher where nothing is being compiled.

A registered operator passes through `torch.compile`; called eagerly it costs a quarter of a millisecond of
a processor's time for a forward and a backward, which is as long as many of these kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ostinato.errors import BackendError
from ostinato.ops.kernels.triton import ahead


def _plainly(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing is being traced: neither by torch.compile nor, later, in a backward pass that it compiles."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return all(type(argument) in (Tensor, nn.Parameter) for argument in arguments if isinstance(argument, Tensor))


class _Once(torch.autograd.Function):
    """A backward pass whose own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *arguments: Any) -> Any:
        ctx.name = operator._qualname
        return operator._init_fn(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise BackendError(
            f"{ctx.name} has no derivative of its own: the Triton kernels are differentiable once. "
            'For second derivatives compute under ostinato.backend("parallel")'
        )


def call_once(operator: Any, *arguments: Any) -> Any:
    """What `operator`, a backward pass made by `torch.library.custom_op`, returns."""
    return _Once.apply(operator, *arguments) if _plainly(arguments) else operator(*arguments)


class _Context:
    """What a rehearsal's `setup` and `pull_back` find in place of autograd's context."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        self.saved_tensors: tuple[Any, ...] = ()
        self.materialize = True

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    def mark_non_differentiable(self, *_: Any) -> None:
        pass


def _rehearsal(operator: Any, setup: Callable[..., None], pull_back: Callable[..., Any], arguments: Any) -> None:
    """A forward pass and, where a gradient is wanted, a backward pass of the first output."""
    context = _Context(arguments)
    output = operator._init_fn(*arguments)
    if any(context.needs_input_grad):
        setup(context, arguments, output)
        first, *others = (torch.empty_like(o) for o in (output if isinstance(output, tuple) else (output,)))
        pull_back(context, first, *(other if context.materialize else None for other in others))


def eagerly(operator: Any, setup: Callable[..., None], pull_back: Callable[..., Any]) -> Callable[..., Any]:
    """`operator`, made by `torch.library.custom_op`, with the autograd that `register_autograd` is given."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = operator._init_fn(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return pull_back(ctx, *grads)

    def call(*arguments: Any) -> Any:
        if not _plainly(arguments):
            return operator(*arguments)
        if ahead.ENABLED:
            ahead.rehearse(operator._qualname, arguments, lambda: _rehearsal(operator, setup, pull_back, arguments))
        return Eager.apply(*arguments)

    return call
