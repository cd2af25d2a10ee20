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


# A program has 32 steps forward, and here 33 backward.
@pytest.mark.parametrize("time", [1, 2, 32, 33, 34, 70])
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


def jointly(parts, w, state, b, reset, silu, cotangents):
    """Outputs and all gradients; nothing is asked of a state of None or a bias of None."""
    given = [None if a is None else a.detach().requires_grad_() for a in (*parts, w, state, b)]
    x, (w, state, b) = given[: len(parts)], given[len(parts) :]
    outputs, _ = joint_short_convolution(x, w, state, bias=b, reset=reset, silu=silu)
    return *outputs, *torch.autograd.grad(outputs, [a for a in given if a is not None], cotangents)


def doubled(*arguments):
    return [doubled(*a) if isinstance(a, list) else None if a is None else a.double() for a in arguments]


def assert_is_the_definition(parts, w, state, b, reset, silu, bound):
    """Values, with and without gradients, and gradients are those of float64; and the same bits when asked again."""
    cotangents = [torch.randn_like(part) for part in parts]
    with ostinato.backend(short_convolution="triton"):
        found = jointly(parts, w, state, b, reset, silu, cotangents)
        again = jointly(parts, w, state, b, reset, silu, cotangents)
        with torch.no_grad():
            alone, _ = joint_short_convolution(parts, w, state, bias=b, reset=reset, silu=silu)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=False))
    with ostinato.backend("reference"):
        exact = jointly(*doubled(parts, w, state, b), reset, silu, doubled(*cotangents))
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("silu", [(True, True, True), (True, False, True)])
def test_parts_side_by_side_with_silu(device, dtype, resets, silu):
    batch, time, widths = 2, 35, (70, 1, 130)
    parts = [torch.randn(batch, time, width, device=device, dtype=dtype) for width in widths]
    w, b = torch.randn(4, sum(widths), device=device), torch.randn(sum(widths), device=device)
    state = torch.randn(batch, 3, sum(widths), device=device, dtype=dtype)
    reset = torch.rand(batch, time, device=device) < 0.2 if resets else None
    # Of all there is at least the last rounding, of what is returned.
    assert_is_the_definition(parts, w, state, b, reset, silu, 1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("width", [5, 16])
def test_many_taps_without_state_and_bias(device, width):
    widths = (64, 32, 33)  # parts that fill their blocks, and one that begins another
    parts = [torch.randn(1, 34, each, device=device) for each in widths]
    w = torch.randn(width, sum(widths), device=device)
    assert_is_the_definition(parts, w, None, None, None, (True,) * 3, 1e-6)


@pytest.mark.parametrize("resets", [False, True])
def test_fewer_steps_than_taps(device, resets):
    x, w, b = torch.randn(2, 3, 6, device=device), torch.randn(16, 6, device=device), torch.randn(6, device=device)
    state = torch.randn(2, 15, 6, device=device)
    reset = torch.tensor([[False, True, False], [False, False, False]], device=device) if resets else None
    assert_is_the_definition([x], w, state, b, reset, (True,), 1e-6)


def test_parts_of_two_types(device):
    parts = [torch.randn(2, 9, 5, device=device, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    w, b = torch.randn(4, 10, device=device), torch.randn(10, device=device)
    with ostinato.backend(short_convolution="triton"):
        found, _ = joint_short_convolution(parts, w, bias=b, silu=(True, True))
    with ostinato.backend("reference"):
        exact, _ = joint_short_convolution(doubled(*parts), w.double(), bias=b.double(), silu=(True, True))
    assert [y.dtype for y in found] == [torch.float32, torch.float16]
    for ours, theirs, bound in zip(found, exact, (1e-6, 2**-11), strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # numpy's, in the interpreter
def test_silu_far_from_zero(device):
    """Where the exponential overflows or vanishes there is nothing but 0 and 1: no NaN comes of it."""
    x = torch.tensor([-1e30, -1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, 1e30], device=device).reshape(1, -1, 1)
    x.requires_grad_()
    with ostinato.backend(short_convolution="triton"):
        (y,), _ = joint_short_convolution([x], torch.ones(1, 1, device=device), silu=(True,))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y[0, :, 0], x[0, :, 0].clamp(min=0))
    assert torch.allclose(grad[0, :, 0], torch.tensor([0, 0, 0, 0, 0.5, 1, 1, 1, 1], device=device))


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


@pytest.mark.parametrize("silu", [(True, True), (True, False)])
def test_parts_compile(device, silu):
    given = [torch.randn(shape, device=device) for shape in ((2, 9, 6), (4, 12), (12,), (2, 3, 12))]

    def losses(x, w, b, state):
        outputs, _ = joint_short_convolution([x, 2 * x], w, state, bias=b, silu=silu)
        return outputs[0].square().sum() + outputs[1].sum()

    def gradients(function, wanted):
        for index, each in enumerate(given):
            each.requires_grad_(index in wanted)
        return torch.autograd.grad(function(*given), [given[index] for index in wanted])

    with ostinato.backend(short_convolution="triton"):
        for wanted in ((0,), (1, 2), (0, 1, 2, 3)):
            compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
            found, plain = gradients(compiled, wanted), gradients(losses, wanted)
            assert all(torch.allclose(one, other) for one, other in zip(found, plain, strict=True))


def test_the_operators_are_what_they_say(device):
    from ostinato.ops.kernels.triton.short_convolution import convolve, convolve_backward

    def leaves(*shapes):
        return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]

    x, z, w, b, state = leaves((2, 9, 6), (2, 9, 3), (4, 9), (9,), (2, 3, 9))
    reset = torch.rand(2, 9, device=device) < 0.2
    torch.library.opcheck(convolve, (w, b, state, reset, True, [x, z]))
    x, w, state = leaves((2, 9, 6), (4, 6), (2, 3, 6))
    torch.library.opcheck(convolve, (w, None, state.detach(), None, False, [x]))
    for of_state in (False, True):
        given = (*(a.detach() for a in (w, b[:6], state)), reset, True, of_state, [x.detach(), x.detach().clone()])
        torch.library.opcheck(convolve_backward, given, test_utils=("test_schema", "test_faketensor"))
