"""diagonal_scan's Triton kernels against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import BackendError
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.kernels.triton.launch import INTERPRETED

# The interpreter takes a Python step for each number of a scan.
LENGTHS = (2, 17, 41) if INTERPRETED else (2, 63, 64, 65, 1000, 4096, 65536)
CHANNELS = 3 if INTERPRETED else 300
# Below this a launch is cut into segments, interpreted or not.
LONG = 41 if INTERPRETED else 4099


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def arguments(
    device: torch.device, time: int, channels: tuple[int, ...] = (CHANNELS,), dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """Transitions of either sign or any phase that keep the states bounded, inputs and a state."""
    a = torch.randn(2, time, *channels, dtype=dtype, device=device)
    a = 0.98 * a / (1 + a.abs())
    b = torch.randn(2, time, *channels, dtype=dtype, device=device)
    return [a, b, torch.randn(2, *channels, dtype=dtype, device=device)]


def resets(device: torch.device, time: int) -> Tensor:
    """At the first step, at the last, at the edges of tiles, and here and there."""
    reset = torch.rand(2, time, device=device) < 0.05
    reset[0, 0] = reset[1, -1] = True
    reset[1, 8::16] = True
    return reset


def results(route: str, args: list[Tensor | None], reset: Tensor | None, exact: bool = False) -> list[Tensor]:
    """States, the last state, and all gradients of a random combination of both that the seed fixes."""
    leaves = [None if x is None else (x.to(wide(x.dtype)) if exact else x).detach().requires_grad_() for x in args]
    with ostinato.backend(diagonal_scan=route):
        states, last = diagonal_scan(*leaves, reset=reset)
    seeded = torch.Generator(states.device).manual_seed(1)

    def weights(like: Tensor, kind: torch.dtype) -> Tensor:
        # Drawn in the type that the kernel is given its gradients in, so that both see the same numbers.
        return torch.randn(like.shape, generator=seeded, dtype=kind, device=like.device).to(like.dtype)

    kind = args[1].dtype if not states.is_complex() else torch.complex64
    kept = torch.complex64 if states.is_complex() else torch.float32
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad([states, last], present, [weights(states, kind), weights(last, kept)])
    return [states, last, *grads]


def assert_close(args: list[Tensor | None], reset: Tensor | None = None, bound: float = 1e-5) -> None:
    """‖found − exact‖ < bound · ‖exact‖ for everything, in the reference's shapes."""
    found, exact = results("triton", args, reset), results("reference", args, reset, exact=True)
    for number, (f, e) in enumerate(zip(found, exact, strict=True)):
        assert f.shape == e.shape
        assert (f.to(e.dtype) - e).norm() <= bound * e.norm(), f"result {number}"


@pytest.mark.parametrize("time", LENGTHS)
def test_lengths(device, time):
    assert_close(arguments(device, time), resets(device, time))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_no_state_no_reset(device, dtype):
    a, b, _ = arguments(device, LONG, dtype=dtype)
    assert_close([a, b, None])


@pytest.mark.parametrize("time", [9, LONG])
def test_complex(device, time):
    assert_close(arguments(device, time, dtype=torch.complex64), resets(device, time))


def test_time_contiguous(device):
    time = LENGTHS[1]
    args = [None if x is None else x.transpose(1, -1).contiguous().transpose(1, -1) for x in arguments(device, time)]
    args[2] = args[2].contiguous()
    with ostinato.backend(diagonal_scan="triton"):
        states, _ = diagonal_scan(*args)
    assert states.stride() == args[1].stride()  # No copy to another layout, in or out.
    assert_close(args, resets(device, time))


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (1, 0, 3, 4), (2, 0, 1, 4), (2, 0, 3, 1), (1, 1, 1, 1)])
def test_broadcast_transition(device, shape):
    """Read as it is: batch, time and channels of size 1; the gradient is summed over them."""
    time = LONG if shape == (1, 1, 3, 4) else 10
    a, b, state = arguments(device, time, (3, 4))
    a = 0.9 * torch.rand(tuple(size or time for size in shape), device=device)
    assert_close([a, b, state], resets(device, time) if shape[1] else None)


