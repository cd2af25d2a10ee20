"""The products of a single step, in one launch each, against the modules that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ostinato
from ostinato import ops
from ostinato.errors import BackendError
from ostinato.ops.linear_step import Window

pytest.importorskip("triton")
from ostinato.ops.kernels.triton import step_parts

BATCH = 2


@pytest.fixture(autouse=True, params=[1, 264])
def _programs(request, monkeypatch):
    """As many rows to a program as it holds, and as few as there are programs for."""
    monkeypatch.setattr(step_parts, "PROGRAMS", request.param)


def draw(device, *shapes, dtype=torch.float32):
    return [torch.randn(*shape, device=device).to(dtype) for shape in shapes]


def assert_close(ours, theirs, dtype):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    # bf16: both round once where they round; a sum in another order may fall on the neighbouring number.
    bound = 1e-5 if dtype == torch.float32 else 8e-3
    assert (ours.double() - theirs.double()).norm() <= bound * theirs.double().norm()


def both(function):
    with torch.no_grad():
        with ostinato.backend(linear_step="triton", projections_step="triton"):
            ours = function()
        with ostinato.backend(linear_step="parallel", projections_step="parallel"):
            return ours, function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("gate", ["none", "silu", "sigmoid", "first"])
def test_linear_step(device, dtype, heads, gate):
    x, weight, norm, gates, residual = draw(
        device, (BATCH, 36), (21, 36), (36 // heads,), (BATCH, 36), (BATCH, 21), dtype=dtype
    )
    options = {"norm": norm, "residual": residual, "gate": None if gate == "none" else gates}
    options |= {"activation": "sigmoid" if gate == "sigmoid" else "silu", "gate_first": gate == "first"}

    def step():
        entered = torch.empty_like(x)
        return ops.linear_step(x, weight, entered=entered, **options), entered

    ours, theirs = both(step)
    for found, wanted in zip(ours, theirs, strict=True):
        assert_close(found, wanted, dtype)


def test_a_product_and_nothing_else(device):
    x, weight = draw(device, (1, 20), (7, 20))
    y, _ = both(lambda: ops.linear_step(x, weight))
    assert_close(y, F.linear(x, weight), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_step(device, dtype):
    x, gate, value, norm = draw(device, (3, 24), (40, 24), (40, 24), (24,), dtype=dtype)
    ours, theirs = both(lambda: ops.swiglu_step(x, gate, value, norm=norm))
    assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_step(device, dtype, width, bias):
    x, norm, *weights = draw(device, (BATCH, 20), (20,), (16, 20), (33, 20), (3, 20), (8, 20), dtype=dtype)
    taps, shift, window = draw(device, (width, 49), (49,), (BATCH, width - 1, 49), dtype=dtype)
    results = []
    for route in ("triton", "parallel"):
        held = window.clone()
        with torch.no_grad(), ostinato.backend(projections_step=route):
            outputs = ops.projections_step(
                x, weights, norm=norm, convolution=Window(taps, shift if bias else None, held),
                silu=[True, False, False, True],
            )  # fmt: skip
        results.append([*outputs, held])
    for ours, theirs in zip(*results, strict=True):
        if theirs.numel():
            assert_close(ours, theirs, dtype)


def test_projections_without_a_convolution(device):
    x, *weights = draw(device, (1, 12), (16, 12), (5, 12))
    ours, _ = both(lambda: ops.projections_step(x, weights, silu=[False, True]))
    assert_close(ours[0], F.linear(x, weights[0]), torch.float32)
    assert_close(ours[1], F.silu(F.linear(x, weights[1])), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("writes", "decays", "unit"), [(1, True, True), (3, False, True), (2, True, False)])
def test_delta_step(device, dtype, writes, decays, unit):
    heads, key_dim, value_dim = 3, 12, 20
    q, k, v, rates, steps = draw(
        device, (BATCH, heads, key_dim), (BATCH, writes, heads, key_dim), (BATCH, writes, heads, value_dim),
        (BATCH, writes, heads), (BATCH, heads), dtype=dtype,
    )  # fmt: skip
    log_rate, bias, memory = draw(device, (heads,), (heads,), (BATCH, heads, key_dim, value_dim))
    gates = (steps, log_rate, bias) if decays else (None, None, None)
    k = k if unit else F.normalize(k, dim=-1)
    results = []
    for route in ("triton", "parallel"):
        held = memory.clone()
        with torch.no_grad(), ostinato.backend(delta_step=route):
            y = ops.delta_step(q, k, v, rates, *gates, held, largest_rate=2.0, unit=unit, scale=key_dim**-0.5)
        results.append((y, held))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, dtype)


def test_what_is_refused(device):
    x, weight = draw(device, (1, 12), (4, 12))
    with ostinato.backend(linear_step="triton"):
        with pytest.raises(BackendError, match="no derivative"):
            ops.linear_step(x, weight.clone().requires_grad_())
        with pytest.raises(BackendError, match=r"not in torch\.float64"):
            ops.linear_step(x.double(), weight.double())
        with pytest.raises(BackendError, match="batches of at most 8"):
            ops.linear_step(x.expand(9, -1), weight)
        with pytest.raises(BackendError, match="not contiguous"):
            ops.linear_step(x, draw(device, (12, 4))[0].T)
        with pytest.raises(BackendError, match="different types"):
            ops.swiglu_step(x, weight, weight.bfloat16())
    with ostinato.backend(delta_step="triton"), pytest.raises(BackendError, match="memory is not contiguous"):
        q, v, rates = draw(device, (1, 1, 4), (1, 1, 1, 6), (1, 1, 1))
        memory = torch.zeros(1, 1, 6, 4, device=device).mT
        ops.delta_step(q, q.unsqueeze(1), v, rates, None, None, None, memory)
