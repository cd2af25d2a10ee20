"""LightNet: the additive recurrence, its whole-sequence form, positions on grids."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, NonFiniteError, ShapeError
from ostinato.layers.md_lrpe import MDLRPE, grid_places, rotate_on_grid
from ostinato.layers.md_tpe import MDTPE
from ostinato.mixers.lightnet import LightNet, WholeLightNet
from ostinato.ops.additive_attention import (
    AdditiveState,
    additive_attention,
    additive_attention_step,
    empty_state,
    running_log_weights,
)
from ostinato.ops.sequences import sequence_softmax, whole_attention
from ostinato.testing import check_mixer
from ostinato.testing.whole import check_whole_mixer


def _problem(time: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, time, 2, size, dtype=torch.float64).to(dtype) for size in (3, 3, 4))
    return q, 3 * k, v


@pytest.mark.parametrize("time", [1, 2, 65])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scan_is_the_loop_and_the_mean(time: int, dtype: torch.dtype) -> None:
    q, k, v = _problem(time, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    y, last = additive_attention(q, k, v)
    weight = k.double().exp()
    total = weight.cumsum(1)
    memory = (weight.unsqueeze(-1) * v.double().unsqueeze(-2)).cumsum(1) / total.unsqueeze(-1)
    mean = torch.einsum("bthk,bthkv->bthv", q.double(), memory)
    assert torch.allclose(y.double(), mean, atol=tolerance, rtol=tolerance)
    assert torch.allclose(last.memory.double(), memory[:, -1], atol=tolerance, rtol=tolerance)
    state = empty_state(q, v)
    for t in range(time):
        out, state = additive_attention_step(q[:, t], k[:, t], v[:, t], state)
        assert torch.allclose(out, y[:, t], atol=tolerance, rtol=tolerance)
    assert torch.allclose(state.log_weight, last.log_weight, atol=tolerance)


def test_the_last_memory_is_that_of_the_whole_sequence() -> None:
    q, k, v = _problem(12)
    _, last = additive_attention(q, k, v)
    whole = torch.einsum("bthk,bthv->bhkv", sequence_softmax(k), v)
    assert torch.allclose(last.memory, whole, atol=1e-12)
    y = whole_attention(q, sequence_softmax(k), v)
    assert torch.allclose(y, whole_attention(q, sequence_softmax(k + 5.0), v), atol=1e-12)
    order = torch.randperm(12)
    turned = whole_attention(q[:, order], sequence_softmax(k[:, order]), v[:, order])
    assert torch.allclose(turned, y[:, order], atol=1e-12)


def test_large_logits_stay_finite_and_resets_begin_anew() -> None:
    q, k, v = _problem(20)
    y, last = additive_attention(q, 300 * k, v, validate=True)
    assert torch.isfinite(y).all() and torch.isfinite(last.log_weight).all()
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 7], reset[1, 0] = True, True
    before = additive_attention(*_problem(3))[1]
    packed, end = additive_attention(q, k, v, before, reset=reset)
    alone, final = additive_attention(q[:1, 7:], k[:1, 7:], v[:1, 7:])
    assert torch.allclose(packed[:1, 7:], alone, atol=1e-12)
    assert torch.allclose(end.log_weight[:1], final.log_weight, atol=1e-12)
    assert torch.allclose(packed[1:], additive_attention(q[1:], k[1:], v[1:])[0], atol=1e-12)
    going_on = additive_attention(q[:1, :7], k[:1, :7], v[:1, :7], AdditiveState(*(part[:1] for part in before)))[0]
    assert torch.allclose(packed[:1, :7], going_on, atol=1e-12)


def test_an_initial_logit_gives_the_empty_memory_a_weight() -> None:
    q, k, v = _problem(6)
    start = AdditiveState(empty_state(q, v).memory, torch.zeros(2, 2, 3, dtype=torch.float64))
    y, _ = additive_attention(q, k, v, start)
    weight = k.exp()
    memory = (weight.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1) / (1 + weight.cumsum(1)).unsqueeze(-1)
    assert torch.allclose(y, torch.einsum("bthk,bthkv->bthv", q, memory), atol=1e-12)


def test_derivatives_are_right_from_nothing_too() -> None:
    k = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[False, False, True, False, False]])
    nothing = torch.full((1, 2), -torch.inf, dtype=torch.float64)
    for mark in (None, reset):

        def both(logits: Tensor, mark: Any = mark) -> tuple[Tensor, Tensor]:
            return running_log_weights(logits, nothing, mark)

        assert torch.autograd.gradcheck(both, k)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v = _problem(3)
    with pytest.raises(ShapeError, match="logits"):
        additive_attention(q, k[..., :2], v)
    with pytest.raises(ShapeError, match="values have shape"):
        additive_attention(q, k, v[:, :2])
    with pytest.raises(NonFiniteError):
        additive_attention(q, k / 0, v, validate=True)


@pytest.mark.parametrize(
    "options",
    [
        {"position": None, "scale": True},
        {"position": "rotary", "norm": "heads"},
        {"part": "low", "initial_logit": 0.0},
        {"decay": "head"},
        {"decay": "head", "tied": True, "position": None, "part": "high"},
    ],
)
def test_every_causal_variant_obeys_the_law(options: dict[str, Any]) -> None:
    assert check_mixer(LightNet(8, heads=2, **options), length=9, compile=False).ok


@pytest.mark.parametrize(
    "options",
    [
        {"position": None},
        {"position": "rotary", "norm": "heads"},
        {"weights": "elu", "num_prefix": 1},
        {"learned": True},
    ],
)
def test_every_whole_variant_keeps_what_it_states(options: dict[str, Any]) -> None:
    assert check_whole_mixer(WholeLightNet(8, heads=2, **options), length=9, compile=False).ok


@pytest.mark.parametrize("position", ["cosine", "rotary"])
def test_a_grid_is_filled_and_not_packed(position: str) -> None:
    mixer = WholeLightNet(8, heads=1, grid=(3, 4), position=position)
    assert check_whole_mixer(mixer, length=12, resets=False).ok
    with pytest.raises(ConfigurationError, match="do not hold 11 tokens"):
        mixer(torch.randn(1, 11, 8))
    with pytest.raises(ConfigurationError, match="cannot be packed"):
        mixer(torch.randn(1, 12, 8), reset=torch.zeros(1, 12, dtype=torch.bool))


def test_without_positions_places_can_be_permuted() -> None:
    mixer, x = WholeLightNet(8, heads=2, position=None).double(), torch.randn(2, 12, 8, dtype=torch.float64)
    order = torch.randperm(12)
    assert torch.allclose(mixer(x[:, order])[0], mixer(x)[0][:, order], atol=1e-12)
    placed = WholeLightNet(8, heads=2, grid=(3, 4)).double()
    assert not torch.allclose(placed(x[:, order])[0], placed(x)[0][:, order], atol=1e-6)


@pytest.mark.parametrize("form", ["cosine", "rotary"])
def test_products_depend_on_the_difference_of_places_alone(form: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    encoding = MDLRPE(8, (5, 6))

    def at(x: Tensor, place: tuple[int, int]) -> Tensor:
        here = torch.tensor(place).view(1, 1, 2)
        return encoding(x, here) if form == "cosine" else rotate_on_grid(x, here)

    found: dict[tuple[int, int], float] = {}
    for s, t in product(product(range(5), range(6)), repeat=2):
        value = float((at(q, s) * at(k, t)).sum())
        difference = (s[0] - t[0], s[1] - t[1])
        assert found.setdefault(difference, value) == pytest.approx(value, abs=1e-10)
    # 9 × 11 differences; the cosine form sees their absolute values alone.
    assert len({round(value, 6) for value in found.values()}) == (5 * 6 if form == "cosine" else 9 * 11)


def test_mdlrpe_is_its_formula_and_leaves_the_prefix() -> None:
    encoding = MDLRPE(5, (2, 3), num_prefix=1)
    x = torch.randn(1, 7, 2, 5, dtype=torch.float64)
    y = encoding(x)
    assert y.shape == (1, 7, 2, 10)
    assert torch.equal(y[:, 0, :, :5], x[:, 0]) and not y[:, 0, :, 5:].any()
    theta = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angles = torch.cat([1 * theta, 2 * theta])[:5]  # the last token stands at (1, 2)
    assert torch.allclose(y[0, -1], torch.cat([x[0, -1] * angles.cos(), x[0, -1] * angles.sin()], -1))
    assert grid_places((2, 3), 7, x.device, 1).tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    low, high = (MDLRPE(4, part=part).frequencies(x.device) for part in ("low", "high"))
    assert torch.equal(low + high, MDLRPE(4).frequencies(x.device)) and (low[:2] == 0).all() and (high[2:] == 0).all()
    with pytest.raises(ConfigurationError, match="part one of"):
        MDLRPE(4, part="middle")
    with pytest.raises(ConfigurationError, match="positive sizes"):
        MDLRPE(4, (3, 0))


@pytest.mark.parametrize("form", ["heads", "channels"])
def test_mdtpe_is_its_sums(form: str) -> None:
    layer = MDTPE(4, heads=2, axes=(2, 3), rank=1 if form == "heads" else 3, form=form, num_prefix=1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    grid = x[:, 1:].reshape(2, 2, 3, 4)
    wanted = torch.zeros_like(grid)
    for row, column in product(range(2), range(3)):
        for back in range(row + 1):
            wanted[:, row, column] += layer.kernel(0, 2)[back] * grid[:, row - back, column]
        for back in range(column + 1):
            wanted[:, row, column] += layer.kernel(1, 3)[back] * grid[:, row, column - back]
    decay = layer.raw_decay[1].sigmoid()
    if form == "heads":
        scale = (layer.queries[1] * layer.keys[1]).sum(-1)
        assert torch.allclose(layer.kernel(1, 3)[2], (scale * decay[:, 0] ** 2).repeat_interleave(2))
        wanted = layer.to_output(layer.norm(wanted.unflatten(-1, (2, 2))).flatten(-2))
    else:
        assert torch.allclose(layer.kernel(1, 3)[2], (layer.weights[1] * decay**2).sum(-1))
    y = layer(x)
    assert torch.allclose(y[:, 1:], wanted.flatten(1, 2), atol=1e-12) and torch.equal(y[:, 0], x[:, 0])
    with pytest.raises(ConfigurationError, match="do not hold 5"):
        layer(x[:, :6])


def test_bad_options_are_said() -> None:
    with pytest.raises(ConfigurationError, match="decay is 'channel' or 'head'"):
        LightNet(8, decay="token")
    with pytest.raises(ConfigurationError, match="weights 'softmax' or 'elu'"):
        WholeLightNet(8, weights="relu")
    with pytest.raises(ConfigurationError, match="norm is"):
        LightNet(8, norm="group")
    with pytest.raises(ConfigurationError, match="exactly 1 by heads"):
        MDTPE(8, rank=2)
    with pytest.raises(ConfigurationError, match="form is one of"):
        MDTPE(8, form="rows")
