"""Every cell against an independent loop over scalars, and every Jacobian against automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.cells import (
    GRU,
    LSTM,
    M2RNN,
    SLSTM,
    Cell,
    Elman,
    Memory,
    ParaGRU,
    ParaLSTM,
    SLSTMState,
    autodiff_jacobian,
    diagonal_of,
)
from ostinato.ops.recurrent_scan import recurrent_scan
from ostinato.ops.scan import BLOCK, DENSE, DIAGONAL

BATCH, TIME, HEADS, DIM, KEYS = 2, 6, 2, 3, 4


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make(name: str, heads: int = HEADS, time: int = TIME):
    """A cell, weights, inputs, and a state to start from."""
    torch.manual_seed(len(name) + heads)
    gates = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}.get(name, 3)
    cell: Cell = {
        "elman": Elman(),
        "lstm": LSTM(),
        "gru": GRU(),
        "slstm": SLSTM(),
        "para_gru": ParaGRU(),
        "para_lstm": ParaLSTM(),
        "m2rnn": M2RNN(),
    }[name]
    if name.startswith("para"):
        weights = (0.4 * randn(3, DIM),) if name == "para_gru" else (0.4 * randn(3, DIM), 0.4 * randn(2, DIM))
        inputs = randn(BATCH, time, 3, DIM)
    elif name == "m2rnn":
        weights = (torch.eye(DIM, dtype=torch.float64) + 0.2 * randn(heads, DIM, DIM),)
        inputs = (
            randn(BATCH, time, heads, KEYS),
            randn(BATCH, time, heads, DIM),
            torch.rand(BATCH, time, heads, dtype=torch.float64),
        )
    else:
        weights = (0.6 * randn(gates, heads, DIM, DIM),) + ((randn(heads, DIM),) if name == "gru" else ())
        inputs = randn(BATCH, time, gates, heads, DIM)
    first = inputs[:, 0] if isinstance(inputs, Tensor) else tuple(part[:, 0] for part in inputs)
    zero = cell.initial_state(first)
    state = type(zero)(*(torch.rand_like(leaf) * 0.5 + 0.2 for leaf in zero))
    return cell, weights, inputs, state


NAMES = ["elman", "lstm", "gru", "slstm", "para_gru", "para_lstm", "m2rnn"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def scalar_step(name: str, weights, x, state):
    """One step for one row of the batch and one head, in Python floats: the equations of the papers.

    weights, x: nested lists of the head; state: a list of lists, one list a part.
    """
    dims = range(DIM)
    if name == "para_gru":
        (a,), (h,) = weights, state
        z = [sigmoid(a[0][j] * h[j] + x[0][j]) for j in dims]
        r = [sigmoid(a[1][j] * h[j] + x[1][j]) for j in dims]
        n = [math.tanh(a[2][j] * (h[j] * r[j]) + x[2][j]) for j in dims]
        return [[(1 - z[j]) * h[j] + z[j] * n[j] for j in dims]]
    if name == "para_lstm":
        (a, p), (c, h) = weights, state
        f = [sigmoid(a[0][j] * h[j] + p[0][j] * c[j] + x[0][j]) for j in dims]
        z = [math.tanh(a[1][j] * h[j] + x[1][j]) for j in dims]
        new = [f[j] * c[j] + (1 - f[j]) * z[j] for j in dims]
        o = [sigmoid(a[2][j] * h[j] + p[1][j] * new[j] + x[2][j]) for j in dims]
        return [new, [o[j] * math.tanh(new[j]) for j in dims]]
    if name == "m2rnn":
        (w,), (k, v, f), (h,) = weights, x, state
        rows = range(KEYS)
        z = [[math.tanh(sum(h[i][m] * w[m][j] for m in dims) + k[i] * v[j]) for j in dims] for i in rows]
        return [[[f * h[i][j] + (1 - f) * z[i][j] for j in dims] for i in rows]]
    matrix, h = weights[0], state[0]
    product = [[sum(gate[i][j] * h[j] for j in dims) for i in dims] for gate in matrix]
    if name == "gru":
        bias = weights[1]
        r = [sigmoid(x[0][j] + product[0][j]) for j in dims]
        z = [sigmoid(x[1][j] + product[1][j]) for j in dims]
        n = [math.tanh(x[2][j] + r[j] * (product[2][j] + bias[j])) for j in dims]
        return [[z[j] * h[j] + (1 - z[j]) * n[j] for j in dims]]
    pre = [[x[g][j] + product[g][j] for j in dims] for g in range(len(matrix))]
    if name == "elman":
        return [[math.tanh(pre[0][j]) for j in dims]]
    if name == "lstm":
        i, f, g, o = pre
        c = [sigmoid(f[j]) * state[1][j] + sigmoid(i[j]) * math.tanh(g[j]) for j in dims]
        return [[sigmoid(o[j]) * math.tanh(c[j]) for j in dims], c]
    i, f, z, o = pre
    _, c, n, m = state
    fresh = all(value == 0 for value in n)
    top = [i[j] if fresh else max(i[j], log_sigmoid(f[j]) + m[j]) for j in dims]
    write = [math.exp(i[j] - top[j]) for j in dims]
    keep = [math.exp(log_sigmoid(f[j]) + m[j] - top[j]) for j in dims]
    c = [keep[j] * c[j] + write[j] * math.tanh(z[j]) for j in dims]
    n = [max(keep[j] * n[j] + write[j], 1.0) for j in dims]
    return [[sigmoid(o[j]) * c[j] / n[j] for j in dims], c, n, top]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_its_papers_equations(name, fresh):
    cell, weights, inputs, state = make(name)
    if fresh:
        state = type(state)(*(torch.zeros_like(leaf) for leaf in state))
    outputs, last = recurrent_scan(cell, weights, inputs, state)
    heads = range(1) if name.startswith("para") else range(HEADS)
    for row in range(BATCH):
        for head in heads:
            if name.startswith("para"):
                scalars = [leaf[row].tolist() for leaf in state]
                w = [weight.tolist() for weight in weights]
            else:
                scalars = [leaf[row, head].tolist() for leaf in state]
                w = [weights[0][head].tolist() if name == "m2rnn" else weights[0][:, head].tolist()]
                w += [weight[head].tolist() for weight in weights[1:]]
            for t in range(TIME):
                if name == "m2rnn":
                    x = [part[row, t, head].tolist() for part in inputs]
                elif name.startswith("para"):
                    x = inputs[row, t].tolist()
                else:
                    x = inputs[row, t, :, head].tolist()
                scalars = scalar_step(name, w, x, scalars)
                found = outputs[row, t] if name.startswith("para") else outputs[row, t, head]
                wanted = torch.tensor(scalars[1] if name == "para_lstm" else scalars[0], dtype=torch.float64)
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
            for leaf, wanted in zip(last, scalars, strict=True):
                found = leaf[row] if name.startswith("para") else leaf[row, head]
                torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_jacobian_is_the_derivative(name, heads):
    cell, weights, inputs, state = make(name, heads)
    many = type(state)(*(leaf.unsqueeze(1).expand(-1, TIME, *leaf.shape[1:]).clone() for leaf in state))
    for part in many:
        part += 0.1 * torch.randn_like(part)
    value, jacobian = cell.step_and_jacobian(weights, many, inputs)
    also, by_autodiff = autodiff_jacobian(cell, weights, many, inputs)
    packed = cell.pack(cell.step(weights, many, inputs))
    torch.testing.assert_close(value, packed, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(also, packed, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(jacobian, by_autodiff, rtol=1e-12, atol=1e-12)

    # Against the full Jacobian of one element of batch and time: nothing lies outside the structure.
    here = cell.pack(many)[1, 2]
    x = inputs[1, 2] if isinstance(inputs, Tensor) else tuple(part[1, 2] for part in inputs)
    full = torch.func.jacrev(lambda h: cell.pack(cell.step(weights, cell.unpack(h), x)))(here)
    found = jacobian[1, 2]
    if cell.structure is DIAGONAL:
        rebuilt = torch.diag_embed(found)
    elif cell.structure is BLOCK:
        rebuilt = torch.diag_embed(found).transpose(1, 2)  # (i, j, c, c') -> (i, c, j, c')
    else:
        assert cell.structure is DENSE
        lead = here.shape[:-1]
        rebuilt = torch.zeros_like(full)
        for index in torch.cartesian_prod(*(torch.arange(size) for size in lead)).view(-1, len(lead)).tolist():
            rebuilt[(*index, slice(None), *index)] = found[tuple(index)]
    torch.testing.assert_close(full, rebuilt, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_pack_and_unpack_are_inverse(name):
    cell, _, _, state = make(name)
    again = cell.unpack(cell.pack(state))
    assert type(again) is type(state)
    for found, wanted in zip(again, state, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_diagonal_of(name):
    cell, weights, inputs, state = make(name)
    first = inputs[:, 0] if isinstance(inputs, Tensor) else tuple(part[:, 0] for part in inputs)
    value, jacobian = cell.step_and_jacobian(weights, state, first)
    diagonal = diagonal_of(cell, jacobian)
    assert diagonal.shape == value.shape
    for found, wanted in zip(cell.step_and_diagonal(weights, state, first), (value, diagonal), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
    h = cell.pack(state).clone().requires_grad_()
    index = tuple(size - 1 for size in h.shape)
    (row,) = torch.autograd.grad(cell.pack(cell.step(weights, cell.unpack(h), first))[index], h)
    torch.testing.assert_close(diagonal[index], row[index])


def test_slstm_normalizer_never_meets_its_floor():
    cell, weights, inputs, _ = make("slstm", time=40)
    state = cell.initial_state(inputs[:, 0])
    for t in range(40):
        i, f = (inputs[:, t] + torch.einsum("ghoi,bhi->bgho", weights[0], state.hidden)).unbind(1)[:2]
        carried = torch.nn.functional.logsigmoid(f) + state.maximum
        m = i if t == 0 else torch.maximum(i, carried)
        without = torch.exp(carried - m).clamp(max=1) * state.normalizer + torch.exp(i - m)
        state = cell.step(weights, state, inputs[:, t])
        torch.testing.assert_close(state.normalizer, without, rtol=1e-13, atol=0)
        assert (state.normalizer >= 1).all()


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_slstm_survives_extreme_gates(size):
    cell, weights, inputs, _ = make("slstm")
    inputs = inputs.float().clone()
    inputs[:, :, :2] = size
    inputs.requires_grad_()
    outputs, last = recurrent_scan(cell, (weights[0].float(),), inputs)
    (grad,) = torch.autograd.grad(outputs.sum() + last.cell.sum(), inputs)
    assert torch.isfinite(outputs).all() and torch.isfinite(grad).all()


def test_slstm_starts_fresh_where_the_normalizer_is_zero():
    cell, weights, inputs, state = make("slstm")
    mixed = SLSTMState(*(leaf.clone() for leaf in state))
    for leaf in mixed:
        leaf[0] = 0
    found = cell.step(weights, mixed, inputs[:, 0])
    alone = cell.step(weights, SLSTMState(*(leaf[:1] for leaf in mixed)), inputs[:1, 0])
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a[:1], b)


def test_m2rnn_backward_by_hand():
    """Card 39, equation 9, for the loss Σ_t ⟨H_t, G_t⟩."""
    cell, (w,), (k, v, f), state = make("m2rnn")
    w, k, v, f = (t.clone().requires_grad_() for t in (w, k, v, f))
    outputs, _ = recurrent_scan(cell, (w,), (k, v, f), state)
    upstream = randn(*outputs.shape)
    grads = torch.autograd.grad((outputs * upstream).sum(), (w, k, v, f))
    with torch.no_grad():
        before = torch.cat([state.memory.unsqueeze(1), outputs[:, :-1]], dim=1)
        dw, dk, dv, df = (torch.zeros_like(t) for t in (w, k, v, f))
        carried = torch.zeros_like(state.memory)
        for t in reversed(range(TIME)):
            delta = carried + upstream[:, t]
            gate = f[:, t, :, None, None]
            z = torch.tanh(before[:, t] @ w + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2))
            df[:, t] = (delta * (before[:, t] - z)).sum((-1, -2))
            dx = (1 - gate) * delta * (1 - z * z)
            carried = gate * delta + dx @ w.mT
            dw += (before[:, t].mT @ dx).sum(0)
            dk[:, t] = (dx * v[:, t].unsqueeze(-2)).sum(-1)
            dv[:, t] = (dx * k[:, t].unsqueeze(-1)).sum(-2)
    for found, wanted in zip(grads, (dw, dk, dv, df), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_m2rnn_gradient_clip_bounds_what_the_next_step_sends():
    _, weights, inputs, state = make("m2rnn", time=2)
    memory = state.memory.clone().requires_grad_()
    first = tuple(part[:, 0] for part in inputs)

    def gradient(cell: M2RNN) -> Tensor:
        return torch.autograd.grad(100 * cell.step(weights, Memory(memory), first).memory.sum(), memory)[0]

    free, clipped = gradient(M2RNN()), gradient(M2RNN(gradient_clip=0.5))
    assert free.abs().max() > 1
    torch.testing.assert_close(clipped, free.clamp(-0.5, 0.5))
    torch.testing.assert_close(gradient(M2RNN(gradient_clip=1e9)), free)


@pytest.mark.parametrize("name", NAMES)
def test_misfits_are_named(name):
    cell, weights, inputs, _ = make(name)
    wrong = (weights[0][..., :-1], *weights[1:])
    with pytest.raises(ShapeError, match="must"):
        recurrent_scan(cell, wrong, inputs)
    if name == "m2rnn":
        with pytest.raises(ShapeError, match="three inputs"):
            recurrent_scan(cell, weights, inputs[0])
        with pytest.raises(ShapeError, match="agree"):
            recurrent_scan(cell, weights, (inputs[0], inputs[1], inputs[2][..., :1]))
    else:
        with pytest.raises(ShapeError, match="gates"):
            recurrent_scan(cell, weights, torch.cat([inputs, inputs], dim=2))
    if name == "gru":
        with pytest.raises(ShapeError, match="R, b"):
            recurrent_scan(cell, weights[:1], inputs)
