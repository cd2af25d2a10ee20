"""Cells: the one step of a nonlinear recurrence, as a small stateless object.

A cell says what happens in one step and nothing about time. Whatever of the input can be projected before
the recurrence starts is projected by the caller. The same cell runs as a loop (`recurrent_scan`) or for all
steps at once by Newton's method (`newton_scan`): to that end every cell works on any leading axes, says
which structure the Jacobian of its step has, and packs its state into the layout of that structure.

To add one: subclass `Cell`, as a frozen dataclass, with its state a NamedTuple. A Jacobian written by hand
is optional: automatic differentiation finds it otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.scan import BLOCK, DENSE, DIAGONAL, Affine

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


# --------------------------------------------------------------------------------------------------
# Head-wise cells: the recurrent matrix of every gate is block-diagonal, one block per head; one head is the
# ordinary dense cell. Recurrent weights R are (gates, heads, out, in), inputs (…, gates, heads, dim).


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

    def step_and_jacobian(self, weights: Weights, state: HiddenCell, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """∂c'/∂c = f, ∂c'/∂h = Σ over i, f, g of diag(·)R; h' follows c' through o(1 − tanh² c')."""
        r_i, r_f, r_g, r_o = weights[0].unbind(0)
        i, f, g, o = (inputs + recur(weights[0], state.hidden)).unbind(-3)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        cell = f * state.cell + i * g
        squashed = torch.tanh(cell)
        hidden = o * squashed
        cell_by_hidden = (
            _rows(g * i * (1 - i), r_i) + _rows(state.cell * f * (1 - f), r_f) + _rows(i * (1 - g * g), r_g)
        )
        through = o * (1 - squashed * squashed)
        hidden_by_hidden = _rows(through, cell_by_hidden) + _rows(hidden * (1 - o), r_o)
        top = torch.cat([hidden_by_hidden, torch.diag_embed(through * f)], dim=-1)
        bottom = torch.cat([cell_by_hidden, torch.diag_embed(f)], dim=-1)
        return torch.cat([hidden, cell], dim=-1), torch.cat([top, bottom], dim=-2)


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
        h = state.hidden
        r, z, candidate, n = self._gates(weights, h, inputs)
        through = (1 - z) * (1 - n * n)
        jacobian = _rows((h - n) * z * (1 - z), r_z) + _rows(through * r, r_n)
        jacobian = jacobian + _rows(through * candidate * r * (1 - r), r_r)
        return n + z * (h - n), jacobian + torch.diag_embed(z)


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


# --------------------------------------------------------------------------------------------------
# Cells made for Newton: the state meets itself channel by channel only.


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


# --------------------------------------------------------------------------------------------------
# A matrix state.


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
