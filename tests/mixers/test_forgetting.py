"""Remedies for an overfull memory: each against its formula, the law, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer
from ostinato.mixers.forgetting import ForgetMore, StateDifferenceWindow, StateNorm, mended
from ostinato.models.plan import parse_plan
from ostinato.models.token_classifier import TokenClassifier
from ostinato.ops.linear_attention import linear_attention
from ostinato.testing import check_mixer

D_MODEL, BATCH, TIME = 16, 2, 29


def built(name: str, **options: Any) -> Mixer:
    torch.manual_seed(0)
    found = ostinato.mixer(name, D_MODEL, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return found


def sequence(time: int = TIME) -> Tensor:
    return torch.randn(BATCH, time, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def watched(layer: Mixer) -> tuple[list[Any], Mixer]:
    """What the layer's engine is called with."""
    calls: list[Any] = []
    scan = layer.scan  # type: ignore[attr-defined]

    def watching(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return scan(*arguments, **options)

    layer.scan = watching  # type: ignore[assignment]
    return calls, layer


LAWFUL: list[tuple[str, Callable[[Mixer], Mixer]]] = [
    ("mamba2", lambda mixer: StateDifferenceWindow(mixer, 5)),
    ("gla", lambda mixer: StateDifferenceWindow(mixer, 3)),
    ("linear_attention", lambda mixer: StateDifferenceWindow(mixer, 7)),
    ("mamba2", lambda mixer: ForgetMore(mixer, 0.9, 0.6, 0.5)),
    ("gated_delta_product", lambda mixer: ForgetMore(mixer, 0.9, 0.6)),
    ("gla(gate_values=True)", lambda mixer: ForgetMore(mixer, 0.9, 0.6, 0.5)),
    ("delta_net", lambda mixer: StateNorm(mixer, 0.3)),
    ("mamba2", lambda mixer: StateNorm(mixer, 0.3)),
    ("gla(gate_values=True)", lambda mixer: StateNorm(mixer, 0.3)),
]


@pytest.mark.parametrize(("name", "remedy"), LAWFUL, ids=[f"{name}-{i}" for i, (name, _) in enumerate(LAWFUL)])
def test_remedies_obey_the_law(name: str, remedy: Callable[[Mixer], Mixer]) -> None:
    torch.manual_seed(0)
    mixer = parse_plan(name).layers[0].build(16)
    assert check_mixer(remedy(mixer), length=12, compile=False).ok


@pytest.mark.parametrize("name", ["mamba2", "gla", "hgrn2", "linear_attention", "retnet"])
@pytest.mark.parametrize("window", [1, 6, 40])
def test_the_window_is_a_restart_on_the_last_steps(name: str, window: int) -> None:
    # Given what the layer writes, its output at t is that of the recurrence started anew at t − window + 1.
    layer = built(name)
    calls, watching = watched(built(name))
    watching(sequence())
    queries, keys, values, log_decay, _ = calls[0]
    outputs: list[Tensor] = []

    def collecting(*arguments: Any, **options: Any) -> Any:
        found = scan(*arguments, **options)
        outputs.append(found[0])
        return found

    mended_layer = StateDifferenceWindow(layer, window)
    scan = mended_layer.inner.scan  # type: ignore[attr-defined]
    mended_layer.inner.scan = collecting  # type: ignore[assignment]
    mended_layer(sequence())
    for t in range(TIME):
        part = slice(max(0, t - window + 1), t + 1)
        gate = None if log_decay is None else log_decay[:, part]
        wanted, _ = linear_attention(queries[:, part], keys[:, part], values[:, part], gate)
        torch.testing.assert_close(outputs[0][:, t], wanted[:, -1], rtol=0, atol=1e-9)


def test_the_window_keeps_its_digits_over_a_long_sequence() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 1, 5000, 2, 8).unbind(0)
    values, gates = torch.randn(1, 5000, 2, 8), -0.01 * torch.rand(1, 5000, 2)
    layer = StateDifferenceWindow(ostinato.mixer("mamba2", 16, heads=2, state_dim=8, expand=1), 64)
    scan = layer.inner.scan  # type: ignore[attr-defined]
    found, _ = scan(queries, keys, values, gates, layer.initial_state(1).memory, reset=None)
    part = slice(5000 - 64, 5000)
    exact, _ = linear_attention(*(x[:, part].double() for x in (queries, keys, values, gates)))
    assert ((found[:, -1] - exact[:, -1]).abs().max() / exact[:, -1].abs().max()).item() < 1e-4


