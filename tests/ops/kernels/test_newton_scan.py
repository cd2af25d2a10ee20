"""newton_scan's Triton kernels against the loop over the cell's definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import BackendError, DivergenceError
from ostinato.ops.cells import GRU, ChannelCellHidden, ChannelHidden, ParaGRU, ParaLSTM
from ostinato.ops.kernels.triton.launch import INTERPRETED
from ostinato.ops.newton_scan import newton_scan
from ostinato.ops.recurrent_scan import recurrent_scan

CELLS = {"para_gru": ParaGRU(), "para_lstm": ParaLSTM()}
LENGTHS = (3, 8, 22) if INTERPRETED else (2, 63, 64, 65, 1000, 4096)
CHANNELS = 6 if INTERPRETED else 70
# Long enough that time is walked in segments.
LONG = 26 if INTERPRETED else 500

Problem = tuple[list[Tensor], Tensor, list[Tensor]]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments for sequences that a loop walks in a second."""
    from ostinato.ops.kernels.triton import newton_scan as kernels

    if not INTERPRETED:
        monkeypatch.setattr(kernels, "_LONG", 256)
        monkeypatch.setattr(kernels, "_SHORTEST_SEGMENT", 64)
        monkeypatch.setattr(kernels, "_LEAD", 32)


