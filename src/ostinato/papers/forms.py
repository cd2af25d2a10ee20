"""Whether several forms of one recurrence are the same function: outputs, last states and gradients, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gradients(call: Callable[..., tuple[Tensor, Tensor]], drawn: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, last state, and the gradients of a weighted sum of the outputs plus the sum of the state."""
    arguments = [argument.clone().requires_grad_() for argument in drawn]
    outputs, state = call(*arguments)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    gradients = torch.autograd.grad((outputs * weights).sum() + state.sum(), arguments)
    return [outputs.detach(), state.detach(), *gradients]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any two tensors over the largest magnitude of the one wanted."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
