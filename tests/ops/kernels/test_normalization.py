"""The Triton routes of `rms_norm` and `swiglu` against their definitions in float64: values, gradients, compiled."""

from __future__ import annotations

import pytest
import torch

import ostinato
from ostinato.errors import BackendError
from ostinato.ops import add_rms_norm, gated_rms_norm, rms_norm, swiglu

EPS = 1e-3
CASES = {
    "norm": lambda x, g, w: (rms_norm(x, w, EPS),),
    "sum": lambda x, g, w: add_rms_norm(x, g, w, EPS),
    "silu": lambda x, g, w: (gated_rms_norm(x, g, w, EPS),),
    "sigmoid": lambda x, g, w: (gated_rms_norm(x, g, w, EPS, activation="sigmoid"),),
    "silu first": lambda x, g, w: (gated_rms_norm(x, g, w, EPS, gate_first=True),),
    "sigmoid first": lambda x, g, w: (gated_rms_norm(x, g, w, EPS, activation="sigmoid", gate_first=True),),
    "swiglu": lambda x, g, w: (swiglu(g, x),),
}


def values_and_gradients(function, arguments, cotangents):
    given = [a.detach().requires_grad_() for a in arguments]
    found = function(*given)
    gradients = torch.autograd.grad(found, given, cotangents[: len(found)], allow_unused=True)
    return [*found, *(g for g in gradients if g is not None)]


@pytest.fixture
def triton():
    with ostinato.backend(rms_norm="triton", swiglu="triton"):
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 5, 70), (9000, 1), (2, 1025), (70, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_definition(device, triton, name, shape, dtype):
    x, g, *cotangents = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    if shape[0] > 1000:  # the terms of the weight's gradient, a sum over rows, are not to cancel
        x, g, *cotangents = (tensor.abs() for tensor in (x, g, *cotangents))
    w = torch.randn(shape[-1], device=device)
    found = values_and_gradients(CASES[name], (x, g, w), cotangents)
    with ostinato.backend(rms_norm="reference", swiglu="reference"):
        exact = values_and_gradients(CASES[name], [a.double() for a in (x, g, w)], [a.double() for a in cotangents])
    assert len(found) == len(exact)
    # One rounding costs at most half a unit in the last place of each number: 2^-8 and 2^-11 of it. The norm of a
    # sum, and its gradient, are those of the sum that was rounded to half precision: as much again in each factor.
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for ours, theirs in zip(found, exact, strict=True):
        bound = 4 * unit[dtype] if name == "sum" else unit[ours.dtype]
        assert (ours.double() - theirs).norm() <= bound * theirs.norm() + 1e-6


def test_the_types_of_a_residual_stream(device, triton):
    """A float32 stream, a branch in half precision, and a norm in half precision: each gradient in its own type."""
    x, branch = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device).bfloat16()
    w = torch.randn(40, device=device)
    cotangents = [torch.randn_like(x), torch.randn_like(branch)]

    def function(x, branch, w):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.bfloat16
        return add_rms_norm(x, branch, w, EPS, dtype=dtype)

    found = values_and_gradients(function, (x, branch, w), cotangents)
    with ostinato.backend(rms_norm="reference", swiglu="reference"):
        exact = values_and_gradients(function, [a.double() for a in (x, branch, w)], [a.double() for a in cotangents])
    assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for ours, theirs in zip(found, exact, strict=True):
        bound = 2e-6 if ours.dtype == torch.float32 else 2**-8
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_inputs_that_are_not_contiguous(device, triton):
    x, g = torch.randn(12, 5, 6, device=device).transpose(0, 2), torch.randn(12, 6, 5, device=device).permute(1, 2, 0)
    w = torch.randn(24, device=device)[::2]
    cotangent = torch.randn(5, 6, 12, device=device).transpose(0, 1)
    for function in CASES.values():
        if len(function(x, g, w)) > 1:
            continue
        found = values_and_gradients(function, (x, g, w), [cotangent])
        again = values_and_gradients(function, [a.contiguous() for a in (x, g, w)], [cotangent.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_what_the_kernels_leave_to_others(device, triton):
    x, w = torch.randn(2, 4, device=device), torch.randn(4, device=device)
    with pytest.raises(BackendError, match="float64"):
        rms_norm(x.double(), w.double())
    with pytest.raises(BackendError, match="nothing"):
        rms_norm(x[:0], w)
    with pytest.raises(BackendError, match="16384"):
        rms_norm(x.new_zeros(1, 20000), x.new_zeros(20000))
    with pytest.raises(BackendError, match="nothing"):
        swiglu(x[:0], x[:0])


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_is_differentiable_once(device, triton, name):
    x, g, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 6), (3, 6), (6,)))

    def loss(x, g, w):
        return sum(y.square().sum() for y in CASES[name](x, g, w)[-1:])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, g, w), x)
    (first,) = torch.autograd.grad(loss(x, g, w), x, create_graph=True)
    assert torch.allclose(first, grad)
    with pytest.raises(BackendError, match="parallel"):
        torch.autograd.grad(first.square().sum(), x)
