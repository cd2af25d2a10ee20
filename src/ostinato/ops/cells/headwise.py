"""Head-wise cells: Elman, LSTM, GRU, sLSTM.

The recurrent matrix of every gate is block-diagonal, one block per head; one head is the ordinary dense
cell. Recurrent weights R are (gates, heads, out, in), inputs (…, gates, heads, dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.cells.protocol import Cell, State, Weights
from ostinato.ops.scan import DENSE


class Hidden(NamedTuple):
    """The state of a cell whose output is all that it remembers."""

    hidden: Float[Tensor, "... heads dim"]


class HiddenCell(NamedTuple):
    """An output and a cell, which is the memory."""

    hidden: Float[Tensor, "... heads dim"]
    cell: Float[Tensor, "... heads dim"]


class SLSTMState(NamedTuple):
    """Output, cell, normaliser and the stabiliser, which is a running maximum of logarithms."""

    hidden: Float[Tensor, "... heads dim"]
    cell: Float[Tensor, "... heads dim"]
    normalizer: Float[Tensor, "... heads dim"]
    maximum: Float[Tensor, "... heads dim"]


def recur(weight: Float[Tensor, "gates heads out in"], hidden: Float[Tensor, "... heads in"]) -> Tensor:
    """R h for every gate and head: (…, gates, heads, out). The weight is never copied."""
    gates, heads, out, dim = weight.shape
    if heads == 1:
        return F.linear(hidden.squeeze(-2), weight.reshape(gates * out, dim)).unflatten(-1, (gates, 1, out))
    lead = hidden.shape[:-2]
    columns = hidden.reshape(-1, heads, dim).permute(1, 2, 0)
    return (weight @ columns).permute(3, 0, 1, 2).reshape(*lead, gates, heads, out)


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    """diag(scale) R: scale (…, heads, out), R (heads, out, in)."""
    return scale.unsqueeze(-1) * weight


def _diagonal(weight: Tensor) -> Tensor:
    """diag R: (…, dim, dim) -> (…, dim)."""
    return weight.diagonal(dim1=-2, dim2=-1)


class _HeadwiseCell(Cell):
    gates: ClassVar[int]
    structure = DENSE
    state_type: ClassVar[Any]

    def output(self, state: State) -> Tensor:
        """The hidden vector, (…, heads, dim)."""
        return state.hidden

    def initial_state(self, inputs: Tensor) -> State:
        """Zeros."""
        zeros = torch.zeros_like(inputs[..., 0, :, :])
        return self.state_type(*[zeros] * len(self.state_type._fields))

    def pack(self, state: State) -> Tensor:
        """All parts side by side on the last axis."""
        return state[0] if len(state) == 1 else torch.cat(tuple(state), dim=-1)

    def unpack(self, packed: Tensor) -> State:
        """The inverse of `pack`."""
        return self.state_type(*packed.chunk(len(self.state_type._fields), dim=-1))

    def check(self, weights: Weights, inputs: Tensor) -> None:
        """Raise `ShapeError` unless inputs are (…, gates, heads, dim) and R (gates, heads, dim, dim)."""
        name = type(self).__name__
        if inputs.ndim < 3 or inputs.shape[-3] != self.gates:
            raise ShapeError(f"the inputs of {name} end in ({self.gates} gates, heads, dim), got {tuple(inputs.shape)}")
        _, heads, dim = inputs.shape[-3:]
        wanted = (self.gates, heads, dim, dim)
        if tuple(weights[0].shape) != wanted:
            raise ShapeError(f"the recurrent weight of {name} must be {wanted}, got {tuple(weights[0].shape)}")


@dataclass(frozen=True)
class Elman(_HeadwiseCell):
    """h_t = tanh(x_t + R h_{t−1}). weights = (R,), one gate.

    Source: Elman 1990; FlashRNN (arXiv 2412.07752), equation for the Elman cell.
    """

    gates = 1
    state_type = Hidden

    def step(self, weights: Weights, state: Hidden, inputs: Tensor) -> Hidden:
        """One step."""
        return Hidden(torch.tanh(inputs + recur(weights[0], state.hidden)).squeeze(-3))

    def step_and_jacobian(self, weights: Weights, state: Hidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(1 − h²) R."""
        hidden = self.step(weights, state, inputs).hidden
        return hidden, _rows(1 - hidden * hidden, weights[0][0])

    def step_and_diagonal(self, weights: Weights, state: Hidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(1 − h²) ⊙ diag R."""
        hidden = self.step(weights, state, inputs).hidden
        return hidden, (1 - hidden * hidden) * _diagonal(weights[0][0])


@dataclass(frozen=True)
class LSTM(_HeadwiseCell):
    """c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g), h_t = σ(o) ⊙ tanh(c_t); (i, f, g, o) = x_t + R h_{t−1}.

    weights = (R,); the gates in torch's order i, f, g, o. With one head it is `torch.nn.LSTM`.
    Source: Gers et al. 2000; FlashRNN (arXiv 2412.07752).
    """

    gates = 4
    state_type = HiddenCell

    def step(self, weights: Weights, state: HiddenCell, inputs: Tensor) -> HiddenCell:
        """One step."""
        i, f, g, o = (inputs + recur(weights[0], state.hidden)).unbind(-3)
        cell = torch.addcmul(torch.sigmoid(f) * state.cell, torch.sigmoid(i), torch.tanh(g))
        return HiddenCell(torch.sigmoid(o) * torch.tanh(cell), cell)

    def _slopes(self, weights: Weights, state: HiddenCell, inputs: Tensor) -> tuple[Tensor, ...]:
        """New hidden and cell, f, ∂h'/∂c', and what i, f, g add to c', and o to h', per unit of R h."""
        i, f, g, o = (inputs + recur(weights[0], state.hidden)).unbind(-3)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        cell = f * state.cell + i * g
        squashed = torch.tanh(cell)
        hidden = o * squashed
        by_i, by_f, by_g = g * i * (1 - i), state.cell * f * (1 - f), i * (1 - g * g)
        return hidden, cell, f, o * (1 - squashed * squashed), by_i, by_f, by_g, hidden * (1 - o)

    def step_and_jacobian(self, weights: Weights, state: HiddenCell, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """∂c'/∂c = f, ∂c'/∂h = Σ over i, f, g of diag(·)R; h' follows c' through o(1 − tanh² c')."""
        r_i, r_f, r_g, r_o = weights[0].unbind(0)
        hidden, cell, f, through, by_i, by_f, by_g, by_o = self._slopes(weights, state, inputs)
        cell_by_hidden = _rows(by_i, r_i) + _rows(by_f, r_f) + _rows(by_g, r_g)
        hidden_by_hidden = _rows(through, cell_by_hidden) + _rows(by_o, r_o)
        top = torch.cat([hidden_by_hidden, torch.diag_embed(through * f)], dim=-1)
        bottom = torch.cat([cell_by_hidden, torch.diag_embed(f)], dim=-1)
        return torch.cat([hidden, cell], dim=-1), torch.cat([top, bottom], dim=-2)

    def step_and_diagonal(self, weights: Weights, state: HiddenCell, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """∂h'/∂h and ∂c'/∂c, with diag R for R."""
        r_i, r_f, r_g, r_o = _diagonal(weights[0]).unbind(0)
        hidden, cell, f, through, by_i, by_f, by_g, by_o = self._slopes(weights, state, inputs)
        by_hidden = through * (by_i * r_i + by_f * r_f + by_g * r_g) + by_o * r_o
        return torch.cat([hidden, cell], dim=-1), torch.cat([by_hidden, f], dim=-1)


@dataclass(frozen=True)
class GRU(_HeadwiseCell):
    """n = tanh(x^n + r ⊙ (R^n h + b)), h_t = z ⊙ h_{t−1} + (1 − z) ⊙ n; r, z = σ(x + R h).

    weights = (R, b): the gates of R and of the inputs in torch's order r, z, n; b (heads, dim) is the
    recurrent bias of n, which the reset gate multiplies. With one head it is `torch.nn.GRU`.
    Source: Cho et al. 2014, reset after the product; FlashRNN (arXiv 2412.07752).
    """

    gates = 3
    state_type = Hidden

    def check(self, weights: Weights, inputs: Tensor) -> None:
        """Raise `ShapeError` for weights that do not fit the inputs."""
        super().check(weights, inputs)
        if len(weights) != 2 or weights[1].shape != inputs.shape[-2:]:
            raise ShapeError(f"GRU takes (R, b) with b of shape {tuple(inputs.shape[-2:])} (heads, dim)")

    def _gates(self, weights: Weights, hidden: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        product = recur(weights[0], hidden)
        r, z = torch.sigmoid(inputs[..., :2, :, :] + product[..., :2, :, :]).unbind(-3)
        candidate = product[..., 2, :, :] + weights[1]
        return r, z, candidate, torch.tanh(torch.addcmul(inputs[..., 2, :, :], r, candidate))

    def step(self, weights: Weights, state: Hidden, inputs: Tensor) -> Hidden:
        """One step."""
        _, z, _, n = self._gates(weights, state.hidden, inputs)
        return Hidden(torch.addcmul(n, z, state.hidden - n))

    def step_and_jacobian(self, weights: Weights, state: Hidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(z) + diag((h − n)z(1 − z))R^z + diag((1 − z)(1 − n²))(diag(r)R^n + diag(ĝr(1 − r))R^r)."""
        r_r, r_z, r_n = weights[0].unbind(0)
        value, z, by_r, by_z, by_n = self._slopes(weights, state, inputs)
        return value, _rows(by_r, r_r) + _rows(by_z, r_z) + _rows(by_n, r_n) + torch.diag_embed(z)

    def step_and_diagonal(self, weights: Weights, state: Hidden, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The same with diag R for R."""
        r_r, r_z, r_n = _diagonal(weights[0]).unbind(0)
        value, z, by_r, by_z, by_n = self._slopes(weights, state, inputs)
        return value, by_r * r_r + by_z * r_z + by_n * r_n + z

    def _slopes(self, weights: Weights, state: Hidden, inputs: Tensor) -> tuple[Tensor, ...]:
        """The new hidden vector, z, and what each gate adds to it per unit of R h."""
        h = state.hidden
        r, z, candidate, n = self._gates(weights, h, inputs)
        through = (1 - z) * (1 - n * n)
        return n + z * (h - n), z, through * candidate * r * (1 - r), (h - n) * z * (1 - z), through * r


@dataclass(frozen=True)
class SLSTM(_HeadwiseCell):
    """An LSTM with an exponential input gate, a normaliser and a stabiliser in the logarithm.

    With (i, f, z, o) = x_t + R h_{t−1}:
        m_t = max(i, log σ(f) + m_{t−1}), on a fresh state (n_{t−1} = 0) just i;
        i' = e^{i − m_t},  f' = e^{log σ(f) + m_{t−1} − m_t};
        c_t = f' c_{t−1} + i' tanh(z),  n_t = max(f' n_{t−1} + i', 1),  h_t = σ(o) ⊙ c_t / n_t.

    weights = (R,). Source: xLSTM (arXiv 2405.04517), section 2.2; FlashRNN (arXiv 2412.07752), whose
    kernels have the floor of 1 under n. It never binds: one of i', f' is 1, and n ≥ 1 from the first step
    on; hence n = 0 marks a fresh state, element by element, in every row of a batch for itself.
    """

    gates = 4
    state_type = SLSTMState

    def step(self, weights: Weights, state: SLSTMState, inputs: Tensor) -> SLSTMState:
        """One step."""
        i, f, z, o = (inputs + recur(weights[0], state.hidden)).unbind(-3)
        carried = F.logsigmoid(f) + state.maximum
        maximum = torch.where(state.normalizer == 0, i, torch.maximum(i, carried))
        write = torch.exp(i - maximum)
        # On a fresh state the exponent can be positive, and e^∞ · 0 would be NaN; anywhere else it is ≤ 0.
        keep = torch.exp((carried - maximum).clamp(max=0))
        cell = torch.addcmul(keep * state.cell, write, torch.tanh(z))
        normalizer = torch.addcmul(write, keep, state.normalizer).clamp(min=1)
        return SLSTMState(torch.sigmoid(o) * cell / normalizer, cell, normalizer, maximum)
