"""State collapse: statistics against the states themselves, collapses that are planted, laws, retention, retrieval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.analysis.state_collapse import (
    capacity,
    collapses,
    explodes_at,
    forget_threshold,
    language_batch,
    loss_by_position,
    recall_threshold,
    retention_profile,
    retrieval_error,
    state_size,
    state_statistics,
    watched_scans,
)
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.mixers.forgetting import ForgetMore, mended
from ostinato.mixers.registry import mixers
from ostinato.models.token_classifier import TokenClassifier
from ostinato.tasks.registry import task

TABLE = {"36M": (6, 512, 0.8), "47M": (12, 512, 1.6), "85M": (12, 768, 2.4), "130M": (24, 768, 4.8),
         "370M": (48, 1024, 12.9), "780M": (48, 1536, 19.3)}  # fmt: skip


def small(plan: str = "mamba2(heads=2, state_dim=4), gla", seed: int = 0) -> TokenClassifier:
    torch.manual_seed(seed)
    return TokenClassifier(40, 8, plan)


def tokens(time: int, rows: int = 3) -> Tensor:
    return torch.randint(0, 40, (rows, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TABLE)
def test_state_sizes_of_the_released_models(name: str) -> None:
    layers, width, millions = TABLE[name]
    with torch.device("meta"):
        layer = ostinato.mixer("mamba2", width, heads=2 * width // 64, state_dim=128)
    # The paper's table cuts digits off: 780M has 19.35 million.
    assert int(10 * layers * state_size(layer) / 1e6) / 10 == millions


def test_state_size_of_a_model() -> None:
    model = small()
    # Mamba-2: 16 × 4 and 3 × (16 + 8); GLA: 4 heads of 1 × 2.
    assert state_size(model) == 16 * 4 + 3 * (16 + 8) + 4 * 2


def test_laws() -> None:
    assert forget_threshold(4.8e6) == pytest.approx(20356.6, abs=0.1)
    assert recall_threshold(12.9e6) == pytest.approx(1e3 * (4.756 * (1.365**12.9 - 1) - 0.742))


def test_statistics_are_those_of_the_states() -> None:
    model, x = small(), tokens(50)
    found = {(one.layer, one.leaf): one for one in state_statistics(model, x, every=20)}
    assert set(found) == {(0, "memory"), (0, "window"), (1, "memory")}
    with torch.no_grad():
        _, state = model(x[:, :40])
    memory = state[0].memory.double()
    one = found[0, "memory"]
    assert one.positions == [20, 40, 50] and one.rms.shape == (3, 2, 4 * 8)
    torch.testing.assert_close(one.mean[1], memory.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.variance[1], memory.flatten(2).var((0, 2), correction=0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one.rms[1], memory.flatten(2).square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", mixers())
def test_statistics_of_any_mixer(name: str) -> None:
    torch.manual_seed(0)
    layer = ostinato.mixer(name, 16)
    found = state_statistics(layer, torch.randn(2, 12, 16), every=4)
    assert bool(found) == (name != "attention")
    assert all(bool(one.variance.isfinite().all()) and one.positions == [4, 8, 12] for one in found)


def test_a_planted_collapse_is_found() -> None:
    # Nothing decays in the second head of a retention whose decay is taken away: its memory grows as a random walk.
    torch.manual_seed(0)
    layer = ostinato.mixer("mamba2", 16, heads=2, state_dim=4)
    with torch.no_grad():
        layer.log_rate.copy_(torch.tensor([3.0, -30.0]))  # type: ignore[operator]
        layer.step_bias.fill_(1.0)  # type: ignore[operator]
    x = torch.randn(8, 400, 16, generator=torch.Generator().manual_seed(2)) + 0.5
    statistics = state_statistics(layer, x, every=20)
    found = collapses(statistics, trained_length=40)
    assert [(one.layer, one.leaf, one.unit) for one in found] == [(0, "memory", 1)]
    assert found[0].growth > 4 and 60 <= found[0].position <= 120
    assert found[0].channels and 0.2 < found[0].share <= 1
    assert collapses(statistics, trained_length=200, factor=3) == []
    with pytest.raises(ConfigurationError, match="both sides"):
        collapses(statistics, trained_length=400)


def test_loss_by_position_is_the_loss_of_the_positions() -> None:
    model, stream = small(), task("recall_stream", tested_lengths=(60,), test_size=6)
    batch = next(iter(stream.test_batches()))
    found = loss_by_position(model, batch, [0, 10, 30, 60], chunk=7)
    with torch.no_grad():
        logits, _ = model(batch.inputs)
    for part, (low, high) in zip(found, [(0, 10), (10, 30), (30, 60)], strict=True):
        piece = batch.steps(low, high)
        assert part["count"] == float(piece.mask.sum())
        assert part["loss"] == pytest.approx(stream.loss(logits[:, low:high], piece).item(), rel=1e-5)
    whole = loss_by_position(model, language_batch(tokens(20)), [0, 19])
    assert whole[0]["count"] == 3 * 19
    with pytest.raises(ConfigurationError, match="rising"):
        loss_by_position(model, batch, [3, 3])


def test_criteria() -> None:
    assert explodes_at([1.0, 0.5, 0.9, 2.5], [10, 20, 30, 40], 20) == 40
    assert explodes_at([1.0, 0.5, 0.9, 1.9], [10, 20, 30, 40], 20) is None
    assert explodes_at([1.0, 0.5, float("nan")], [10, 20, 30], 20) == 30
    assert capacity([64, 128, 256, 512], [1.0, 0.96, 0.5, 0.99]) == 128
    assert capacity([64], [0.5]) == 0


def test_retention_is_the_product_of_the_decays() -> None:
    model = small("mamba2(heads=2, state_dim=4), gla, linear_attention")
    with watched_scans(model) as calls, torch.no_grad():
        model(tokens(15))
    found = retention_profile(model, tokens(15))
    assert [one.shape for one in found] == [(15, 2), (15, 4), (15, 4)]
    decays: Any = calls[0].log_decay
    torch.testing.assert_close(found[0][9], decays[:, 1:10].double().sum(1).exp().mean(0))
    assert bool((found[2] == 1).all()) and bool((found[0][0] == 1).all())
    # What was watched is let go.
    assert not any("scan" in vars(layer) for layer in model.modules())
    with pytest.raises(ConfigurationError, match="no mixer"):
        retention_profile(small("lstm"), tokens(5))


def test_retention_of_a_mixer_made_to_forget() -> None:
    """The decays as they act, behind the damping; and it is let go again."""
    model = small("mamba2(heads=2, state_dim=4)")
    longer = mended(model, ForgetMore, retain=0.5)
    before, expected = longer(tokens(15))[0], retention_profile(model, tokens(15))[0]
    halves = 0.5 ** torch.arange(15, dtype=torch.float64).unsqueeze(1)
    for _ in range(2):
        torch.testing.assert_close(retention_profile(longer, tokens(15))[0], expected * halves)
    assert torch.equal(longer(tokens(15))[0], before)


def test_retention_where_values_decay_too() -> None:
    model = small("gla(heads=2, gate_values=True), gla(heads=2, gate_values=True, decay=off), delta_net")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with watched_scans(model) as calls, torch.no_grad():
        model(tokens(15))
    assert calls[0].log_value_decay is not None and calls[2].log_value_decay is None  # the delta rule's β is no decay
    found = retention_profile(model, tokens(15))
    for call, profile in zip(calls[:2], found, strict=False):
        by_key: Any = call.log_decay
        by_key = by_key if by_key.ndim == 4 else by_key.unsqueeze(-1)
        by_value: Any = call.log_value_decay
        # What is left of the first token's write in every entry of the memory.
        gates = (by_key.unsqueeze(-1) + by_value.unsqueeze(-2)).double()
        assert profile.shape == (15, 2) and bool((profile[0] == 1).all())
        torch.testing.assert_close(profile[9], gates[:, 1:10].sum(1).exp().mean((0, -1, -2)))
        assert float(profile[-1].max()) < 1


def test_retrieval_error_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 9, 1, 3, generator=random, dtype=torch.float64).unbind(0)
    decay = -torch.rand(2, 9, 1, generator=random, dtype=torch.float64)
    signal, noise = retrieval_error(keys, values, decay, 4)
    assert signal.shape == noise.shape == (5, 1)
    t, own, other = 7, [], []
    for row in range(2):
        read = torch.zeros(3, dtype=torch.float64)
        for i in range(t + 1):
            if i != 4:
                weight = decay[row, i + 1 : t + 1].sum().exp() * (keys[row, 4, 0] @ keys[row, i, 0])
                read += weight * values[row, i, 0]
        other.append(read.square().sum())
        alone = decay[row, 5 : t + 1].sum().exp() * keys[row, 4, 0].square().sum() * values[row, 4, 0]
        own.append(alone.square().sum())
    torch.testing.assert_close(signal[3, 0], torch.stack(own).mean().sqrt())
    torch.testing.assert_close(noise[3, 0], torch.stack(other).mean().sqrt())
    with pytest.raises(ShapeError):
        retrieval_error(keys, values, decay, 9)
    with pytest.raises(ConfigurationError):
        state_statistics(small(), tokens(5), every=0)
