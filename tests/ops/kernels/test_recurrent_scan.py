"""The Triton route of `recurrent_scan` against the loop in float64.

Bounds on relative errors ‖found − exact‖ / ‖exact‖. float32: 1e-5 everywhere. Half precision, with r what
rounding the exact outputs costs: 1.5 r for outputs and states, 3 r for gradients. Those are rounded themselves,
and so are both factors of every product on their way: the gradients of the pre-activations and the weights in
the walk back, and the gradients and the outputs in the gradient of the weights. M²RNN's products along time take
two terms: 1.5 r for its gradients, too, where the weights do not let errors grow from step to step.
"""

from __future__ import annotations

import pytest
import torch

import ostinato
from ostinato.errors import BackendError
from ostinato.ops.cells import GRU, LSTM, M2RNN, SLSTM, Elman, Memory, ParaGRU
from ostinato.ops.kernels.triton.launch import INTERPRETED
from ostinato.ops.recurrent_scan import recurrent_scan

GATES = {Elman: 1, LSTM: 4, GRU: 3, SLSTM: 4}
HEADWISE = list(GATES)
HALF = [torch.bfloat16, torch.float16]
# On a GPU most tests share a few compiled kernels: each takes a second or two.
DIM = 16 if INTERPRETED else 24


def relative_error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


class Problem:
    """Arguments of a call, and cotangents of all that it returns."""

    def __init__(self, cell, device, dtype=torch.float32, batch=2, time=5, heads=2, dim=DIM, state=True, reset=True):
        def random(*shape):
            return torch.randn(*shape, device=device).to(dtype)

        if isinstance(cell, M2RNN):
            key, value = dim
            eye = torch.eye(value, device=device).repeat(heads, 1, 1)
            self.weights = ((eye + 0.3 * torch.randn_like(eye)).to(dtype),)
            forget = torch.rand(batch, time, heads, device=device)
            self.inputs = (random(batch, time, heads, key), random(batch, time, heads, value), forget)
            start = [(batch, heads, key, value)]
            self.state_type = Memory
        else:
            gates = GATES[type(cell)]
            self.weights = (random(gates, heads, dim, dim) / dim**0.5,)
            if gates == 3:
                self.weights += (random(heads, dim),)
            self.inputs = random(batch, time, gates, heads, dim)
            self.state_type = cell.state_type
            start = [(batch, heads, dim)] * len(cell.state_type._fields)
        self.cell = cell
        self.state = None
        if state:
            leaves = [0.5 * torch.randn(shape, device=device) for shape in start]
            if isinstance(cell, SLSTM):
                leaves[2] = leaves[2].abs() + 1
            self.state = self.state_type(*leaves)
        self.reset = None
        if reset:
            self.reset = torch.rand(batch, time, device=device) < 0.3
            self.reset[0, 0] = True
        self.last = [torch.randn(shape, device=device) for shape in start]
        shape = (batch, time, *start[0][1:])
        self.outputs = random(*shape)

    def solve(self, route, dtype=None, gradients=True, function=recurrent_scan):
        """Outputs and last state, gradients of weights, of inputs and of the state."""

        def leaf(tensor):
            return tensor.detach().to(dtype or tensor.dtype).requires_grad_(gradients)

        weights = [leaf(t) for t in self.weights]
        single = isinstance(self.inputs, torch.Tensor)
        inputs = [leaf(t) for t in ((self.inputs,) if single else self.inputs)]
        state = [leaf(t) for t in self.state or ()]
        with ostinato.backend(recurrent_scan=route):
            outputs, last = function(
                self.cell,
                tuple(weights),
                inputs[0] if single else tuple(inputs),
                self.state_type(*state) if state else None,
                reset=self.reset,
            )
        values = [outputs, *last]
        if not gradients:
            return values
        found = torch.autograd.grad(
            [outputs, *last],
            [*weights, *inputs, *state],
            [cotangent.to(value.dtype) for cotangent, value in zip([self.outputs, *self.last], values, strict=True)],
        )
        count = len(weights)
        return values, found[:count], found[count : count + len(inputs)], found[count + len(inputs) :]


def assert_agrees(problem, of_gradients=3):
    dtype = problem.outputs.dtype
    # The exact gradients are in float64 of everything; found ones in the types of the arguments.
    values, weights, inputs, states = problem.solve("triton")
    exact = problem.solve("reference", torch.float64)
    if dtype == torch.float32:
        bounds = (1e-5, 1e-5, 1e-5)
    else:
        cost = relative_error(exact[0][0].to(dtype), exact[0][0])
        bounds = (1.5 * cost, of_gradients * cost, of_gradients * cost)
    for found, wanted, bound in zip(
        (values, weights, (*inputs, *states)), (exact[0], exact[1], (*exact[2], *exact[3])), bounds, strict=True
    ):
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.shape == theirs.shape
            if theirs.norm() == 0:
                assert ours.norm() == 0
            else:
                assert relative_error(ours, theirs) <= bound
    assert values[0].dtype == dtype
    assert {leaf.dtype for leaf in values[1:]} == {torch.float32}


