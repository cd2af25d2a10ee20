"""The long convolution: both routes against the sum itself, streaming, resets, derivatives, and bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import DtypeError, NonFiniteError, ShapeError
from ostinato.ops.long_convolution import fast_length, long_convolution, long_convolution_step


def the_sum(inputs: Tensor, kernel: Tensor, state: Tensor | None, reset: Tensor | None) -> Tensor:
    """y_t = Σ_s k_s u_{t−s} over the s that do not reach back beyond a reset, element by element."""
    batch, time, channels = inputs.shape
    past = kernel.shape[0] - 1
    before = inputs.new_zeros(batch, past, channels) if state is None else state
    window = torch.cat([before, inputs], dim=1)
    y = torch.zeros_like(inputs)
    for b in range(batch):
        for t in range(time):
            for s in range(kernel.shape[0]):
                y[b, t] += kernel[s] * window[b, past + t - s]
                if reset is not None and t - s >= 0 and reset[b, t - s]:
                    break
    return y


@pytest.mark.parametrize("route", ["reference", "parallel"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("time", "taps"), [(1, 1), (1, 4), (2, 2), (7, 3), (8, 8), (9, 20), (17, 5)])
def test_it_is_the_sum(time: int, taps: int, with_state: bool, with_reset: bool, route: str) -> None:
    u, k = torch.randn(2, time, 3, dtype=torch.float64), torch.randn(taps, 3, dtype=torch.float64)
    state = torch.randn(2, taps - 1, 3, dtype=torch.float64) if with_state else None
    reset = torch.rand(2, time) < 0.25 if with_reset else None
    with ostinato.backend(long_convolution=route):
        y, _ = long_convolution(u, k, state, reset=reset)
    torch.testing.assert_close(y, the_sum(u, k, state, reset), rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [1, 2, 9, 10])
def test_pieces_and_steps_give_what_the_whole_gives(split: int) -> None:
    u, k = torch.randn(3, 11, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    state, reset = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(3, 11) < 0.2
    whole, end = long_convolution(u, k, state, reset=reset)
    first, middle = long_convolution(u[:, :split], k, state, reset=reset[:, :split])
    second, last = long_convolution(u[:, split:], k, middle, reset=reset[:, split:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=0, atol=0)
    for t in range(11):
        state = state.masked_fill(reset[:, t, None, None], 0)
        y, state = long_convolution_step(u[:, t], k, state)
        torch.testing.assert_close(y, whole[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=0)


def test_nothing_crosses_a_reset() -> None:
    """Exactly nothing, not a rounding error of the transform: what lies before a reset has zero gradient after it."""
    u = torch.randn(1, 40, 2, requires_grad=True)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 23] = True
    y, state = long_convolution(u, torch.randn(40, 2), reset=reset)
    (gradient,) = torch.autograd.grad(y[:, 23:].sum() + state.sum(), u)
    assert torch.equal(gradient[:, :23], torch.zeros(1, 23, 2))
    assert gradient[:, 23:].abs().min() > 0


@pytest.mark.parametrize("with_reset", [False, True])
def test_derivatives_of_both_orders(with_reset: bool) -> None:
    u = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    s = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[False, False, True, False, False, True]]) if with_reset else None
    for route in ("reference", "parallel"):
        with ostinato.backend(long_convolution=route):
            assert torch.autograd.gradcheck(lambda *a: long_convolution(*a, reset=reset), (u, k, s))
            assert torch.autograd.gradgradcheck(lambda *a: long_convolution(*a, reset=reset), (u, k, s))


def test_a_length_of_100003() -> None:
    u, k = torch.randn(1, 100_003, 1, dtype=torch.float64), torch.randn(100_003, 1, dtype=torch.float64)
    reset = torch.zeros(1, 100_003, dtype=torch.bool)
    reset[0, 60_000] = True
    y, _ = long_convolution(u, k)
    cut, _ = long_convolution(u, k, reset=reset)
    for t, start in ((0, 0), (59_999, 0), (60_000, 60_000), (100_002, 60_000)):
        span = t - start + 1
        torch.testing.assert_close(y[0, t], (u[0, : t + 1].flip(0) * k[: t + 1]).sum(0), rtol=0, atol=1e-9)
        torch.testing.assert_close(cut[0, t], (u[0, start : t + 1].flip(0) * k[:span]).sum(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, k = torch.randn(2, 30, 3).to(dtype), torch.randn(30, 3).to(dtype)
    y, state = long_convolution(u, k)
    exact, _ = long_convolution(u.double(), k.double())
    assert y.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(y, exact.to(dtype), rtol=2e-2, atol=1e-3)


def test_vmap_over_kernels() -> None:
    u, kernels = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    reset = torch.rand(2, 9) < 0.3
    for marks in (None, reset):
        many = torch.func.vmap(lambda k, marks=marks: long_convolution(u, k, reset=marks)[0])(kernels)
        for one, kernel in zip(many, kernels, strict=True):
            torch.testing.assert_close(one, long_convolution(u, kernel, reset=marks)[0], rtol=0, atol=1e-12)


def test_fast_length_is_the_next_number_of_small_factors() -> None:
    smooth = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(7) for c in range(5))
    for size in range(1, 1025):
        assert fast_length(size) == next(n for n in smooth if n >= size)


def test_bad_arguments_are_named() -> None:
    u, k = torch.randn(1, 4, 2), torch.randn(3, 2)
    with pytest.raises(ShapeError, match="empty along time"):
        long_convolution(u[:, :0], k)
    with pytest.raises(ShapeError, match="kernel has 1 channels"):
        long_convolution(u, k[:, :1])
    with pytest.raises(ShapeError, match="state must have shape"):
        long_convolution(u, k, torch.zeros(1, 3, 2))
    with pytest.raises(DtypeError, match="must be real"):
        long_convolution(u.to(torch.complex64), k)
    with pytest.raises(NonFiniteError, match="kernel"):
        long_convolution(u, k * torch.nan, validate=True)
