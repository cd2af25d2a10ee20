"""The one-launch step of the matrix memories against their definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato import ops
from ostinato.ops.delta_rule import unit_length
from ostinato.ops.exponential_attention import ExponentialState

BATCH, HEADS = 2, 3


def wide(argument):
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    return type(argument)(*map(wide, argument)) if isinstance(argument, tuple) else argument


def assert_one_step(engine, arguments, options, bound=1e-6):
    with torch.no_grad(), ostinato.backend("triton_step"):
        found, state = engine(*arguments, **options)
    with ostinato.backend("reference"):
        exact, after = engine(*map(wide, arguments), **{key: wide(value) for key, value in options.items()})
    pairs = [(found, exact), *zip(*(s if isinstance(s, tuple) else (s,) for s in (state, after)), strict=True)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        limit = bound if ours.dtype == torch.float32 else 4e-3
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("start", ["zero", "given", "reset"])
def test_linear_attention(device, dtype, decay, start):
    q, k = torch.randn(2, BATCH, 1, HEADS, 20, device=device, dtype=dtype).unbind()
    v = torch.randn(BATCH, 1, HEADS, 37, device=device, dtype=dtype)
    shape = {"none": None, "scalar": (BATCH, 1, HEADS), "vector": (BATCH, 1, HEADS, 20)}[decay]
    g = None if shape is None else F.logsigmoid(torch.randn(shape, device=device))
    options = {"reset": torch.tensor([[True], [False]], device=device) if start == "reset" else None}
    options["state"] = None if start == "zero" else torch.randn(BATCH, HEADS, 20, 37, device=device)
    assert_one_step(ops.linear_attention, (q, k, v, g), options)


@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("others", [False, True])
def test_delta_rule(device, writes, others):
    q = torch.randn(BATCH, 1, HEADS, 16, device=device)
    k, r, e = F.normalize(torch.randn(3, BATCH, writes, HEADS, 16, device=device), dim=-1).unbind()
    v = torch.randn(BATCH, writes, HEADS, 33, device=device)
    beta = 2 * torch.rand(BATCH, writes, HEADS, device=device)
    g = F.logsigmoid(torch.randn(BATCH, 1, HEADS, device=device))
    options = {"state": torch.randn(BATCH, HEADS, 16, 33, device=device)}
    if others:
        options |= {"read_keys": r, "erase_keys": e}
    assert_one_step(ops.delta_rule, (q, k, v, None if others else beta, g), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writes", [1, 2])
def test_delta_rule_with_unit_lengths(device, dtype, writes):
    q = torch.randn(BATCH, 1, HEADS, 20, device=device, dtype=dtype)
    k = torch.randn(BATCH, writes, HEADS, 20, device=device, dtype=dtype)
    v = torch.randn(BATCH, writes, HEADS, 9, device=device, dtype=dtype)
    beta = torch.rand(BATCH, writes, HEADS, device=device)
    options = {"state": torch.randn(BATCH, HEADS, 20, 9, device=device), "normalize": True}
    arguments = (q, k, v, beta)
    if dtype == torch.float32:
        return assert_one_step(ops.delta_rule, arguments, options)
    # Vectors of unit length are rounded to bf16, as tensors of their own would be.
    with torch.no_grad(), ostinato.backend("triton_step"):
        found, state = ops.delta_rule(*arguments, **options)
    with ostinato.backend("reference"):
        wanted, after = ops.delta_rule(
            unit_length(q).float(), unit_length(k).float(), v.float(), beta, state=options["state"]
        )
    assert (state - after).norm() <= 1e-6 * after.norm()
    assert (found.float() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("start", ["zero", "given", "reset"])
def test_exponential_attention(device, size, start):
    q, k = torch.randn(2, BATCH, 1, HEADS, 16, device=device).unbind()
    v = torch.randn(BATCH, 1, HEADS, 24, device=device)
    i, f = size * torch.randn(BATCH, 1, HEADS, device=device), F.logsigmoid(torch.randn(BATCH, 1, HEADS, device=device))
    options = {"reset": torch.tensor([[False], [True]], device=device) if start == "reset" else None}
    if start != "zero":
        memory, sums = torch.randn(BATCH, HEADS, 16, 24, device=device), torch.randn(BATCH, HEADS, 16, device=device)
        options["state"] = ExponentialState(memory, sums, size * torch.randn(BATCH, HEADS, device=device))
    assert_one_step(ops.exponential_attention, (q, k, v, i, f), options)


def test_it_serves_one_step_without_derivatives_and_says_so(device):
    q = torch.randn(BATCH, 2, HEADS, 16, device=device)
    with ostinato.backend("triton_step"):
        with pytest.raises(ostinato.errors.BackendError, match="one step"):
            ops.linear_attention(q, q, q)
        with pytest.raises(ostinato.errors.BackendError, match="no derivative"):
            ops.linear_attention(q[:, :1].requires_grad_(), q[:, :1], q[:, :1])
        with pytest.raises(ostinato.errors.BackendError, match="float64"):
            ops.linear_attention(*[q[:, :1].double().detach()] * 3)
