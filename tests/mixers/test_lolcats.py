"""LoLCATs attention: its formula, and what it is in the limits."""

from __future__ import annotations

import math

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.layers.rotary import rotate
from ostinato.mixers.attention import Attention
from ostinato.mixers.lolcats import LoLCATs

HEADS, SHARED, WIDTH = 4, 2, 4


def lolcats(window: int, **options: bool) -> LoLCATs:
    torch.manual_seed(0)
    mixer = LoLCATs(HEADS * WIDTH, HEADS, SHARED, window, **options).double()
    for parameter in mixer.parameters():
        parameter.data.mul_(2).add_(0.2 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_the_formula(window: int, rope: bool) -> None:
    mixer, x = lolcats(window, rope=rope), torch.randn(1, 9, HEADS * WIDTH, dtype=torch.float64)
    queries, keys, values = mixer.project(x)
    if rope:
        queries, keys = (rotate(y, torch.arange(9)[None]) for y in (queries, keys))
    out = torch.zeros(9, HEADS, WIDTH, dtype=torch.float64)
    for h in range(HEADS):
        shared = h // (HEADS // SHARED)
        q, k, v = queries[0, :, h], keys[0, :, shared], values[0, :, shared]
        u, w = q @ mixer.query_features[h], k @ mixer.key_features[h]
        u, w = torch.cat([u, -u], -1).softmax(-1), torch.cat([w, -w], -1).softmax(-1)
        for t in range(9):
            first = max(0, t - window + 1)
            scores = k[first : t + 1] @ q[t] / math.sqrt(WIDTH)
            near = torch.sigmoid(mixer.window_factor[h]) * torch.exp(scores - scores.max())
            weights = torch.cat([w[:first] @ u[t], near])
            out[t, h] = weights @ v[: t + 1] / weights.sum()
    torch.testing.assert_close(mixer(x)[0], mixer.to_output(out.flatten(1))[None])


@torch.no_grad()
def test_a_window_that_sees_everything_is_attention() -> None:
    mixer, x = lolcats(9), torch.randn(2, 9, HEADS * WIDTH, dtype=torch.float64)
    softmax = Attention(HEADS * WIDTH, HEADS, SHARED).double()
    softmax.load_state_dict({name: mixer.state_dict()[name] for name in softmax.state_dict()})
    torch.testing.assert_close(mixer(x)[0], softmax(x)[0])
    assert set(mixer.state_dict()) - set(softmax.state_dict()) == {"query_features", "key_features", "window_factor"}


@torch.no_grad()
def test_a_state_of_constant_size_that_half_precision_keeps_in_float32() -> None:
    mixer = lolcats(3).bfloat16()
    _, state = mixer(torch.randn(1, 50, HEADS * WIDTH, dtype=torch.bfloat16))
    assert state.memory.dtype == torch.float32 and state.window.keys.dtype == torch.bfloat16
    assert state.memory.shape == (1, HEADS, 2 * WIDTH, WIDTH) and state.window.keys.shape[1] == 2
    # All but the window's 2 steps were remembered, each with features that sum to one before they are rounded.
    rounding = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(state.normalizer.sum(-1), torch.full((1, HEADS), 48.0), rtol=rounding, atol=0)


@torch.no_grad()
def test_under_autocast_only_products_of_features_are_rounded() -> None:
    mixer, x = lolcats(3).float(), torch.randn(1, 50, HEADS * WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = mixer(x)
    wanted, exact = mixer(x)
    assert state.memory.dtype == state.normalizer.dtype == torch.float32
    # Projections round to 8 bits too: the features lose no more than they do.
    mixer.bfloat16()
    rounded = mixer(x.bfloat16())[0].float()
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm() and (rounded - wanted).norm() < 0.02 * wanted.norm()
    torch.testing.assert_close(state.memory, exact.memory, rtol=0.02, atol=0.02)


def test_no_window_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="a number of steps"):
        LoLCATs(16, window=None)  # type: ignore[arg-type]
