from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.errors import DtypeError, NonFiniteError, ShapeError
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.routes import backend

ROUTES = ("reference", "parallel")
TYPES = (torch.float64, torch.complex128)


def formula(a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, as it is written."""
    states = []
    for t in range(b.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t].view(-1, *[1] * (state.ndim - 1)), torch.zeros_like(state), state)
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states, 1), state


def arguments(time: int, dtype: torch.dtype = torch.float64, channels=(3,)) -> list[Tensor]:
    """Transitions of either sign, or of any phase."""
    a = 1.1 * (2 * torch.rand(2, time, *channels, dtype=dtype) - 1)
    return [a, torch.randn(2, time, *channels, dtype=dtype), torch.randn(2, *channels, dtype=dtype)]


def with_gradients(function, args: list[Tensor]) -> list[Tensor]:
    args = [a.detach().requires_grad_() for a in args]
    results = function(*args)
    weights = torch.Generator().manual_seed(0)
    loss = sum((r * torch.randn(r.shape, generator=weights).to(r.dtype)).sum().real for r in results)
    return [*results, *torch.autograd.grad(loss, args)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f - w).abs().max() <= tolerance * (1 + w.abs().max())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("time", [1, 2, 8, 9, 63, 64, 65, 100])
def test_is_the_formula(route: str, dtype: torch.dtype, time: int) -> None:
    args = arguments(time, dtype)
    reset = torch.rand(2, time) < 0.15
    reset[0, 0] = True
    with backend(route):
        for mask in (None, reset):
            found = with_gradients(lambda *x, m=mask: diagonal_scan(*x, reset=m), args)
            assert_same(found, with_gradients(lambda *x, m=mask: formula(*x, m), args), 1e-12)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 4), (2, 1, 3, 4), (1, 20, 3, 4), (2, 20, 1, 4), (2, 20, 3, 1), (1, 1, 1, 1)]
)
def test_broadcast_transition(shape: tuple[int, ...]) -> None:
    _, b, state = arguments(20, channels=(3, 4))
    a = torch.rand(shape, dtype=torch.float64)
    with backend("parallel"):
        found = with_gradients(diagonal_scan, [a, b, state])
    wanted = with_gradients(lambda a, b, s: formula(a.expand(b.shape), b, s), [a, b, state])
    assert_same(found, wanted, 1e-12)


def test_zero_forgets_and_minus_one_alternates() -> None:
    b = torch.ones(1, 50, 1)
    assert torch.equal(diagonal_scan(torch.zeros_like(b), b)[0], b)
    signs = diagonal_scan(-torch.ones_like(b), torch.zeros_like(b), torch.ones(1, 1))[0].flatten()
    assert torch.equal(signs, (-1.0) ** torch.arange(1, 51))


def test_real_inputs_complex_transition() -> None:
    a, b, _ = arguments(30, torch.complex128)
    states, last = diagonal_scan(a, b.real)
    wanted, end = formula(a, b.real.to(a.dtype), torch.zeros(2, 3, dtype=a.dtype))
    torch.testing.assert_close(last, end)
    # A real input type cannot hold a complex state: the states come back complex.
    torch.testing.assert_close(states, wanted)


def test_split_anywhere() -> None:
    a, b, state = arguments(40, torch.complex128)
    whole, last = diagonal_scan(a, b, state)
    for cut in (1, 8, 9, 39):
        one, between = diagonal_scan(a[:, :cut], b[:, :cut], state)
        two, end = diagonal_scan(a[:, cut:], b[:, cut:], between)
        torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", TYPES)
def test_two_derivatives(route: str, dtype: torch.dtype) -> None:
    args = [x[:1].clone().requires_grad_() for x in arguments(10, dtype, channels=(1,))]
    reset = torch.zeros(1, 10, dtype=torch.bool)
    reset[0, 4] = True
    with backend(route):
        for mask in (None, reset):
            assert gradcheck(lambda *x, m=mask: diagonal_scan(*x, reset=m), args)
            assert gradgradcheck(lambda *x, m=mask: diagonal_scan(*x, reset=m), args)


def test_long_sequence() -> None:
    time = 100_003
    a = torch.rand(1, time, 1, dtype=torch.float64) * 2 - 1
    b = torch.randn(1, time, 1, dtype=torch.float64)
    state, wanted = 0.0, []
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        state = x * state + y
        wanted.append(state)
    states, last = diagonal_scan(a, b)
    torch.testing.assert_close(states.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    assert last.item() == pytest.approx(state, abs=1e-12)


def test_half_precision_is_accumulated_in_float32() -> None:
    a, b, _ = (x.bfloat16() for x in arguments(200))
    states, last = diagonal_scan(a * 0.9, b)
    assert (states.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    wanted, end = formula((a * 0.9).double(), b.double(), torch.zeros(2, 3, dtype=torch.float64))
    assert ((states.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()
    torch.testing.assert_close(last.double(), end, rtol=1e-5, atol=1e-5)


def test_vmap_over_seeds() -> None:
    a, b, state = arguments(20)
    many = torch.rand(3, *a.shape, dtype=torch.float64)

    def loss(transition: Tensor) -> Tensor:
        return sum(r.square().sum() for r in diagonal_scan(transition, b, state))

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], torch.func.grad(loss)(many[seed]), rtol=1e-12, atol=1e-12)


def test_compiles_as_one_graph() -> None:
    args = arguments(40)
    compiled = torch.compile(lambda *x: diagonal_scan(*x), fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, args), with_gradients(formula, args), 1e-12)


def test_bad_arguments() -> None:
    a, b, state = arguments(6)
    with pytest.raises(ShapeError, match="empty along time"):
        diagonal_scan(a[:, :0], b[:, :0])
    with pytest.raises(ShapeError, match="transition has size 5 along axis 1"):
        diagonal_scan(a[:, :5], b)
    with pytest.raises(ShapeError, match="transition must have 3 axes"):
        diagonal_scan(a[..., 0], b)
    with pytest.raises(ShapeError, match="state must have shape"):
        diagonal_scan(a, b, state[:, :2])
    with pytest.raises(ShapeError, match="reset must have shape"):
        diagonal_scan(a, b, reset=torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(DtypeError, match="reset must be bool"):
        diagonal_scan(a, b, reset=torch.zeros(2, 6))
    with pytest.raises(DtypeError, match="inputs must be floating"):
        diagonal_scan(a, b.long())
    state[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"state holds inf at index \(1, 2\)"):
        diagonal_scan(a, b, state, validate=True)
