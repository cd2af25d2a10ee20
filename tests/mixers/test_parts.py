"""The pieces that mixers share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import split_heads
from ostinato.mixers.parts import (
    GatedNorm,
    ShortConvolution,
    TokenShift,
    l2_normalize,
    linear_together,
    log_uniform,
    softplus_inverse,
)
from ostinato.ops.short_convolution import previous_is_same_sequence


def test_narrow_maps_together_are_the_maps():
    x = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    maps = [torch.nn.Linear(4, width, bias=False).double() for width in (3, 6, 1)]
    together = linear_together(x, *maps)
    assert len(together) == 3
    for found, each in zip(together, maps, strict=True):
        assert torch.allclose(found, each(x), rtol=0, atol=1e-12)
    weights = [each.weight for each in maps]
    wanted = torch.autograd.grad(sum(each(x).square().sum() for each in maps), [x, *weights])
    found = torch.autograd.grad(sum(y.square().sum() for y in together), [x, *weights])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    # One that is watched computes for itself, and so does one that is more than a matrix.
    seen = []
    maps[1].register_forward_hook(lambda module, given, output: seen.append(output))
    assert torch.equal(linear_together(x, *maps)[1], seen[0])
    biased = torch.nn.Linear(4, 2).double()
    assert torch.equal(linear_together(x, biased)[0], biased(x))


def test_softplus_inverse_inverts_from_tiny_to_huge() -> None:
    y = torch.tensor([1e-12, 1e-3, 0.1, 1.0, 30.0, 1e4], dtype=torch.float64)
    assert torch.allclose(F.softplus(softplus_inverse(y)), y, rtol=1e-9, atol=0)


def test_log_uniform_stays_in_its_range() -> None:
    draws = log_uniform(10_000, 1e-3, 1e-1, floor=2e-3)
    assert draws.min() >= 2e-3 - 1e-9 and draws.max() <= 0.1 + 1e-6
    assert (draws > 1e-2).float().mean() == pytest.approx(0.5, abs=0.03)


def test_l2_normalize_gives_unit_vectors_and_zero_for_zero() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(l2_normalize(x), expected)
    zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    l2_normalize(zero).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all() and not l2_normalize(zero).any()


def test_l2_normalize_computes_half_precision_in_single() -> None:
    x = (torch.randn(4, 64) * 300).half()  # squares sum to more than float16 holds
    y = l2_normalize(x)
    assert y.dtype == torch.float16
    assert torch.allclose(y.float().norm(dim=-1), torch.ones(4), atol=2e-3)


def test_previous_is_same_sequence_looks_at_every_reset_between() -> None:
    reset = torch.tensor([[False, False, True, False, False, True]])
    assert previous_is_same_sequence(reset, 1)[0].tolist() == [True, True, False, True, True, False]
    assert previous_is_same_sequence(reset, 2)[0].tolist() == [True, True, False, False, True, False]
    assert previous_is_same_sequence(reset, 9)[0].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_is_torchs(width: int, bias: bool) -> None:
    convolution = ShortConvolution(3, width, bias=bias).double()
    if convolution.bias is not None:
        torch.nn.init.normal_(convolution.bias)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    y, state = convolution(x, convolution.initial_state(2))
    kernel = convolution.weight.T.flip(1).unsqueeze(1)
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), kernel, convolution.bias, groups=3).mT
    assert torch.allclose(y, expected)
    assert torch.equal(state, x[:, 9 - (width - 1) :])


@pytest.mark.parametrize("cuts", [[1], [2, 3], [4, 8], list(range(1, 9))])
def test_short_convolution_streams_with_resets(cuts: list[int]) -> None:
    convolution = ShortConvolution(3, 4).double()
    x, start = torch.randn(5, 9, 3, dtype=torch.float64), torch.randn(5, 3, 3, dtype=torch.float64)
    reset = torch.rand(5, 9) < 0.3
    reset[0], reset[1] = True, False
    y, last = convolution(x, start, reset)
    pieces, state, begin = [], start, 0
    for end in [*cuts, 9]:
        piece, state = convolution(x[:, begin:end], state, reset[:, begin:end])
        pieces.append(piece)
        begin = end
    assert torch.allclose(torch.cat(pieces, 1), y) and torch.equal(state, last)


def test_a_reset_forgets_even_what_is_not_finite() -> None:
    convolution, shift = ShortConvolution(2, 3), TokenShift(2)
    x = torch.randn(1, 4, 2)
    x[0, 1] = torch.nan
    reset = torch.tensor([[False, False, True, False]])
    y, state = convolution(x, torch.full((1, 2, 2), torch.inf), reset)
    assert torch.isfinite(y[:, 2:]).all() and torch.isfinite(state).all()
    previous, _ = shift(x, torch.zeros(1, 2), reset)
    assert torch.isfinite(previous[:, 2:]).all()


def test_a_convolution_without_taps_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="width 0"):
        ShortConvolution(4, 0)


def test_token_shift_is_one_step_late() -> None:
    x, state = torch.randn(2, 5, 3), torch.randn(2, 3)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[1, [0, 3]] = True
    previous, last = TokenShift(3)(x, state, reset)
    assert torch.equal(previous[0, 0], state[0]) and torch.equal(previous[:, 1:3], x[:, :2])
    assert not previous[1, 0].any() and not previous[1, 3].any() and torch.equal(previous[0, 3], x[0, 2])
    assert torch.equal(last, x[:, -1])


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_gated_norm_before_and_after(gate: str) -> None:
    x, z = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    opened = F.silu(z) if gate == "silu" else torch.sigmoid(z)

    def normed(v: torch.Tensor) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    after, before = GatedNorm(8, gate=gate).double(), GatedNorm(8, gate=gate, gate_first=True).double()
    assert torch.allclose(after(x, z), normed(x) * opened)
    assert torch.allclose(before(x, z), normed(x * opened))
    assert torch.allclose(after(x), normed(x))
    assert torch.allclose(GatedNorm(8, gate=None).double()(x, z), normed(x))
    with pytest.raises(ConfigurationError, match="got 'relu'"):
        GatedNorm(8, gate="relu")


def test_split_heads_names_what_would_fit() -> None:
    assert split_heads(12, 4) == 3
    with pytest.raises(ConfigurationError, match="d_model=12 is not divisible by heads=5; heads may be one of 1, 2, 3"):
        split_heads(12, 5)
    with pytest.raises(ConfigurationError, match="heads=0"):
        split_heads(12, 0)


def test_log_uniform_is_about_its_geometric_mean() -> None:
    assert log_uniform(20_000, 0.01, 1.0).log().mean() == pytest.approx(math.log(0.1), abs=0.03)
