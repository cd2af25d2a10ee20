"""Linear attention with Taylor features: the features, and every form against linear attention of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, DtypeError, ShapeError
from ostinato.ops import backend, linear_attention
from ostinato.ops.taylor_attention import taylor_attention, taylor_features, taylor_memory, taylor_width


def test_taylor_features_multiply_to_the_series() -> None:
    q, k = torch.randn(2, 7, 5, dtype=torch.float64)
    s = (q * k).sum(-1) / math.sqrt(5)
    assert torch.allclose((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s + s.square() / 2)
    assert taylor_features(q).shape[-1] == taylor_width(5) == 31 and taylor_width(16) == 273
    assert taylor_features(q.half()).dtype == torch.float32
    with pytest.raises(ConfigurationError, match="at least one number"):
        taylor_width(0)


def _draw(time: int, dim: int = 3, width: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (2, time, 2, dim), (2, time, 2, dim), (2, time, 2, width), (2, 2, taylor_width(dim), width)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("route", ["reference", "parallel"])
@pytest.mark.parametrize(("time", "chunk_size"), [(1, 4), (2, 4), (4, 4), (17, 4), (17, 64), (17, None)])
@pytest.mark.parametrize("resets", [False, True])
def test_it_is_linear_attention_of_the_features(route: str, time: int, chunk_size: int | None, resets: bool) -> None:
    q, k, v, state = arguments = _draw(time)
    reset = torch.rand(2, time) < 0.3 if resets else None
    wanted = linear_attention(taylor_features(q), taylor_features(k), v, None, state, reset=reset)
    with backend(taylor_attention=route):
        found = taylor_attention(q, k, v, state, reset=reset, chunk_size=chunk_size)
    weights = [torch.randn_like(part) for part in wanted]
    gradients = []
    for outputs in (found, wanted):
        for one, other in zip(outputs, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-10)
        loss = sum((part * weight).sum() for part, weight in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, arguments))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_memory_of_all_and_steps_without_values() -> None:
    q, k, v, state = _draw(9)
    kept = torch.rand(2, 9, 2, 1) < 0.5
    _, last = taylor_attention(q, k, v * kept, state, chunk_size=4)
    assert torch.allclose(last, state + taylor_memory(k, v * kept), atol=1e-11)
    one = taylor_features(k.double()).masked_fill(~kept, 0).transpose(1, 2).mT @ v.transpose(1, 2)
    assert torch.allclose(taylor_memory(k, v * kept), one, atol=1e-11)


def test_second_derivatives_and_many_at_once() -> None:
    q, k, v, state = _draw(5, dim=2, width=2)
    assert torch.autograd.gradgradcheck(lambda *a: taylor_attention(*a, chunk_size=2), (q, k, v, state))
    many = [torch.stack([part, 2 * part]) for part in (q, k, v, state)]
    y, _ = torch.func.vmap(lambda *a: taylor_attention(*a, chunk_size=2))(*many)
    assert torch.allclose(y[1], taylor_attention(*(part[1] for part in many), chunk_size=2)[0])
    traced = torch.compile(taylor_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(traced(q, k, v, state)[0], taylor_attention(q, k, v, state)[0])


def test_half_precision_is_kept_in_float32() -> None:
    q, k, v, _ = (part.detach() for part in _draw(300, dim=8, width=8))
    y, state = taylor_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    exact, last = taylor_attention(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double())
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (state - last).abs().max() < 1e-4 * last.abs().max()
    assert (y - exact).abs().max() < 0.005 * exact.abs().max()


def test_what_does_not_fit_is_said() -> None:
    q, k, v, state = _draw(4)
    with pytest.raises(ShapeError, match="keys"):
        taylor_attention(q, k[:, :3], v)
    with pytest.raises(ShapeError, match="state"):
        taylor_attention(q, k, v, state[:, :, :-1])
    with pytest.raises(DtypeError):
        taylor_attention(q.long(), k.long(), v.long())
    with pytest.raises(ConfigurationError, match="chunk_size"):
        taylor_attention(q, k, v, chunk_size=0)
