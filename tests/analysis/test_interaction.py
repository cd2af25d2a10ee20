"""Interaction operators reproduce their layers, ranks obey the theorems, heads equal their systems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ostinato.analysis.heads import (
    PositionalMultiHead,
    fit_heads,
    head_count_bound,
    heads_from_ssm,
    lag_operators,
    linear_system,
    operator_of_lags,
    random_system,
)
from ostinato.analysis.interaction import (
    can_freeze,
    effective_rank,
    gradient_highway,
    interaction_operator,
    interaction_rank,
)
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.mixers.registry import mixer

BARE = [
    ("s4d", {"output": "none", "d_state": 4}),
    ("s5", {"d_state": 8}),
    ("lru", {}),
    ("mamba", {"d_state": 4}),
    ("linear_attention", {}),
    ("attention", {}),
    ("gla", {}),
    ("retnet", {}),
    ("delta_net", {}),
    ("gated_delta_net", {}),
]


def sequence(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "options"), BARE, ids=[name for name, _ in BARE])
def test_the_operator_is_the_layer(name: str, options: dict) -> None:
    torch.manual_seed(0)
    layer, x = mixer(name, 8, **options).double(), sequence(7, 8)
    if not can_freeze(layer):
        with pytest.raises(ConfigurationError, match="not known"):
            interaction_operator(layer, x, frozen=True)
        return
    w = interaction_operator(layer, x)
    if name == "mamba":  # its convolution's bias is no map of the input
        with torch.no_grad():
            layer.convolution.bias.zero_()
        w = interaction_operator(layer, x)
    y = layer(x.unsqueeze(0))[0][0]
    assert w.shape == (7, 7, 8, 8)
    assert torch.allclose(torch.einsum("ijpd,jd->ip", w, x), y, atol=1e-10)
    assert w.permute(2, 3, 0, 1).triu(1).abs().max() < 1e-12


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["attention", "linear_attention"])
def test_heads_bound_the_rank(name: str, heads: int) -> None:
    torch.manual_seed(heads)
    w = interaction_operator(mixer(name, 8, heads=heads).double(), sequence(16, 8))
    assert interaction_rank(w) == heads
    assert 1 <= effective_rank(w) <= heads + 1e-9


def test_frozen_and_full_differ_where_there_are_scores() -> None:
    torch.manual_seed(0)
    layer, x = mixer("attention", 8).double(), sequence(6, 8)
    frozen, full = interaction_operator(layer, x), interaction_operator(layer, x, frozen=False)
    assert (frozen - full).abs().max() > 1e-3
    whole = torch.autograd.functional.jacobian(lambda u: layer(u.unsqueeze(0))[0][0], x)
    assert torch.allclose(full, whole.permute(0, 2, 1, 3))


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((8, 4, 4, 32), 8), ((8, 2, 2, 32), 4), ((8, 4, 4, 3), 3), ((16, 4, 4, 64), 16), ((6, 1, 1, 64), 1)],
)
def test_the_rank_of_random_systems(shape: tuple[int, int, int, int], rank: int) -> None:
    states, d, p, n = shape
    a, b, c = random_system(states, d, p, seed=1)
    assert interaction_rank(lag_operators(a, b, c, None, n)) == rank
    assert interaction_rank(lag_operators(0.9 * torch.eye(states, dtype=a.dtype), b, c, None, n)) == 1
    assert torch.linalg.eigvals(a).abs().max() <= 0.97


def test_rank_of_nothing_and_bad_shapes() -> None:
    assert interaction_rank(torch.zeros(3, 3, 2, 2)) == 0
    with pytest.raises(ShapeError, match="operators"):
        interaction_rank(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="one sequence"):
        interaction_operator(nn.Identity(), torch.zeros(2, 3, 4))


def test_lag_operators_are_the_recurrence() -> None:
    a, b, c = random_system(6, 3, 2, seed=0)
    d, x = torch.randn(2, 3, dtype=torch.float64), sequence(9, 3)
    lags = lag_operators(a, b, c, d, 9)
    layer = linear_system(a, b, c, d)
    assert torch.allclose(operator_of_lags(lags), interaction_operator(layer, x), atol=1e-12)
    with pytest.raises(ShapeError, match="do not fit"):
        lag_operators(a, b[:-1], c, None, 4)


def test_as_many_heads_as_the_rank_equal_the_system() -> None:
    a, b, c = random_system(5, 3, 3, seed=2)
    d, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    scores, values = heads_from_ssm(a, b, c, d, 12)
    assert scores.shape == (12, 6) and values.shape == (6, 3, 3)  # the skip adds one
    y = linear_system(a, b, c, d)(x)
    assert torch.allclose(PositionalMultiHead(scores, values)(x), y, atol=1e-10)
    fewer = PositionalMultiHead(*heads_from_ssm(a, b, c, d, 12, heads=3))
    target = operator_of_lags(lag_operators(a, b, c, d, 12))
    error = (fewer.operator() - target).square().sum() / target.square().sum()
    bound = head_count_bound(a, b, c, 12, d)
    assert error.item() == pytest.approx(bound[3].item(), rel=1e-9)
    assert bound[0] == pytest.approx(1.0) and (bound.diff() <= 0).all() and bound[6] < 1e-20
    with pytest.raises(ConfigurationError, match="heads"):
        heads_from_ssm(a, b, c, d, 12, heads=0)
    with pytest.raises(ShapeError, match="reach"):
        fewer(torch.zeros(1, 13, 3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="do not fit"):
        PositionalMultiHead(scores, values[:-1])


@pytest.mark.parametrize("free", [False, True])
def test_no_training_beats_the_bound(free: bool) -> None:
    a, b, c = random_system(3, 2, 2, seed=0)
    lags, bound = lag_operators(a, b, c, None, 8), head_count_bound(a, b, c, 8)
    for heads in (1, 2):
        model, error = fit_heads(lags, heads, free=free, seed=heads)
        assert bound[heads] * 0.999999 <= error <= 1.1 * bound[heads]
        assert model.scores.ndim == 2 + free
    assert fit_heads(lags, 3, free=free)[1] < 1e-15


def test_training_is_a_minimum_on_its_sequences() -> None:
    """No gradient is left of the squared error on the very sequences that were fitted."""
    lags = lag_operators(*random_system(3, 2, 2, seed=0), None, 6)
    model, _ = fit_heads(lags, 2, sequences=64, sweeps=200, seed=5)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64).view(64, 6, 2)
    wanted = torch.einsum("ijpd,bjd->bip", operator_of_lags(lags), x)
    (model(x) - wanted).square().mean().backward()
    assert model.scores.grad is not None and model.values.grad is not None
    assert max(model.scores.grad.abs().max(), model.values.grad.abs().max()) < 1e-6


def test_gradients_over_distance() -> None:
    a, b, c = random_system(6, 3, 3, seed=0, radius=0.9)
    x = sequence(80, 3)
    reach = gradient_highway(linear_system(a, b, c), x, range(80))
    assert torch.allclose(reach, lag_operators(a, b, c, None, 80).flatten(1).norm(dim=1))
    assert math.log(reach[79] / reach[60]) / 19 == pytest.approx(math.log(0.9), rel=1e-3)
    layer = mixer("attention", 4, heads=1).double()
    x = sequence(6, 4)
    w = interaction_operator(layer, x)
    assert torch.allclose(gradient_highway(layer, x, [0, 5], frozen=True), w[5, [5, 0]].flatten(1).norm(dim=1))
    assert torch.allclose(
        gradient_highway(layer, x, [2], at=3), interaction_operator(layer, x, frozen=False)[3, 1].norm()
    )
    with pytest.raises(ShapeError, match="distances"):
        gradient_highway(layer, x, [6])