def test_forget_more_by_hand() -> None:
    calls, layer = watched(built("mamba2"))
    mended_layer = ForgetMore(layer, retain=0.9, insert=0.5, step=0.25)
    # The wrapper's engine calls the watched one with what it changed.
    found, _ = mended_layer(sequence())
    plain_calls, plain = watched(built("mamba2"))
    plain(sequence())
    queries, keys, values, log_decay, _ = plain_calls[0]
    torch.testing.assert_close(calls[0][2], 0.125 * values)
    torch.testing.assert_close(calls[0][3].exp(), 0.9 * log_decay.exp() ** 0.25)
    assert torch.equal(calls[0][0], queries) and torch.equal(calls[0][1], keys)
    assert not torch.allclose(found, plain(sequence())[0])


@pytest.mark.parametrize("decay", ["channel", "off"])
def test_forget_more_where_values_decay_too(decay: str) -> None:
    calls, layer = watched(built("gla", gate_values=True, decay=decay))
    ForgetMore(layer, retain=0.9, insert=0.5, step=0.25)(sequence())
    plain_calls, plain = watched(built("gla", gate_values=True, decay=decay))
    plain(sequence())

    def gate(call: Any) -> Tensor:
        by_value, log_decay = call[3].exp(), call[4].exp()
        return (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).unsqueeze(-1) * by_value.unsqueeze(-2)

    # The gate as a whole, α βᵀ: retained once, and both its factors to the power of the step.
    torch.testing.assert_close(gate(calls[0]), 0.9 * gate(plain_calls[0]) ** 0.25)
    torch.testing.assert_close(calls[0][2], 0.125 * plain_calls[0][2])


def test_remedies_that_do_nothing() -> None:
    for x, plain in [(sequence(), built("mamba2")), (sequence(), built("gla", gate_values=True))]:
        wanted, _ = plain(x)
        remedies: list[Mixer] = [ForgetMore(plain, 1.0, 1.0), StateNorm(plain, 1e9)]
        if plain.scan is linear_attention:  # type: ignore[attr-defined]
            remedies.append(StateDifferenceWindow(plain, TIME))
        for remedy in remedies:
            torch.testing.assert_close(remedy(x)[0], wanted, rtol=0, atol=1e-12)


def test_state_norm_bounds_every_head() -> None:
    layer = StateNorm(built("gla"), 0.05)
    _, state = layer(sequence())
    norms = torch.linalg.vector_norm(state.memory.detach(), dim=(-2, -1))
    assert float(norms.max()) <= 0.05 + 1e-12
    _, free = built("gla")(sequence())
    assert torch.linalg.vector_norm(free.memory, dim=(-2, -1)).max().item() > 0.1
    # A bound that is met in the first step only changes what that step wrote.
    _, one = StateNorm(built("gla"), 0.05)(sequence()[:, :1])
    _, other = built("gla")(sequence()[:, :1])
    scale = (0.05 / torch.linalg.vector_norm(other.memory, dim=(-2, -1))).clamp(max=1)
    torch.testing.assert_close(one.memory, other.memory * scale[..., None, None])


def test_a_model_is_mended_and_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = TokenClassifier(7, D_MODEL, "mamba2, gla, attention")
    tokens = torch.randint(0, 7, (2, 20))
    before, _ = model(tokens)
    longer = mended(model, StateDifferenceWindow, window=3)
    assert [type(mixer).__name__ for mixer in longer.backbone.mixers] == [
        "StateDifferenceWindow",
        "StateDifferenceWindow",
        "Attention",
    ]
    assert {id(p) for p in longer.parameters()} == {id(p) for p in model.parameters()}
    assert not torch.allclose(longer(tokens)[0], before)
    assert torch.equal(model(tokens)[0], before)


def test_errors() -> None:
    for act, text in [
        (lambda: ForgetMore(built("lstm")), "no matrix memory"),
        (lambda: ForgetMore(built("mamba2"), retain=1.1), "retain"),
        (lambda: ForgetMore(built("mamba2"), insert=0), "insert"),
        (lambda: StateNorm(built("mamba2"), 0), "max_norm"),
        (lambda: StateDifferenceWindow(built("delta_net"), 4), "not on linear_attention"),
        (lambda: StateDifferenceWindow(built("gla", gate_values=True), 4), "not on linear_attention"),
        (lambda: StateDifferenceWindow(built("mamba2"), 0), "window"),
        (lambda: mended(TokenClassifier(7, 16, "lstm"), StateNorm, max_norm=1.0), "no mixer"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            act()