SIZES = [(2, 5, 2, 16), (3, 4, 1, 24), (1, 1, 2, 5)] if INTERPRETED else [(3, 65, 2, 24)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", HEADWISE)
def test_float32(device, cell, size):
    batch, time, heads, dim = size
    assert_agrees(Problem(cell(), device, torch.float32, batch, time, heads, dim))


@pytest.mark.parametrize("dtype", HALF if INTERPRETED else [torch.bfloat16])
@pytest.mark.parametrize("cell", HEADWISE)
def test_half_precision(device, cell, dtype):
    batch, time, heads, dim = (3, 6, 2, 32) if INTERPRETED else (16, 257, 3, 64)
    assert_agrees(Problem(cell(), device, dtype, batch, time, heads, dim))


@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
def test_lengths(device):
    for time in (1, 63, 64, 65, 1000, 4096):
        assert_agrees(Problem(LSTM(), device, torch.bfloat16, batch=4, time=time, heads=2, dim=64))


@pytest.mark.parametrize("cell", HEADWISE if INTERPRETED else [SLSTM])
def test_no_state_is_zeros(device, cell):
    problem = Problem(cell(), device, batch=3, state=False, reset=False)
    assert_agrees(problem)
    without = problem.solve("triton", gradients=False)
    problem.state = problem.state_type(*(torch.zeros_like(leaf) for leaf in without[1:]))
    for ours, theirs in zip(problem.solve("triton", gradients=False), without, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("cell", [LSTM(), M2RNN()])
def test_a_long_sequence(device, cell):
    size = (64, 16) if isinstance(cell, M2RNN) else 64
    problem = Problem(cell, device, torch.bfloat16, batch=4, time=65_536, heads=1, dim=size)
    values, weights, *_ = problem.solve("triton")
    assert all(torch.isfinite(tensor).all() for tensor in (*values, *weights))
    # The last sequence in each row began in the last hundred steps, and is short: the loop over them ends the same.
    problem.reset[:, -100] = True
    values = problem.solve("triton", gradients=False)
    parts = (problem.inputs,) if isinstance(problem.inputs, torch.Tensor) else problem.inputs
    parts = tuple(part[:, -100:] for part in parts)
    problem.inputs, problem.state = (parts[0] if len(parts) == 1 else parts), None
    problem.reset = problem.reset[:, -100:]
    exact = problem.solve("reference", torch.float64, gradients=False)
    assert relative_error(values[0][:, -100:], exact[0]) < 3e-3


@pytest.mark.skipif(INTERPRETED, reason="hundreds of programs")
def test_more_programs_than_multiprocessors(device):
    assert_agrees(Problem(LSTM(), device, torch.bfloat16, batch=300, time=33, heads=12, dim=64))


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
def test_the_largest_head(device):
    assert_agrees(Problem(SLSTM(), device, torch.bfloat16, batch=4, time=65, heads=2, dim=128))


@pytest.mark.parametrize("gate", [-25.0, -1e-2, 25.0])
@pytest.mark.parametrize("cell", [LSTM(), SLSTM()])
def test_gates_wide_open_and_shut(device, cell, gate):
    """log σ(f) from −25 to −1e-11, and an exponential input gate of e^±25."""
    problem = Problem(cell, device, time=6)
    problem.inputs[:, :, 1] += gate
    problem.inputs[:, ::2, 0] -= gate
    assert_agrees(problem)


@pytest.mark.parametrize("cell", [LSTM(), GRU(), M2RNN()])
def test_reset_forgets_even_infinity(device, cell):
    problem = Problem(cell, device, batch=1, dim=(16, 16) if isinstance(cell, M2RNN) else DIM)
    problem.reset = torch.zeros(1, 5, dtype=torch.bool, device=device)
    problem.reset[0, 0] = True
    assert_agrees(problem)
    values, weights, inputs, _ = problem.solve("triton")
    problem.state = problem.state_type(*(torch.full_like(leaf, torch.inf) for leaf in problem.state))
    broken_values, broken_weights, broken_inputs, states = problem.solve("triton")
    for ours, theirs in zip(
        (*broken_values, *broken_weights, *broken_inputs), (*values, *weights, *inputs), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all((leaf == 0).all() for leaf in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (40, 5)] if INTERPRETED else [(64, 16), (70, 32)])
def test_m2rnn(device, dtype, size):
    time = 5 if INTERPRETED else 130
    for state in (False, True):
        assert_agrees(Problem(M2RNN(), device, dtype, time=time, dim=size, state=state))


def test_m2rnn_with_rows_for_two_programs_of_many_columns(device):
    assert_agrees(Problem(M2RNN(), device, torch.bfloat16, batch=1, time=3 if INTERPRETED else 130, dim=(70, 64)))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_m2rnn_in_half_precision(device, dtype, reset):
    """Weights near the identity, where they start from in training."""
    time, size = (30, (32, 16)) if INTERPRETED else (300, (64, 16))
    problem = Problem(M2RNN(), device, dtype, time=time, dim=size, reset=reset)
    eye = torch.eye(size[1], device=device)
    problem.weights = ((eye + 0.1 * torch.randn_like(problem.weights[0].float())).to(dtype),)
    assert_agrees(problem, of_gradients=1.5)


def test_m2rnn_clips_the_gradient(device):
    problem = Problem(M2RNN(0.3), device, dim=(16, 16))
    assert_agrees(problem)
    clipped = problem.solve("triton")[1][0]
    problem.cell = M2RNN()
    assert relative_error(clipped, problem.solve("triton")[1][0]) > 1e-2


@pytest.mark.parametrize("cell", [*(cell() for cell in HEADWISE), M2RNN()])
def test_every_element_is_written(device, cell):
    """In deterministic mode fresh memory is NaN."""
    problem = Problem(cell, device, batch=3, time=3, dim=(16, 16) if isinstance(cell, M2RNN) else DIM)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        values, *gradients = problem.solve("triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(tensor).all() for tensor in (*values, *sum(gradients, ())))
    again = problem.solve("triton")
    for ours, theirs in zip((*values, *sum(gradients, ())), (*again[0], *sum(again[1:], ())), strict=True):
        assert torch.equal(ours, theirs)


def test_one_cotangent_at_a_time(device):
    problem = Problem(SLSTM(), device, time=3)
    leaves = [t.detach().requires_grad_() for t in (*problem.weights, problem.inputs)]

    def gradients(route, pick, dtype):
        cast = [leaf.to(dtype) for leaf in leaves]
        with ostinato.backend(recurrent_scan=route):
            outputs, last = recurrent_scan(problem.cell, (cast[0],), cast[1], reset=problem.reset)
        return torch.autograd.grad(pick(outputs, last).square().sum(), leaves)

    for pick in (lambda outputs, _: outputs, lambda _, last: last.cell, lambda _, last: last.maximum):
        found, exact = gradients("triton", pick, torch.float32), gradients("reference", pick, torch.float64)
        assert all(relative_error(f, e) < 1e-5 for f, e in zip(found, exact, strict=True))


def test_inputs_that_are_not_contiguous(device):
    problem = Problem(LSTM(), device)
    wanted = problem.solve("triton")
    problem.inputs = problem.inputs.transpose(0, 1).contiguous().transpose(0, 1)
    problem.weights = (problem.weights[0].transpose(-1, -2).contiguous().transpose(-1, -2),)
    problem.outputs = problem.outputs.transpose(-1, -2).contiguous().transpose(-1, -2)
    for ours, theirs in zip(problem.solve("triton")[1:], wanted[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cell", [GRU(), M2RNN(0.5)])
def test_compiles_forward_and_backward(device, cell):
    problem = Problem(cell, device, time=3, dim=(16, 16) if isinstance(cell, M2RNN) else DIM)
    eager = problem.solve("triton")
    compiled = torch.compile(recurrent_scan, fullgraph=True, backend="aot_eager")
    found = problem.solve("triton", function=compiled)
    for ours, theirs in zip(found, eager, strict=True):
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_second_derivative_says_what_to_do(device):
    problem = Problem(Elman(), device, time=2)
    weight = problem.weights[0].requires_grad_()
    with ostinato.backend(recurrent_scan="triton"):
        outputs, _ = recurrent_scan(problem.cell, (weight,), problem.inputs, reset=problem.reset)
    (first,) = torch.autograd.grad(outputs.square().sum(), weight, create_graph=True)
    with pytest.raises(BackendError, match="differentiable once"):
        first.sum().backward()


def test_refusals(device):
    def refused(cell, weights, inputs, state=None):
        with pytest.raises(BackendError) as caught, ostinato.backend(recurrent_scan="triton"):
            recurrent_scan(cell, weights, inputs, state)
        return str(caught.value)

    dense = torch.zeros(4, 1, 768, 768, device=device, dtype=torch.bfloat16)
    inputs = torch.zeros(1, 2, 4, 1, 768, device=device, dtype=torch.bfloat16)
    assert "4 gates of 768" in refused(LSTM(), (dense,), inputs)
    double = torch.zeros(1, 1, 4, 4, device=device, dtype=torch.float64)
    assert "float64" in refused(Elman(), (double,), torch.zeros(1, 2, 1, 1, 4, device=device))
    channels = torch.zeros(1, 2, 3, 4, device=device)
    assert "ParaGRU" in refused(ParaGRU(), (torch.zeros(3, 4, device=device),), channels)
    wide = [torch.zeros(1, 2, 1, size, device=device) for size in (16, 64)]
    weight = torch.zeros(1, 64, 64, device=device)
    assert "64 columns" in refused(M2RNN(), (weight,), (*wide, torch.zeros(1, 2, 1, device=device)))
