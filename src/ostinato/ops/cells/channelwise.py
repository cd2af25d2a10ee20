"""Cells made for Newton: ParaGRU and ParaLSTM, whose state meets itself channel by channel only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.cells.protocol import Cell, Weights
from ostinato.ops.scan import BLOCK, DIAGONAL


class ChannelHidden(NamedTuple):
    """One number a channel."""

    hidden: Float[Tensor, "... channels"]


class ChannelCellHidden(NamedTuple):
    """Two numbers a channel."""

    cell: Float[Tensor, "... channels"]
    hidden: Float[Tensor, "... channels"]


def _check_channels(name: str, weights: Weights, shapes: tuple[int, ...], inputs: Tensor) -> None:
    if inputs.ndim < 2 or inputs.shape[-2] != 3:
        raise ShapeError(f"the inputs of {name} end in (3 gates, channels), got {tuple(inputs.shape)}")
    wanted = [(gates, inputs.shape[-1]) for gates in shapes]
    found = [tuple(weight.shape) for weight in weights]
    if found != wanted:
        raise ShapeError(f"the weights of {name} must have shapes {wanted}, got {found}")


@dataclass(frozen=True)
class ParaGRU(Cell):
    """A GRU whose state-to-state maps are diagonal, so its Jacobian is a vector.

        z = σ(a_z ⊙ h + x^z), r = σ(a_r ⊙ h + x^r), n = tanh(a_n ⊙ (h ⊙ r) + x^n), h' = (1 − z) ⊙ h + z ⊙ n.

    weights = (a,), a (3, channels) in the order z, r, n; inputs (…, 3, channels).
    Source: ParaRNN (arXiv 2510.21450), section 3.
    """

    structure = DIAGONAL

    def check(self, weights: Weights, inputs: Tensor) -> None:
        """Raise `ShapeError` for weights that do not fit the inputs."""
        _check_channels("ParaGRU", weights, (3,), inputs)

    def step(self, weights: Weights, state: ChannelHidden, inputs: Tensor) -> ChannelHidden:
        """One step."""
        (a,), h = weights, state.hidden
        z, r = torch.sigmoid(torch.addcmul(inputs[..., :2, :], a[:2], h.unsqueeze(-2))).unbind(-2)
        n = torch.tanh(torch.addcmul(inputs[..., 2, :], a[2], h * r))
        return ChannelHidden(torch.addcmul(h, z, n - h))

    def step_and_jacobian(self, weights: Weights, state: ChannelHidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """J = (1 − z)(1 + a_z z (n − h)) + a_n z r (1 − n²)(1 + a_r h (1 − r))."""
        (a,), h = weights, state.hidden
        z, r = torch.sigmoid(torch.addcmul(inputs[..., :2, :], a[:2], h.unsqueeze(-2))).unbind(-2)
        n = torch.tanh(torch.addcmul(inputs[..., 2, :], a[2], h * r))
        write = z * (n - h)
        keep = torch.addcmul(1 - z, 1 - z, a[0] * write)
        through = a[2] * z * r * (1 - n * n)
        return h + write, keep + torch.addcmul(through, through, a[1] * h * (1 - r))

    def output(self, state: ChannelHidden) -> Tensor:
        """The hidden vector."""
        return state.hidden

    def initial_state(self, inputs: Tensor) -> ChannelHidden:
        """Zeros."""
        return ChannelHidden(torch.zeros_like(inputs[..., 0, :]))

    def pack(self, state: ChannelHidden) -> Tensor:
        """The hidden vector."""
        return state.hidden

    def unpack(self, packed: Tensor) -> ChannelHidden:
        """The inverse of `pack`."""
        return ChannelHidden(packed)


@dataclass(frozen=True)
class ParaLSTM(Cell):
    """An LSTM with coupled gates and diagonal maps and peepholes: its Jacobian is 2×2 a channel.

        f = σ(a_f ⊙ h + p_f ⊙ c + x^f), z = tanh(a_z ⊙ h + x^z), c' = f ⊙ c + (1 − f) ⊙ z,
        o = σ(a_o ⊙ h + p_o ⊙ c' + x^o), h' = o ⊙ tanh(c').

    weights = (a, p): a (3, channels) in the order f, z, o; p (2, channels) in the order f, o; inputs
    (…, 3, channels). Source: ParaRNN (arXiv 2510.21450), section 3.
    """

    structure = BLOCK

    def check(self, weights: Weights, inputs: Tensor) -> None:
        """Raise `ShapeError` for weights that do not fit the inputs."""
        _check_channels("ParaLSTM", weights, (3, 2), inputs)

    def _forward(self, weights: Weights, state: ChannelCellHidden, inputs: Tensor) -> tuple[Tensor, ...]:
        a, p = weights
        pre = torch.addcmul(inputs, a, state.hidden.unsqueeze(-2))
        f = torch.sigmoid(torch.addcmul(pre[..., 0, :], p[0], state.cell))
        z = torch.tanh(pre[..., 1, :])
        cell = torch.addcmul(z, f, state.cell - z)
        o = torch.sigmoid(torch.addcmul(pre[..., 2, :], p[1], cell))
        return f, z, o, cell, torch.tanh(cell)

    def step(self, weights: Weights, state: ChannelCellHidden, inputs: Tensor) -> ChannelCellHidden:
        """One step."""
        _, _, o, cell, squashed = self._forward(weights, state, inputs)
        return ChannelCellHidden(cell, o * squashed)

    def step_and_jacobian(self, weights: Weights, state: ChannelCellHidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The block [[J_cc, J_ch], [J_hc, J_hh]] of equation 3.5 of the paper."""
        a, p = weights
        f, z, o, cell, squashed = self._forward(weights, state, inputs)
        hidden = o * squashed
        slope = (state.cell - z) * f * (1 - f)
        cell_cell = torch.addcmul(f, slope, p[0])
        cell_hidden = slope * a[0] + (1 - f) * (1 - z * z) * a[1]
        opened = hidden * (1 - o)
        through = opened * p[1] + o * (1 - squashed * squashed)
        rows = [cell_cell, cell_hidden, through * cell_cell, torch.addcmul(opened * a[2], through, cell_hidden)]
        return torch.stack([cell, hidden], dim=-2), torch.stack(rows, dim=-2).unflatten(-2, (2, 2))

    def output(self, state: ChannelCellHidden) -> Tensor:
        """The hidden vector."""
        return state.hidden

    def initial_state(self, inputs: Tensor) -> ChannelCellHidden:
        """Zeros."""
        zeros = torch.zeros_like(inputs[..., 0, :])
        return ChannelCellHidden(zeros, zeros)

    def pack(self, state: ChannelCellHidden) -> Tensor:
        """(…, 2, channels): cell, hidden."""
        return torch.stack([state.cell, state.hidden], dim=-2)

    def unpack(self, packed: Tensor) -> ChannelCellHidden:
        """The inverse of `pack`."""
        return ChannelCellHidden(packed[..., 0, :], packed[..., 1, :])
