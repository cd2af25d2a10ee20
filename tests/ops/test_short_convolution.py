"""`short_convolution`: the definition, torch's convolution, splits, resets, derivatives, and bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ostinato
from ostinato.errors import DtypeError, NonFiniteError, ShapeError
from ostinato.ops import short_convolution
from ostinato.ops.short_convolution import joint_short_convolution

BATCH, TIME, CHANNELS, WIDTH = 2, 11, 5, 4


def arguments(time=TIME, width=WIDTH):
    x, w = torch.randn(BATCH, time, CHANNELS).double(), torch.randn(width, CHANNELS).double()
    return x, w, torch.randn(BATCH, width - 1, CHANNELS).double(), torch.randn(CHANNELS).double()


@pytest.mark.parametrize("time", [1, 2, 3, TIME])
@pytest.mark.parametrize("width", [1, 2, WIDTH])
@pytest.mark.parametrize("resets", [False, True])
def test_parallel_is_the_loop(time, width, resets):
    x, w, state, b = arguments(time, width)
    reset = torch.rand(BATCH, time) < 0.4 if resets else None
    with ostinato.backend("reference"):
        wanted, _ = short_convolution(x, w, state, bias=b, reset=reset)
    found, last = short_convolution(x, w, state, bias=b, reset=reset)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    # The state is what the next step needs: one more step from it is the longer sequence.
    more = torch.randn(BATCH, 1, CHANNELS).double()
    longer = None if reset is None else F.pad(reset, (0, 1))
    with ostinato.backend("reference"):
        whole, _ = short_convolution(torch.cat([x, more], 1), w, state, bias=b, reset=longer)
    assert torch.allclose(short_convolution(more, w, last, bias=b)[0], whole[:, -1:], rtol=0, atol=1e-12)


def test_it_is_torchs_convolution():
    x, w, _, b = arguments()
    padded = F.pad(x.mT, (WIDTH - 1, 0))
    wanted = F.conv1d(padded, w.flip(0).T.unsqueeze(1), b, groups=CHANNELS).mT
    assert torch.allclose(short_convolution(x, w, bias=b)[0], wanted, rtol=0, atol=1e-12)


def test_derivatives():
    x, w, state, b = (a.requires_grad_() for a in arguments(5, 3))
    reset = torch.tensor([[False, False, True, False, False], [False] * 5])

    def function(x, w, state, b):
        return short_convolution(x, w, state, bias=b, reset=reset)

    assert torch.autograd.gradcheck(function, (x, w, state, b))
    assert torch.autograd.gradgradcheck(function, (x, w, state, b))


@pytest.mark.parametrize("route", ["reference", "parallel"])
def test_parts_are_what_stands_side_by_side(route):
    x, w, state, b = arguments()
    reset = torch.rand(BATCH, TIME) < 0.3
    with ostinato.backend(route):
        whole, last = short_convolution(x, w, state, bias=b, reset=reset)
        parts, again = joint_short_convolution(x.split([2, 3], -1), w, state, bias=b, reset=reset, silu=(True, False))
    assert torch.equal(again, last)
    assert torch.allclose(parts[0], F.silu(whole[..., :2]), rtol=0, atol=1e-12)
    assert torch.equal(parts[1], whole[..., 2:])
    (y,), _ = joint_short_convolution([x.bfloat16()], w.float(), silu=[True])
    assert y.dtype == torch.bfloat16


def test_bad_arguments():
    x, w, state, b = arguments()
    with pytest.raises(ShapeError, match="first part"):
        joint_short_convolution([x, x[:, 1:]], w, silu=[True, True])
    with pytest.raises(ShapeError, match="weight"):
        short_convolution(x, w[:, :-1])
    with pytest.raises(ShapeError, match="taps"):
        short_convolution(x, w, state[:, :-1])
    with pytest.raises(ShapeError, match="bias"):
        short_convolution(x, w, bias=b[:-1])
    with pytest.raises(ShapeError, match="empty"):
        short_convolution(x[:, :0], w)
    with pytest.raises(DtypeError, match="reset"):
        short_convolution(x, w, reset=torch.zeros(BATCH, TIME))
    x[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="inputs"):
        short_convolution(x, w, validate=True)