def make(name: str, device: torch.device, time: int, dtype: torch.dtype = torch.float32, scale: float = 0.4) -> Problem:
    """Weights, inputs and a state that is not zero."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    weights = [scale * randn(3, CHANNELS)] + ([scale * randn(2, CHANNELS)] if name == "para_lstm" else [])
    return weights, randn(2, time, 3, CHANNELS).to(dtype), [randn(2, CHANNELS) for _ in weights]


def results(name: str, problem: Problem, reset: Tensor | None, exact: bool = False, **options) -> list[Tensor]:
    """Outputs, the last state, and all gradients of a random combination of both that the seed fixes."""
    weights, inputs, state = problem
    leaves = [(x.double() if exact else x).detach().requires_grad_() for x in (*weights, inputs, *state)]
    count, kind = len(weights), ChannelCellHidden if name == "para_lstm" else ChannelHidden
    packed = (CELLS[name], tuple(leaves[:count]), leaves[count], kind(*leaves[count + 1 :]))
    if exact:
        outputs, last = recurrent_scan(*packed, reset=reset)
    else:
        with ostinato.backend(newton_scan="triton"):
            outputs, last = newton_scan(*packed, reset=reset, **options)
    seeded = torch.Generator(outputs.device).manual_seed(1)
    grads = [
        torch.randn(x.shape, generator=seeded, device=x.device).to(kind).to(x.dtype)
        for x, kind in zip((outputs, *last), (inputs.dtype, *[torch.float32] * len(last)), strict=True)
    ]
    return [outputs, *last, *torch.autograd.grad([outputs, *last], leaves, grads)]


def assert_close(name: str, problem: Problem, reset: Tensor | None = None, bound: float = 1e-5, **options) -> None:
    """‖found − exact‖ < bound · ‖exact‖ for everything."""
    found, exact = results(name, problem, reset, **options), results(name, problem, reset, exact=True)
    for number, (f, e) in enumerate(zip(found, exact, strict=True)):
        assert f.shape == e.shape
        assert (f.double() - e).norm() <= bound * e.norm(), f"result {number}"


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("name", CELLS)
def test_lengths(device, name, time):
    reset = torch.rand(2, time, device=device) < 0.1
    reset[0, 0] = reset[1, -1] = True
    reset[1, 4::16] = True
    assert_close(name, make(name, device, time), reset)


@pytest.mark.parametrize("name", CELLS)
def test_no_state_no_reset_strided_inputs(device, name):
    weights, inputs, _ = make(name, device, LONG)
    inputs = inputs.transpose(0, 1).contiguous().transpose(0, 1)
    with ostinato.backend(newton_scan="triton"):
        outputs, last = newton_scan(CELLS[name], tuple(weights), inputs)
    wanted, end = recurrent_scan(CELLS[name], tuple(w.double() for w in weights), inputs.double())
    for found, exact in zip((outputs, *last), (wanted, *end), strict=True):
        assert (found.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CELLS)
def test_half_precision(device, name, dtype):
    """Outputs and the inputs' gradient within 1.5 times of what rounding the exact ones costs; last state in float32.

    The gradients of weights and states are in float32, but read off states kept in half precision: as if two
    such roundings were in them, so their bound is 1.5 · √2 times what rounding costs the outputs.
    """
    problem = make(name, device, LENGTHS[1], dtype)
    found, exact = results(name, problem, None), results(name, problem, None, exact=True)
    assert found[0].dtype == dtype and all(x.dtype == torch.float32 for x in found[1 : 1 + len(problem[2])])
    count = len(problem[2])
    for number, (f, e) in enumerate(zip(found, exact, strict=True)):
        error = (f.double() - e).norm() / e.norm()
        if 0 < number <= count:
            bound = 1e-5
        elif number in (0, 2 * count + 1):
            bound = 1.5 * (e.to(dtype).double() - e).norm() / e.norm()
        else:
            bound = 1.5 * 2**0.5 * (exact[0].to(dtype).double() - exact[0]).norm() / exact[0].norm()
        assert error < bound, number


def remembering(name: str, device: torch.device) -> Problem:
    """Gates that keep the state nearly for ever: no guess of a later state is any good."""
    weights, inputs, state = make(name, device, LONG, scale=0.1)
    inputs[:, :, 0] += -6.0 if name == "para_gru" else 6.0
    return weights, inputs, state


@pytest.mark.parametrize("name", CELLS)
def test_long_memory_takes_newton_between_segments(device, name):
    problem = remembering(name, device)
    assert_close(name, problem, bound=2e-5)
    weights, inputs, _ = problem
    with ostinato.backend(newton_scan="triton"):
        *_, report = newton_scan(CELLS[name], tuple(weights), inputs, return_report=True)
    assert report.converged and report.iterations >= 2 and report.residual <= 5e-7 and report.peak > 0


@pytest.mark.parametrize("name", CELLS)
def test_what_does_not_fit_together_is_walked_in_one_piece(device, name, monkeypatch):
    from ostinato.ops.kernels.triton import newton_scan as kernels

    monkeypatch.setattr(kernels, "_WALKS", 1)
    weights, inputs, _ = remembering(name, device)
    with ostinato.backend(newton_scan="triton"):
        outputs, _, report = newton_scan(CELLS[name], tuple(weights), inputs, return_report=True)
    exact, _ = recurrent_scan(CELLS[name], tuple(w.double() for w in weights), inputs.double())
    assert report.iterations == 2 and report.residual == 0
    assert (outputs.double() - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize("name", CELLS)
def test_weights_that_newton_cannot_do(device, name):
    """The walk does not need the weights to be small."""
    assert_close(name, make(name, device, LENGTHS[1], scale=2.0), bound=1e-4)


@pytest.mark.parametrize("time", [7, LONG])
def test_nan_is_divergence_not_an_answer(device, time):
    weights, inputs, _ = make("para_gru", device, time)
    inputs[1, 4] = torch.nan
    with ostinato.backend(newton_scan="triton"):
        with pytest.raises(DivergenceError, match="nan"):
            newton_scan(ParaGRU(), tuple(weights), inputs)
        options = {"iterations": 3, "check": False, "return_report": True}
        outputs, _, report = newton_scan(ParaGRU(), tuple(weights), inputs, **options)
    assert not report.converged and torch.isfinite(outputs[0]).all() and torch.isnan(outputs[1, 4:]).all()


@pytest.mark.parametrize("time", [7] if INTERPRETED else [7, LONG])
def test_compiles_as_one_graph(device, time):
    weights, inputs, _ = make("para_lstm", device, time)
    leaves = [x.requires_grad_() for x in (*weights, inputs)]

    def loss(*tensors: Tensor) -> Tensor:
        outputs, _ = newton_scan(ParaLSTM(), tensors[:2], tensors[2])
        return outputs.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with ostinato.backend(newton_scan="triton"):
        found, wanted = compiled(*leaves), loss(*leaves)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (found, wanted)))


def test_gradients_are_the_same_every_time(device):
    problem = make("para_gru", device, 8 if INTERPRETED else LONG)
    for first, second in zip(results("para_gru", problem, None), results("para_gru", problem, None), strict=True):
        assert torch.equal(first, second)


def test_what_it_cannot_do_it_says(device):
    weights, inputs, _ = make("para_gru", device, 6)
    with ostinato.backend(newton_scan="triton"):
        with pytest.raises(BackendError, match=r"not torch\.float64"):
            newton_scan(ParaGRU(), (weights[0].double(),), inputs)
        with pytest.raises(BackendError, match="undamped"):
            newton_scan(ParaGRU(), tuple(weights), inputs, method="elk")
        with pytest.raises(BackendError, match="not GRU"):
            recurrent = torch.zeros(3, 1, CHANNELS, CHANNELS, device=device)
            newton_scan(GRU(), (recurrent, torch.zeros(1, CHANNELS, device=device)), inputs.unsqueeze(-2))
        inputs.requires_grad_()
        outputs, _ = newton_scan(ParaGRU(), tuple(weights), inputs)
        (grad,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        with pytest.raises(BackendError, match="differentiable once"):
            grad.sum().backward()
