"""The Triton route of `short_convolution` against its definition in float64: values, gradients, compiled."""

from __future__ import annotations

import pytest
import torch

import ostinato
from ostinato.errors import BackendError
from ostinato.ops import short_convolution
from ostinato.ops.short_convolution import joint_short_convolution


def values_and_gradients(x, w, state, b, reset, cotangent):
    given = [a.detach().requires_grad_() for a in (x, w, state, b)]
    y, last = short_convolution(given[0], given[1], given[2], bias=given[3], reset=reset)
    return (y, last, *torch.autograd.grad((y * cotangent).sum() + last.square().sum(), given))


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resets", [False, True])
def test_it_is_the_definition(device, time, width, dtype, resets):
    batch, channels = 2, 70
    x = torch.randn(batch, time, channels, device=device, dtype=dtype)
    w, b = torch.randn(width, channels, device=device), torch.randn(channels, device=device)
    state = torch.randn(batch, width - 1, channels, device=device, dtype=dtype)
    cotangent = torch.randn_like(x)
    reset = torch.rand(batch, time, device=device) < 0.2 if resets else None
    with ostinato.backend(short_convolution="triton"):
        found = values_and_gradients(x, w, state, b, reset, cotangent)
    with ostinato.backend("reference"):
        exact = values_and_gradients(*(a.double() for a in (x, w, state, b)), reset, cotangent.double())
    for ours, theirs in zip(found, exact, strict=True):
        # One rounding to bf16 costs at most 2^-8 of each number; Triton's interpreter cuts instead, at most 2^-7.
        bound = 1e-6 if ours.dtype == torch.float32 else 2**-8 if device.type == "cuda" else 2**-7
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resets", [False, True])
def test_parts_side_by_side_with_silu(device, dtype, resets):
    batch, time, widths, silu = 2, 130, (70, 3, 20), (True, False, True)
    parts = [torch.randn(batch, time, width, device=device, dtype=dtype) for width in widths]
    w, b = torch.randn(4, sum(widths), device=device), torch.randn(sum(widths), device=device)
    state = torch.randn(batch, 3, sum(widths), device=device, dtype=dtype)
    cotangents = [torch.randn_like(part) for part in parts]
    reset = torch.rand(batch, time, device=device) < 0.2 if resets else None

    def run(parts, w, state, b, cotangents):
        given = [a.detach().requires_grad_() for a in (*parts, w, state, b)]
        outputs, _ = joint_short_convolution(given[:3], given[3], given[4], bias=given[5], reset=reset, silu=silu)
        return *outputs, *torch.autograd.grad(outputs, given, cotangents)

    with ostinato.backend(short_convolution="triton"):
        found = run(parts, w, state, b, cotangents)
        with torch.no_grad():  # nothing is kept
            again, _ = joint_short_convolution(parts, w, state, bias=b, reset=reset, silu=silu)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=False))
    with ostinato.backend("reference"):
        exact = run(
            *([a.double() for a in p] if isinstance(p, list) else p.double() for p in (parts, w, state, b, cotangents))
        )
    for ours, theirs in zip(found, exact, strict=True):
        # What went into silu is kept in the type of the inputs: a second rounding in the derivative.
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_it_compiles_and_is_differentiable_once(device):
    x, w = torch.randn(2, 9, 6, device=device, requires_grad=True), torch.randn(4, 6, device=device)
    with ostinato.backend(short_convolution="triton"):
        compiled = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(x, w)[0].square().sum(), x)
        y = short_convolution(x, w)[0].square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        assert torch.allclose(first, grad)
        with pytest.raises(BackendError, match="parallel"):
            torch.autograd.grad(first.square().sum(), x)

        def activated(x, w):
            return joint_short_convolution([x, 2 * x], torch.cat([w, w], 1), silu=[True, False])[0][0].square().sum()

        (grad,) = torch.autograd.grad(torch.compile(activated, fullgraph=True, backend="aot_eager")(x, w), x)
        assert torch.allclose(torch.autograd.grad(activated(x, w), x)[0], grad)
