"""The protocol of cells, and what holds for all of them: Jacobians by automatic differentiation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ostinato.ops.scan import BLOCK, DIAGONAL, Affine

Weights = tuple[Tensor, ...]
Inputs = Any
"""The inputs of a step: one tensor, or a tuple of tensors."""
State = Any
"""The state of a step: a NamedTuple of tensors."""


class Cell:
    """h_t = f(h_{t−1}, x_t): the protocol.

    `…` below are leading axes, the same for states and inputs: (batch,) in a loop, (batch, time) in Newton.
    """

    structure: ClassVar[Affine]
    """The structure of ∂f/∂h on the packed state: `DIAGONAL`, `BLOCK` or `DENSE` of `ostinato.ops.scan`."""

    def step(self, weights: Weights, state: State, inputs: Inputs) -> State:
        """The state after one step: a pure function."""
        raise NotImplementedError(f"{type(self).__name__} does not define step")

    def output(self, state: State) -> Tensor:
        """What a layer reads from the state."""
        raise NotImplementedError(f"{type(self).__name__} does not define output")

    def initial_state(self, inputs: Inputs) -> State:
        """The state before the first step, for inputs of one step: zeros, as every reset makes it."""
        raise NotImplementedError(f"{type(self).__name__} does not define initial_state")

    def pack(self, state: State) -> Tensor:
        """The state as one tensor: diagonal (…, channels), block (…, k, channels), dense (…, d)."""
        raise NotImplementedError(f"{type(self).__name__} does not define pack")

    def unpack(self, packed: Tensor) -> State:
        """The inverse of `pack`."""
        raise NotImplementedError(f"{type(self).__name__} does not define unpack")

    def check(self, weights: Weights, inputs: Inputs) -> None:
        """Raise `ShapeError` where weights and inputs (of one step) do not fit together."""

    def step_and_jacobian(self, weights: Weights, state: State, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """f(h, x) packed, and ∂f/∂h in the cell's structure; by automatic differentiation unless overridden."""
        return autodiff_jacobian(self, weights, state, inputs)

    def step_and_diagonal(self, weights: Weights, state: State, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """f(h, x) packed, and the diagonal of ∂f/∂h; overridden where it costs less than the whole."""
        value, jacobian = self.step_and_jacobian(weights, state, inputs)
        return value, diagonal_of(self, jacobian)


def autodiff_jacobian(cell: Cell, weights: Weights, state: State, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """f(h, x) packed, and its Jacobian in the cell's structure, by reverse-mode differentiation.

    A diagonal Jacobian takes one pull-back (of ones), a k×k block one for each of its k rows, a dense one
    for each of its d rows, whatever the number of time steps. Differentiable itself.
    """

    def packed_step(packed: Tensor) -> Tensor:
        return cell.pack(cell.step(weights, cell.unpack(packed), inputs))

    value, pull_back = torch.func.vjp(packed_step, cell.pack(state))
    if cell.structure is DIAGONAL:
        return value, pull_back(torch.ones_like(value))[0]
    axis = -2 if cell.structure is BLOCK else -1
    rows = []
    for row in range(value.shape[axis]):
        basis = torch.zeros_like(value)
        basis.select(axis, row).fill_(1)
        rows.append(pull_back(basis)[0])
    return value, torch.stack(rows, dim=-3 if cell.structure is BLOCK else -2)


def diagonal_of(cell: Cell, jacobian: Tensor) -> Tensor:
    """The diagonal of a Jacobian in the cell's structure, shaped as the packed state."""
    if cell.structure is DIAGONAL:
        return jacobian
    if cell.structure is BLOCK:
        return jacobian.diagonal(dim1=-3, dim2=-2).transpose(-1, -2)
    return jacobian.diagonal(dim1=-2, dim2=-1)
