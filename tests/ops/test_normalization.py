"""`rms_norm`, `add_rms_norm`, `gated_rms_norm` and `swiglu`: their formulas, torch's norm, types, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ostinato
from ostinato.errors import ConfigurationError, DtypeError, ShapeError
from ostinato.ops import add_rms_norm, gated_rms_norm, rms_norm, swiglu

EPS = 1e-3


def formula(x, w):
    return w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.fixture(params=["reference", "parallel"])
def route(request):
    with ostinato.backend(request.param):
        yield


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 7)])
def test_the_formulas(route, shape):
    x, g, b = (torch.randn(shape).double() for _ in range(3))
    w = torch.randn(shape[-1]).double()
    wanted = formula(x, w)
    assert torch.allclose(rms_norm(x, w, EPS), wanted, rtol=0, atol=1e-12)
    total, normed = add_rms_norm(x, b, w, EPS)
    assert torch.equal(total, x + b)
    assert torch.allclose(normed, formula(x + b, w), rtol=0, atol=1e-12)
    for activation, act in (("silu", F.silu), ("sigmoid", torch.sigmoid)):
        behind = gated_rms_norm(x, g, w, EPS, activation=activation)
        before = gated_rms_norm(x, g, w, EPS, activation=activation, gate_first=True)
        assert torch.allclose(behind, wanted * act(g), rtol=0, atol=1e-12)
        assert torch.allclose(before, formula(x * act(g), w), rtol=0, atol=1e-12)
    assert torch.allclose(swiglu(g, x), F.silu(g) * x, rtol=0, atol=1e-12)


def test_types(route):
    x, g, w = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.randn(8)
    for found in (rms_norm(x, w, EPS), gated_rms_norm(x, g, w, EPS)):
        assert found.dtype == torch.bfloat16
    exact = formula(x.double(), w.double())
    # Computed in float32 and rounded once.
    assert torch.equal(rms_norm(x, w, EPS, dtype=torch.float32).bfloat16(), rms_norm(x, w, EPS))
    assert torch.allclose(rms_norm(x, w, EPS, dtype=torch.float32).double(), exact, rtol=1e-5, atol=1e-5)
    total, normed = add_rms_norm(x.float(), g, w, EPS, dtype=torch.bfloat16)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    # Autocast changes neither: the types are the caller's.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(x.float(), w, EPS), rms_norm(x, w, EPS, dtype=torch.float32))


def test_derivatives(route):
    x, g, b = (torch.randn(2, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    w = torch.randn(3, dtype=torch.double, requires_grad=True)
    cases = {
        lambda x, w: rms_norm(x, w, EPS): (x, w),
        lambda x, b, w: add_rms_norm(x, b, w, EPS): (x, b, w),
        lambda x, g, w: gated_rms_norm(x, g, w, EPS): (x, g, w),
        lambda x, g, w: gated_rms_norm(x, g, w, EPS, activation="sigmoid", gate_first=True): (x, g, w),
        swiglu: (g, x),
    }
    for function, arguments in cases.items():
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_empty_and_bad_arguments():
    x, w = torch.randn(2, 4), torch.randn(4)
    assert rms_norm(x[:0], w).shape == (0, 4)
    assert swiglu(x[:0], x[:0]).shape == (0, 4)
    with pytest.raises(ShapeError, match="weight"):
        rms_norm(x, w[:-1])
    with pytest.raises(ShapeError, match="branch"):
        add_rms_norm(x, x[:1], w)
    with pytest.raises(ShapeError, match="gate"):
        gated_rms_norm(x, x[:, :2], w)
    with pytest.raises(ShapeError, match="value"):
        swiglu(x, x[:1])
    with pytest.raises(ShapeError, match="no axis"):
        rms_norm(torch.tensor(1.0), w)
    with pytest.raises(DtypeError, match="x must be floating"):
        rms_norm(x.long(), w)
    with pytest.raises(DtypeError, match="gate must be floating"):
        swiglu(x.long(), x)
    with pytest.raises(ConfigurationError, match="tanh"):
        gated_rms_norm(x, x, w, activation="tanh")
