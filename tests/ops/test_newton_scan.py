"""Newton against the loop: every method and cell, derivatives, convergence, divergence, transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import BackendError, ConfigurationError, DivergenceError, NonFiniteError, ShapeError
from ostinato.ops.cells import GRU, LSTM, M2RNN, SLSTM, Cell, ChannelHidden, Elman, ParaGRU, ParaLSTM
from ostinato.ops.newton_scan import METHODS, NewtonReport, newton_scan
from ostinato.ops.recurrent_scan import recurrent_scan
from ostinato.ops.scan import DENSE

CELLS: dict[str, Cell] = {
    "elman": Elman(),
    "lstm": LSTM(),
    "gru": GRU(),
    "slstm": SLSTM(),
    "para_gru": ParaGRU(),
    "para_lstm": ParaLSTM(),
    "m2rnn": M2RNN(),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make(name: str, batch: int = 2, time: int = 13, heads: int = 2, dim: int = 3):
    """A cell, and its weights, inputs and state as flat lists of leaves."""
    cell = CELLS[name]
    if name.startswith("para"):
        weights = [0.4 * randn(3, dim)] + ([0.4 * randn(2, dim)] if name == "para_lstm" else [])
        inputs = [randn(batch, time, 3, dim)]
    elif name == "m2rnn":
        weights = [torch.eye(dim, dtype=torch.float64) + 0.2 * randn(heads, dim, dim)]
        gate = torch.rand(batch, time, heads, dtype=torch.float64)
        inputs = [randn(batch, time, heads, 4), randn(batch, time, heads, dim), gate]
    else:
        gates = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}[name]
        weights = [0.5 * randn(gates, heads, dim, dim)] + ([randn(heads, dim)] if name == "gru" else [])
        inputs = [randn(batch, time, gates, heads, dim)]
    first = [part[:, 0] for part in inputs]
    zero = cell.initial_state(first[0] if len(first) == 1 else tuple(first))
    return cell, weights, inputs, [torch.rand_like(leaf) * 0.5 + 1 for leaf in zero], type(zero)


def run(function, cell, weights, inputs, state, kind, **options):
    passed = inputs[0] if len(inputs) == 1 else tuple(inputs)
    return function(cell, tuple(weights), passed, kind(*state), **options)


def with_gradients(function, cell, weights, inputs, state, kind, **options):
    """Outputs, last state and the gradients of a loss that looks at all of them."""
    leaves = [leaf.clone().requires_grad_() for leaf in (*weights, *inputs, *state)]
    w, x = len(weights), len(weights) + len(inputs)
    outputs, last = run(function, cell, leaves[:w], leaves[w:x], leaves[x:], kind, **options)
    ramp = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    loss = (outputs * ramp).sum() + sum((leaf * leaf).sum() for leaf in last)
    return outputs, last, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CELLS)
def test_every_method_is_the_loop(name, method):
    problem = make(name)
    reset = torch.rand(2, 13) < 0.15
    found = with_gradients(newton_scan, *problem, method=method, reset=reset)
    wanted = with_gradients(recurrent_scan, *problem, reset=reset)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=1e-10)
    for a, b in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 65])
@pytest.mark.parametrize("name", ["para_gru", "para_lstm", "gru"])
def test_any_length(name, time):
    problem = make(name, time=time)
    with ostinato.backend(newton_scan="parallel"):
        found = with_gradients(newton_scan, *problem)
    wanted = with_gradients(recurrent_scan, *problem)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-10, atol=1e-11)
    for a, b in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_long_sequence():
    a, inputs = torch.full((3, 2), 0.3), torch.randn(1, 100_003, 3, 2)
    outputs, last, report = newton_scan(ParaGRU(), (a,), inputs, return_report=True)
    assert report.converged and report.iterations <= 5
    entering = torch.cat([torch.zeros(1, 1, 2), outputs[:, :-1]], dim=1)
    again = ParaGRU().step((a,), ChannelHidden(entering), inputs).hidden
    torch.testing.assert_close(again, outputs, rtol=0, atol=3e-6)
    assert torch.equal(outputs[:, -1], last.hidden)


@pytest.mark.parametrize("name", ["para_gru", "para_lstm", "elman"])
def test_split_anywhere(name):
    cell, weights, inputs, state, kind = make(name, time=10)
    outputs, last = run(newton_scan, cell, weights, inputs, state, kind)
    for t in (1, 4, 9):
        first, middle = run(newton_scan, cell, weights, [x[:, :t] for x in inputs], state, kind)
        second, end = run(newton_scan, cell, weights, [x[:, t:] for x in inputs], list(middle), kind)
        torch.testing.assert_close(torch.cat([first, second], 1), outputs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(end, last, rtol=1e-11, atol=1e-11)


class TestConvergence:
    """What the papers, and the card's own check, say about the number of iterations."""

    @pytest.mark.parametrize("time", [64, 512, 2048])
    @pytest.mark.parametrize("name", ["para_gru", "para_lstm"])
    def test_three_iterations_suffice_at_any_length(self, name, time):
        dim = 16
        cell = CELLS[name]
        weights = [randn(3, dim) / dim**0.5]
        if name == "para_lstm":
            weights.append(randn(2, dim) / dim**0.5)
        weights = tuple(weight.clamp(-0.5, 0.5) for weight in weights)
        inputs = randn(1, time, 3, dim)
        exact, _ = recurrent_scan(cell, weights, inputs)
        errors = []
        for k in range(6):
            outputs, _ = newton_scan(cell, weights, inputs, iterations=k, check=False)
            errors.append(float((outputs - exact).abs().max()))
        assert errors[0] > 0.05
        assert errors[3] < 1e-4
        assert errors[5] < 1e-10
        assert errors[1] > errors[2] > errors[3] > errors[4]

    def test_large_recurrent_weights_need_more(self):
        weights, inputs = (2 * randn(3, 16),), randn(1, 512, 3, 16)
        exact, _ = recurrent_scan(ParaGRU(), weights, inputs)
        outputs, _ = newton_scan(ParaGRU(), weights, inputs, iterations=5, check=False)
        assert not float((outputs - exact).abs().max()) < 1e-4

    @pytest.mark.parametrize("method", ["newton", "quasi", "jacobi"])
    @pytest.mark.parametrize("name", CELLS)
    def test_k_iterations_make_the_first_k_states_exact(self, name, method):
        """Property 6, which holds whatever stands for the Jacobian."""
        cell, weights, inputs, state, kind = make(name, time=9)
        exact, _ = run(recurrent_scan, cell, weights, inputs, state, kind)
        for k in (1, 4, 9):
            options = {"method": method, "iterations": k, "check": False}
            outputs, _ = run(newton_scan, cell, weights, inputs, state, kind, **options)
            torch.testing.assert_close(outputs[:, :k], exact[:, :k], rtol=1e-9, atol=1e-9)

    def test_one_iteration_solves_what_is_linear(self):
        class Linear(Elman):
            def step(self, weights, state, inputs):
                return type(state)(inputs.squeeze(-3) + torch.einsum("hoi,...hi->...ho", weights[0][0], state.hidden))

            def step_and_jacobian(self, weights, state, inputs):
                value = self.step(weights, state, inputs).hidden
                return value, weights[0][0].expand(*value.shape, -1)

        assert Linear().structure is DENSE
        weights, inputs = (0.4 * randn(1, 1, 3, 3),), randn(2, 40, 1, 1, 3)
        _, _, report = newton_scan(Linear(), weights, inputs, return_report=True)
        assert report.iterations == 1

    def test_quasi_newton_and_small_steps_need_more(self):
        problem = make("gru", time=60)
        counts = {
            name: run(newton_scan, *problem, return_report=True, max_iterations=400, **options)[2].iterations
            for name, options in {
                "newton": {},
                "quasi": {"method": "quasi"},
                "small": {"step_size": 0.7},
                "zeros": {"guess": "zeros"},
            }.items()
        }
        assert counts["newton"] < counts["quasi"] and counts["newton"] < counts["small"]
        assert counts["zeros"] <= counts["newton"] + 3

    def test_elk_stays_bounded_where_newton_explodes(self):
        """Claim iv of the card: an unstable diagonal GRU."""
        torch.manual_seed(9)
        weights, inputs = (2 * randn(3, 16),), randn(1, 1024, 3, 16)
        exact, _ = recurrent_scan(ParaGRU(), weights, inputs)
        outputs, _ = newton_scan(ParaGRU(), weights, inputs, iterations=28, check=False)
        assert not float(outputs.abs().max()) < 1e10
        with pytest.raises(DivergenceError, match=r"'newton' on ParaGRU did not converge: after 70 iterations"):
            newton_scan(ParaGRU(), weights, inputs, max_iterations=70)
        options = {"damping": 1e-3, "return_report": True, "max_iterations": 70}
        for method in ("elk", "quasi_elk"):
            outputs, _, report = newton_scan(ParaGRU(), weights, inputs, method=method, **options)
            assert report.peak < 20
            torch.testing.assert_close(outputs, exact, rtol=1e-8, atol=1e-8)

    def test_too_few_iterations_are_an_error(self):
        weights, inputs = (2 * randn(3, 8),), randn(2, 300, 3, 8)
        with pytest.raises(DivergenceError, match="elk"):
            newton_scan(ParaGRU(), weights, inputs, iterations=1)
        outputs, _, report = newton_scan(ParaGRU(), weights, inputs, iterations=1, check=False, return_report=True)
        assert outputs.shape == (2, 300, 8) and report.iterations == 1

    def test_a_tolerance_below_rounding(self):
        """A residual that stopped falling is accepted near the tolerance: it is rounding."""
        weights, inputs = (0.3 * randn(3, 8),), randn(2, 200, 3, 8)
        exact, _ = recurrent_scan(ParaGRU(), weights, inputs)
        outputs, _, report = newton_scan(ParaGRU(), weights, inputs, tolerance=5e-17, return_report=True)
        torch.testing.assert_close(outputs, exact, rtol=1e-13, atol=1e-14)
        assert report.converged and report.residual > 5e-17 and report.iterations < 20

    def test_nan_is_divergence_not_an_answer(self):
        inputs = randn(1, 20, 3, 2)
        inputs[0, 7] = torch.nan
        with pytest.raises(DivergenceError, match="nan"):
            newton_scan(ParaGRU(), (0.1 * randn(3, 2),), inputs)

    def test_report(self):
        problem = make("para_gru")
        report = run(newton_scan, *problem, return_report=True)[2]
        assert isinstance(report, NewtonReport)
        assert report.converged and 0 <= report.residual <= 1e-12 and 2 <= report.iterations <= 6 and report.peak > 0
        with ostinato.backend(newton_scan="reference"):
            assert run(newton_scan, *problem, return_report=True)[2].converged


