"""The loop: states, resets, types, transforms, errors."""

from __future__ import annotations

import pytest
import torch

import ostinato
from ostinato.errors import BackendError, DtypeError, NonFiniteError, ShapeError
from ostinato.ops.cells import GRU, LSTM, M2RNN, SLSTM, Cell, Elman, Hidden
from ostinato.ops.recurrent_scan import recurrent_scan


def lstm(batch: int = 2, time: int = 9, heads: int = 2, dim: int = 3, dtype: torch.dtype = torch.float64):
    weights = (0.5 * torch.randn(4, heads, dim, dim, dtype=dtype),)
    return LSTM(), weights, torch.randn(batch, time, 4, heads, dim, dtype=dtype)


@pytest.mark.parametrize("time", [1, 2, 9])
def test_split_anywhere(time):
    cell, weights, inputs = lstm(time=time)
    outputs, last = recurrent_scan(cell, weights, inputs)
    for t in range(1, time):
        first, state = recurrent_scan(cell, weights, inputs[:, :t])
        second, end = recurrent_scan(cell, weights, inputs[:, t:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), outputs, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(end, last, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(outputs[:, -1], last.hidden)


def test_reset_is_a_new_sequence():
    cell, weights, inputs = lstm(batch=1)
    _, state = recurrent_scan(cell, weights, inputs)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [0, 4]] = True
    outputs, last = recurrent_scan(cell, weights, inputs, state, reset=reset)
    first, _ = recurrent_scan(cell, weights, inputs[:, :4])
    second, end = recurrent_scan(cell, weights, inputs[:, 4:])
    torch.testing.assert_close(outputs, torch.cat([first, second], 1))
    torch.testing.assert_close(last, end)


def test_reset_forgets_even_infinity():
    cell, weights, inputs = lstm(batch=1)
    _, state = recurrent_scan(cell, weights, inputs)
    broken = type(state)(*(torch.full_like(leaf, torch.inf) for leaf in state))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 0] = True
    outputs, _ = recurrent_scan(cell, weights, inputs, broken, reset=reset)
    torch.testing.assert_close(outputs, recurrent_scan(cell, weights, inputs)[0])


def test_half_precision_keeps_its_state_in_float32():
    cell, weights, inputs = lstm(time=30)
    exact, _ = recurrent_scan(cell, weights, inputs)
    half = (weights[0].bfloat16(),)
    outputs, last = recurrent_scan(cell, half, inputs.bfloat16())
    assert outputs.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in last} == {torch.float32}
    torch.testing.assert_close(outputs.double(), exact, rtol=0.05, atol=0.02)


def test_float32_is_close_to_float64():
    cell, weights, inputs = lstm(time=50)
    exact, _ = recurrent_scan(cell, weights, inputs)
    outputs, _ = recurrent_scan(cell, (weights[0].float(),), inputs.float())
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_long_sequence():
    inputs = torch.randn(1, 100_003, 1, 1, 1)
    with torch.no_grad():
        outputs, last = recurrent_scan(Elman(), (torch.full((1, 1, 1, 1), 0.5),), inputs)
    assert outputs.shape == (1, 100_003, 1, 1)
    assert torch.equal(outputs[:, -1], last.hidden)
    again, _ = recurrent_scan(Elman(), (torch.full((1, 1, 1, 1), 0.5),), inputs[:, -60:])
    torch.testing.assert_close(again[:, -1], outputs[:, -1])


@pytest.mark.parametrize("cell", [Elman(), GRU(), SLSTM()])
def test_derivatives(cell):
    gates = {"Elman": 1, "GRU": 3, "SLSTM": 4}[type(cell).__name__]
    weights = [0.5 * torch.randn(gates, 2, 1, 1, dtype=torch.float64)]
    if gates == 3:
        weights.append(torch.randn(2, 1, dtype=torch.float64))
    inputs = torch.randn(1, 3, gates, 2, 1, dtype=torch.float64)
    state = cell.initial_state(inputs[:, 0])
    leaves = [torch.rand_like(leaf) + 1.2 for leaf in state]
    arguments = [t.requires_grad_() for t in (*weights, inputs, *leaves)]
    count = len(weights)

    def run(*tensors):
        outputs, last = recurrent_scan(cell, tensors[:count], tensors[count], type(state)(*tensors[count + 1 :]))
        return outputs, *last

    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


def test_vmap_over_seeds():
    cell, _, inputs = lstm()
    weights = 0.5 * torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)

    def loss(weight):
        return recurrent_scan(cell, (weight,), inputs)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(weights)
    wanted = torch.stack([torch.func.grad(loss)(weight) for weight in weights])
    torch.testing.assert_close(found, wanted)


def test_compile_traces_the_loop():
    cell, weights, inputs = lstm(time=4)
    compiled = torch.compile(recurrent_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cell, weights, inputs)[0], recurrent_scan(cell, weights, inputs)[0])


def test_errors():
    cell, weights, inputs = lstm()
    with pytest.raises(ShapeError, match="empty along time"):
        recurrent_scan(cell, weights, inputs[:, :0])
    with pytest.raises(DtypeError, match="floating"):
        recurrent_scan(cell, weights, inputs.long())
    with pytest.raises(ShapeError, match="state of LSTM"):
        recurrent_scan(cell, weights, inputs, Hidden(torch.zeros(2, 2, 3)))
    with pytest.raises(ShapeError, match="reset"):
        recurrent_scan(cell, weights, inputs, reset=torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(DtypeError, match="reset must be bool"):
        recurrent_scan(cell, weights, inputs, reset=torch.zeros(2, 9))
    keys, values, forget = torch.randn(2, 5, 1, 3), torch.randn(2, 5, 1, 2), torch.rand(2, 4, 1)
    with pytest.raises(ShapeError, match="batch and time"):
        recurrent_scan(M2RNN(), (torch.eye(2).unsqueeze(0),), (keys, values, forget))
    with pytest.raises(NonFiniteError, match="inputs"):
        recurrent_scan(cell, weights, inputs * torch.nan, validate=True)
    with pytest.raises(NonFiniteError, match="weights"):
        recurrent_scan(cell, (weights[0] * torch.inf,), inputs, validate=True)
    with pytest.raises(BackendError, match="no route"), ostinato.backend(recurrent_scan="parallel"):
        recurrent_scan(cell, weights, inputs)


def test_a_cell_without_weights_runs():
    """The types of a call are those of its inputs where there is nothing else."""

    class Sum(Cell):
        def step(self, weights, state, inputs):
            return state + inputs

        def output(self, state):
            return state

        def initial_state(self, inputs):
            return torch.zeros_like(inputs)

    x = torch.randn(2, 5, 3, dtype=torch.float64)
    outputs, last = recurrent_scan(Sum(), (), x)
    assert torch.allclose(outputs, x.cumsum(1))
    assert torch.allclose(last, x.sum(1))
