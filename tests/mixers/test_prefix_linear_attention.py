"""Prefix linear attention: the definition, what it keeps of the law, padding; and the convolution beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.mixers import registry
from ostinato.mixers.prefix_linear_attention import PrefixLinearAttention
from ostinato.models.token_classifier import TokenClassifier
from ostinato.ops.taylor_attention import taylor_features, taylor_width
from ostinato.testing import check_mixer


def _definition(mixer: PrefixLinearAttention, x: Tensor, prefix: Tensor) -> Tensor:
    """Equations (1) and (2), step by step, for a row without resets."""
    heads = (mixer.heads, -1)
    q, k, ke = (
        taylor_features(to(x).unflatten(-1, heads)) for to in (mixer.to_queries, mixer.to_keys, mixer.to_prefix_keys)
    )
    v, ve = (to(x).unflatten(-1, heads) for to in (mixer.to_values, mixer.to_prefix_values))
    outputs = []
    for i in range(x.shape[1]):
        top: Tensor = torch.zeros_like(v[:, 0])
        bottom: Tensor = torch.zeros_like(v[:, 0, :, :1])
        for j in range(x.shape[1]):
            for weight, value, seen in (
                ((q[:, i] * ke[:, j]).sum(-1, keepdim=True), ve[:, j], prefix[:, j]),
                ((q[:, i] * k[:, j]).sum(-1, keepdim=True), v[:, j], torch.full_like(prefix[:, j], j <= i)),
            ):
                kept = weight * seen.view(-1, 1, 1)
                top, bottom = top + kept * value, bottom + kept
        outputs.append(mixer.to_output((top / bottom).flatten(-2)))
    return torch.stack(outputs, 1)


@pytest.fixture
def mixer() -> PrefixLinearAttention:
    return PrefixLinearAttention(8, heads=2, feature_dim=3).double()


def _prefix(*lengths: int, time: int) -> Tensor:
    return torch.arange(time) < torch.tensor(lengths).unsqueeze(1)


def test_it_is_its_definition(mixer: PrefixLinearAttention) -> None:
    x, prefix = torch.randn(3, 9, 8, dtype=torch.float64), _prefix(4, 0, 9, time=9)
    wanted = _definition(mixer, x, prefix)
    y, _ = mixer(x, prefix=prefix)
    assert torch.allclose(y, wanted, atol=1e-12)
    # The way that serves packed rows gives the same.
    begins = torch.zeros(3, 9, dtype=torch.bool)
    begins[:, 0] = True
    assert torch.allclose(mixer(x, reset=begins, prefix=prefix)[0], wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_after_the_prefix_it_is_cut_and_stepped_anywhere(mixer: PrefixLinearAttention, dtype: torch.dtype) -> None:
    mixer = mixer.to(dtype)
    x = torch.randn(2, 10, 8, dtype=dtype, requires_grad=True)
    prefix, tolerance = _prefix(4, 3, time=10), 1e-10 if dtype == torch.float64 else 1e-5
    whole, last = mixer(x, prefix=prefix)
    for cut in (4, 6, 9):
        first, state = mixer(x[:, :cut], prefix=prefix[:, :cut])
        second, end = mixer(x[:, cut:], state)
        assert torch.allclose(torch.cat([first, second], 1), whole, atol=tolerance)
        assert torch.allclose(end.memory, last.memory, atol=10 * tolerance)
    outputs, state = mixer(x[:, :4], prefix=prefix[:, :4])
    pieces = [outputs]
    for t in range(4, 10):
        y, state = mixer.step(x[:, t], state)
        pieces.append(y.unsqueeze(1))
    stepped = torch.cat(pieces, 1)
    assert torch.allclose(stepped, whole, atol=tolerance)
    weights = torch.randn_like(whole)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, *mixer.parameters()]) for y in (whole, stepped)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=100 * tolerance)


def test_resets_separate_packed_prompts_exactly(mixer: PrefixLinearAttention) -> None:
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, [0, 5]], reset[1, [3, 4]] = True, True
    prefix = torch.zeros(2, 12, dtype=torch.bool)
    prefix[0, :2], prefix[0, 5:9], prefix[1, :2], prefix[1, 4:6] = True, True, True, True
    before = mixer(torch.randn(2, 3, 8, dtype=torch.float64))[1]
    y, last = mixer(x, before, reset=reset, prefix=prefix)
    for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 4), (1, 4, 12)):
        part = slice(row, row + 1), slice(start, end)
        entering = ostinato.state.select(before, [row]) if (row, start) == (1, 0) else None
        alone, end_state = mixer(x[part], entering, prefix=prefix[part])
        assert torch.allclose(y[part], alone, atol=1e-12)
        if end == 12:
            assert torch.allclose(last.memory[row], end_state.memory[0], atol=1e-12)


def test_padding_is_not_written(mixer: PrefixLinearAttention) -> None:
    x, prefix = torch.randn(1, 7, 8, dtype=torch.float64), _prefix(4, time=7)
    wanted, last = mixer(x, prefix=prefix)
    padded = torch.cat([torch.randn(1, 2, 8, dtype=torch.float64), x], 1)
    longer = torch.cat([torch.ones(1, 2, dtype=torch.bool), prefix], 1)
    keep = torch.arange(9).unsqueeze(0) >= 2
    y, state = mixer(padded, prefix=longer, keep=keep)
    assert torch.allclose(y[:, 2:], wanted, atol=1e-12) and torch.allclose(state.memory, last.memory, atol=1e-12)
    assert not torch.allclose(mixer(padded, prefix=longer)[0][:, 2:], wanted, atol=1e-3)


def test_without_a_prefix_it_obeys_the_law() -> None:
    report = check_mixer(PrefixLinearAttention(8, heads=2, feature_dim=2), length=9, compile=False, strict=False)
    # What the prompt alone is read with gets no gradient where there is no prompt; all else holds.
    assert {row.check for row in report.broken} == {"gradient reaches"}
    for row in report.broken:
        assert "to_prefix_keys.weight" in row.where and "to_keys" not in row.where.replace("to_prefix_keys", "")
    assert "prefix_linear_attention" in registry.prefix_mixers()


def test_a_prefix_sees_ahead_and_the_rest_does_not(mixer: PrefixLinearAttention) -> None:
    x, prefix = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True), _prefix(5, time=8)
    y: Any = mixer(x, prefix=prefix)[0]
    (gradient,) = torch.autograd.grad(y[0, 1].sum(), x, retain_graph=True)
    assert gradient[0, :5].abs().sum(-1).min() > 0 and not gradient[0, 5:].any()
    (gradient,) = torch.autograd.grad(y[0, 6].sum(), x)
    assert gradient[0, :7].abs().sum(-1).min() > 0 and not gradient[0, 7:].any()


def test_a_network_hands_the_prefix_to_the_layers_that_take_it() -> None:
    plan = "gated_convolution, prefix_linear_attention(heads=2, feature_dim=2), attention(window=4, heads=2)"
    model = TokenClassifier(9, 8, plan)
    tokens = torch.randint(9, (2, 6))
    causal, _ = model(tokens)
    seeing, state = model(tokens, prefix=_prefix(4, 4, time=6))
    assert not torch.allclose(causal[:, 0], seeing[:, 0])
    assert state[1].memory.shape == (2, 2, taylor_width(2), 5)