class TestDerivatives:
    @pytest.mark.parametrize("name", CELLS)
    def test_first_and_second(self, name):
        # sLSTM's state has four parts: one channel is as many numbers as the others have.
        cell, weights, inputs, state, kind = make(name, batch=1, time=3, heads=1, dim=1 if name == "slstm" else 2)
        reset = torch.tensor([[False, False, True]])
        arguments = [t.requires_grad_() for t in (*weights, *inputs, *state)]
        w, x = len(weights), len(weights) + len(inputs)

        def function(*tensors):
            parts = tensors[:w], tensors[w:x], tensors[x:]
            outputs, last = run(newton_scan, cell, *parts, kind, reset=reset)
            return outputs, *last

        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)

    def test_second_derivative_equals_the_loops(self):
        cell, weights, inputs, state, kind = make("para_lstm", time=40)
        found = []
        for function in (recurrent_scan, newton_scan):
            a = weights[0].clone().requires_grad_()
            outputs, _ = run(function, cell, [a, weights[1]], inputs, state, kind)
            (grad,) = torch.autograd.grad(outputs.square().sum(), a, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), a)[0])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)

    def test_memory_does_not_grow_with_the_iterations(self):
        """The graph holds the solution and the arguments, and no iterate."""
        cell, weights, inputs, state, kind = make("para_gru", time=50)
        weights[0].requires_grad_()
        sizes = []
        for iterations in (4, 20):
            saved: list[int] = []

            def pack(tensor, saved=saved):
                saved.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run(newton_scan, cell, weights, inputs, state, kind, iterations=iterations)
            sizes.append(sum(saved))
        assert sizes[0] == sizes[1] <= 2 * inputs[0].numel()