def test_three_channel_axes_that_no_two_strides_walk(device):
    _, b, state = arguments(device, 9, (2, 3, 2))
    assert_close([0.9 * torch.rand(2, 9, 1, 3, 1, device=device), b, state])


def test_mixed_kinds(device):
    """A real transition of complex states, and a complex transition of real inputs."""
    a, b, state = arguments(device, 20, dtype=torch.complex64)
    assert_close([a.real.contiguous(), b, state])
    assert_close([a, b.real.contiguous(), None])


def test_transposed_and_conjugated_inputs(device):
    a, b, state = arguments(device, 12, (4, 3), torch.complex64)
    assert_close([a.conj(), b.transpose(2, 3).contiguous().transpose(2, 3), state.conj()])


@pytest.mark.parametrize(("dtype", "both"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_half_precision(device, dtype, both):
    """States and their gradient within 1.5 times of what rounding the exact ones costs; the last state in float32.

    The gradient of a half-precision transition is the rounded product of an exact adjoint and a rounded
    state: √2 times that rounding, so its bound is 1.5 · √2.
    """
    a, b, state = arguments(device, LENGTHS[1])
    args = [a.to(dtype) if both else a, b.to(dtype), state]
    found, exact = results("triton", args, None), results("reference", args, None, exact=True)
    assert [x.dtype for x in found] == [dtype, torch.float32, args[0].dtype, dtype, torch.float32]
    for name, f, e in zip(("states", "last", "transition", "inputs", "state"), found, exact, strict=True):
        error, rounding = ((x - e).norm() / e.norm() for x in (f.double(), e.to(dtype).double()))
        bound = 1e-5 if name in ("last", "state") else 1.5 * rounding * (2**0.5 if name == "transition" else 1)
        assert error < bound, name


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_reset_drops_what_is_not_finite(device):
    a, b, state = arguments(device, 20)
    state[:] = torch.nan
    b[:, 3] = torch.inf
    reset = torch.zeros(2, 20, dtype=torch.bool, device=device)
    reset[:, 0] = reset[:, 4] = reset[:, 9] = True
    with ostinato.backend(diagonal_scan="triton"):
        states, _ = diagonal_scan(a, b, state, reset=reset)
    assert torch.isfinite(states[:, :3]).all() and torch.isfinite(states[:, 4:]).all()
    wanted, _ = diagonal_scan(a[:, 4:9], b[:, 4:9])
    torch.testing.assert_close(states[:, 4:9], wanted, rtol=1e-5, atol=1e-6)


def test_growth_and_decay(device):
    """Transitions above 1, and ones that forget within a step or nothing in all."""
    for factor in (1.2, 1e-9, 1 - 1e-5, -1.0, 0.0):
        _, b, state = arguments(device, 10)
        assert_close([torch.full_like(b, factor), b, state])


def test_gradients_are_the_same_every_time(device):
    args = arguments(device, 20 if INTERPRETED else LONG, (3, 2))
    args[0] = 0.9 * torch.rand(1, 1, 3, 1, device=device)
    for first, second in zip(results("triton", args, None), results("triton", args, None), strict=True):
        assert torch.equal(first, second)


def test_compiles_as_one_graph(device):
    args = arguments(device, 12)
    compiled = torch.compile(lambda *x: diagonal_scan(*x), fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in args]
    with ostinato.backend(diagonal_scan="triton"):
        found, wanted = (function(*leaves) for function in (compiled, diagonal_scan))
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w)
            grads = [torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (f, w)]
            torch.testing.assert_close(*grads)


def test_what_it_cannot_do_it_says(device):
    a, b, _ = arguments(device, 6)
    with ostinato.backend(diagonal_scan="triton"):
        with pytest.raises(BackendError, match=r"not torch\.float64"):
            diagonal_scan(a.double(), b)
        a.requires_grad_()
        (grad,) = torch.autograd.grad(diagonal_scan(a, b)[0].sum(), a, create_graph=True)
        with pytest.raises(BackendError, match="differentiable once"):
            grad.sum().backward()
