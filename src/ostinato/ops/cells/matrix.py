"""The cell with a matrix for a state: M²RNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.cells.protocol import Cell, Inputs, Weights
from ostinato.ops.scan import DENSE


class Memory(NamedTuple):
    """A matrix for each head."""

    memory: Float[Tensor, "... heads key_dim value_dim"]


class _ClipGradient(torch.autograd.Function):
    """The identity, whose backward clamps the gradient elementwise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bound: float, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bound = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad.clamp(-ctx.bound, ctx.bound)


@dataclass(frozen=True)
class M2RNN(Cell):
    """Z = tanh(H_{t−1} W + k_t v_tᵀ), H_t = f_t H_{t−1} + (1 − f_t) Z.

    weights = (W,), (heads, value_dim, value_dim); inputs (k, v, f): (…, heads, key_dim),
    (…, heads, value_dim), (…, heads). The rows of H evolve independently of each other, so the Jacobian is
    one value_dim × value_dim matrix for each row: f I + (1 − f) diag(1 − z²) Wᵀ.

    Args:
        gradient_clip: clamp the gradient that reaches a state from the next step elementwise to ±this
            (the read-out's own part is added after, as in the paper's kernel). The result is then no
            derivative any more; `newton_scan` refuses it.

    Source: M²RNN (arXiv 2603.14360), sections 3 and 4.
    """

    gradient_clip: float | None = None
    structure = DENSE

    def check(self, weights: Weights, inputs: Inputs) -> None:
        """Raise `ShapeError` for inputs and weights that do not fit together."""
        if not isinstance(inputs, tuple) or len(inputs) != 3:
            raise ShapeError("M2RNN takes three inputs: keys, values, forget gates")
        keys, values, forget = inputs
        wanted = (*values.shape[-2:], values.shape[-1])
        if tuple(weights[0].shape) != wanted:
            raise ShapeError(f"the weight of M2RNN must be {wanted}, got {tuple(weights[0].shape)}")
        if keys.shape[:-1] != values.shape[:-1] or forget.shape != values.shape[:-1]:
            raise ShapeError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and forget gates {tuple(forget.shape)} of "
                "M2RNN must agree up to and including heads"
            )

    def _candidate(self, weights: Weights, memory: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        keys, values, forget = inputs
        write = keys.unsqueeze(-1) * values.unsqueeze(-2)
        return torch.tanh(memory @ weights[0] + write), forget[..., None, None]

    def step(self, weights: Weights, state: Memory, inputs: Inputs) -> Memory:
        """One step."""
        memory = state.memory
        if self.gradient_clip is not None:
            memory = _ClipGradient.apply(self.gradient_clip, memory)
        candidate, forget = self._candidate(weights, memory, inputs)
        return Memory(torch.addcmul(candidate, forget, memory - candidate))

    def step_and_jacobian(self, weights: Weights, state: Memory, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """J = f I + (1 − f) diag(1 − z²) Wᵀ for each row."""
        candidate, forget = self._candidate(weights, state.memory, inputs)
        value = torch.addcmul(candidate, forget, state.memory - candidate)
        slope = (1 - forget) * (1 - candidate * candidate)
        turned = slope.unsqueeze(-1) * weights[0].transpose(-1, -2).unsqueeze(-3)
        return value, turned + torch.diag_embed(forget.expand_as(candidate))

    def step_and_diagonal(self, weights: Weights, state: Memory, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """f + (1 − f)(1 − z²) ⊙ diag W."""
        candidate, forget = self._candidate(weights, state.memory, inputs)
        value = torch.addcmul(candidate, forget, state.memory - candidate)
        turned = weights[0].diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        return value, forget + (1 - forget) * (1 - candidate * candidate) * turned

    def output(self, state: Memory) -> Tensor:
        """The whole matrix; the read-out is the layer's."""
        return state.memory

    def initial_state(self, inputs: Inputs) -> Memory:
        """Zeros."""
        return Memory(torch.zeros_like(inputs[0].unsqueeze(-1) * inputs[1].unsqueeze(-2)))

    def pack(self, state: Memory) -> Tensor:
        """The matrix: its rows are the vectors that Newton works on."""
        return state.memory

    def unpack(self, packed: Tensor) -> Memory:
        """The inverse of `pack`."""
        return Memory(packed)
