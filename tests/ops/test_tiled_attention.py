"""`tiled_attention` against the engines: any chunk, any tiles, both gates, states carried."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.exponential_attention import exponential_attention
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.tiled_attention import tiled_attention

SIZES = [(1, 1, 1), (8, 4, 2), (16, 3, 5), (64, 64, 64)]


def drawn(time: int = 21) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, time, 3, dim, generator=generator, dtype=torch.float64) for dim in (4, 4, 5))
    i, f = (torch.randn(2, time, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return [q, k, v, 4 * i, F.logsigmoid(3 * f + 1)]


def gradients(outputs: Tensor, memory: Tensor, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    return torch.autograd.grad((outputs * weights).sum() + memory.sin().sum(), arguments)


@pytest.mark.parametrize(("chunk", "rows", "columns"), SIZES)
@pytest.mark.parametrize("normalized", [True, False])
def test_equals_the_loop(normalized: bool, chunk: int, rows: int, columns: int) -> None:
    arguments = drawn()
    if not normalized:
        arguments[3] = F.logsigmoid(arguments[3])
    arguments = [argument.requires_grad_() for argument in arguments]
    q, k, v, i, f = arguments
    with ostinato.backend("reference"):
        if normalized:
            wanted, state = exponential_attention(*arguments)
            memory = state.memory
        else:
            wanted, memory = linear_attention(q, k * i.exp().unsqueeze(-1), v, f)
    sizes = {"chunk_size": chunk, "query_tile": rows, "key_tile": columns}
    outputs, last = tiled_attention(*arguments, normalized=normalized, **sizes)
    torch.testing.assert_close(outputs, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(last.memory, memory, rtol=1e-9, atol=1e-11)
    if normalized:
        torch.testing.assert_close(tuple(last), tuple(state), rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(
        gradients(outputs, last.memory, arguments), gradients(wanted, memory, arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_carried_state_goes_on(normalized: bool) -> None:
    arguments = drawn()
    if not normalized:
        arguments[3] = F.logsigmoid(arguments[3])
    options = {"normalized": normalized, "chunk_size": 8, "query_tile": 4, "key_tile": 4}
    whole, last = tiled_attention(*arguments, **options)
    first, state = tiled_attention(*(argument[:, :9] for argument in arguments), **options)
    second, end = tiled_attention(*(argument[:, 9:] for argument in arguments), state, **options)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(end.memory, last.memory)


def test_half_precision_is_computed_in_float32() -> None:
    arguments = [argument.bfloat16() for argument in drawn()]
    outputs, state = tiled_attention(*arguments)
    wanted, _ = exponential_attention(*arguments)
    assert outputs.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    torch.testing.assert_close(outputs, wanted)


def test_closed_gates_stay_finite() -> None:
    q, k, v, i, f = drawn()
    arguments = [argument.float().requires_grad_() for argument in (q, k, v, i - 200, f * 50)]
    outputs, state = tiled_attention(*arguments, chunk_size=8, query_tile=4, key_tile=4)
    found = [outputs, *gradients(outputs, state.memory, arguments)]
    assert all(bool(value.isfinite().all()) for value in found)


def test_refuses_what_does_not_fit() -> None:
    q, k, v, i, f = drawn()
    with pytest.raises(ConfigurationError, match="at least one token, got 0, 64 and 64"):
        tiled_attention(q, k, v, i, f, chunk_size=0)
    with pytest.raises(ShapeError, match="log_input"):
        tiled_attention(q, k, v, i[:, 1:], f)