class TestTypes:
    @pytest.mark.parametrize("name", ["para_gru", "para_lstm", "lstm"])
    def test_float32(self, name):
        cell, weights, inputs, state, kind = make(name, time=70)
        exact, _ = run(recurrent_scan, cell, weights, inputs, state, kind)
        single = [[t.float() for t in part] for part in (weights, inputs, state)]
        outputs, _ = run(newton_scan, cell, *single, kind)
        assert outputs.dtype == torch.float32
        torch.testing.assert_close(outputs.double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_solved_in_float32(self, dtype):
        cell, weights, inputs, _, _ = make("para_gru", time=70)
        small, x = weights[0].to(dtype), inputs[0].to(dtype)
        outputs, last = newton_scan(cell, (small,), x)
        assert outputs.dtype == dtype and last.hidden.dtype == torch.float32
        wanted, _ = newton_scan(cell, (small.float(),), x.float())
        assert torch.equal(outputs, wanted.to(dtype))


class TestTransforms:
    @pytest.mark.parametrize("name", ["para_gru", "para_lstm", "elman"])
    def test_vmap(self, name):
        cell, weights, inputs, state, kind = make(name)
        many = torch.stack([weights[0], 0.5 * weights[0], 0 * weights[0]])

        def loss(weight):
            outputs, _ = run(newton_scan, cell, [weight, *weights[1:]], inputs, state, kind)
            return outputs.square().sum()

        found = torch.func.vmap(torch.func.grad(loss))(many)
        wanted = torch.stack([torch.func.grad(loss)(weight) for weight in many])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    def test_vmap_turns_what_did_not_converge_into_nan(self):
        inputs = randn(2, 300, 3, 4)
        many = torch.stack([0.1 * randn(3, 4), 4 * randn(3, 4)])
        outputs = torch.func.vmap(lambda a: newton_scan(ParaGRU(), (a,), inputs, iterations=4, tolerance=1e-9)[0])(many)
        assert torch.isfinite(outputs[0]).all()
        assert torch.isnan(outputs[1]).all(dim=(1, 2)).any()
        exact, _ = recurrent_scan(ParaGRU(), (many[1],), inputs)
        finite = torch.isfinite(outputs[1])
        torch.testing.assert_close(outputs[1][finite], exact[finite], rtol=1e-6, atol=1e-6)

    def test_compile(self):
        cell, weights, inputs, _, _ = make("para_gru", time=10)
        leaves = [weight.requires_grad_() for weight in weights]

        def loss(inputs):
            return newton_scan(cell, tuple(leaves), inputs, iterations=5, tolerance=1e-10)[0].square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, wanted = compiled(inputs[0]), loss(inputs[0])
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    def test_compiled_divergence_is_nan(self):
        weights, inputs = (4 * randn(3, 8),), randn(1, 60, 3, 8)
        compiled = torch.compile(lambda x: newton_scan(ParaGRU(), weights, x, iterations=1)[0], backend="aot_eager")
        assert torch.isnan(compiled(inputs)).all()


def test_errors():
    cell, weights, inputs, state, kind = make("para_gru")
    problem = (cell, weights, inputs, state, kind)
    for options, message in (
        ({"method": "newtonian"}, "method must be one of"),
        ({"guess": "ones"}, "guess"),
        ({"iterations": -1}, "iterations"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": 1.5}, "step_size"),
        ({"method": "elk", "damping": 0.0}, "damping"),
        ({"check": False}, "fixed number"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            run(newton_scan, *problem, **options)
    with pytest.raises(ShapeError, match="empty along time"):
        newton_scan(cell, tuple(weights), inputs[0][:, :0])
    with pytest.raises(NonFiniteError, match=r"state\.hidden"):
        run(newton_scan, cell, weights, inputs, [state[0] * torch.nan], kind, validate=True)
    with pytest.raises(BackendError, match="no route"), ostinato.backend(newton_scan="native"):
        run(newton_scan, *problem)
    _, weights, inputs, state, kind = make("m2rnn")
    with pytest.raises(ConfigurationError, match="gradient_clip"):
        run(newton_scan, M2RNN(gradient_clip=1.0), weights, inputs, state, kind)
