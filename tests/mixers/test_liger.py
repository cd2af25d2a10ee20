"""Liger attention: the formulas of its three recurrences, its pooling, the parameters of softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.mixers.attention import Attention
from ostinato.mixers.liger import Liger, pooling

HEADS, GROUPS, WIDTH = 4, 2, 4


def liger(**options: Any) -> Liger:
    torch.manual_seed(0)
    mixer = Liger(16, heads=HEADS, key_value_heads=HEADS // GROUPS, **options).double()
    for parameter in mixer.parameters():
        parameter.data.mul_(3)  # far from uniform softmaxes
    return mixer


def by_hand(mixer: Liger, x: Tensor, recurrence: str) -> Tensor:
    """The recurrence's half before W_o, in a loop over steps and heads, from the card's equations."""
    batch, time, _ = x.shape
    out = x.new_zeros(batch, time, HEADS, WIDTH)
    queries, keys, values = (layer(x) for layer in (mixer.to_query, mixer.to_key, mixer.to_value))
    for b in range(batch):
        for h in range(HEADS):
            own, shared = slice(h * WIDTH, (h + 1) * WIDTH), slice(h // GROUPS * WIDTH, (h // GROUPS + 1) * WIDTH)
            memory, slot_keys = x.new_zeros(WIDTH, WIDTH), x.new_zeros(2, WIDTH)
            slot_values = x.new_zeros(2, WIDTH)
            for t in range(time):
                q, k, v = queries[b, t, own], keys[b, t, shared], values[b, t, shared]
                if recurrence == "gla":
                    memory = torch.sigmoid(k).pow(1 / 16)[:, None] * memory + torch.outer(k.softmax(0), v)
                    out[b, t, h] = memory.T @ q.softmax(0)
                elif recurrence == "hgrn2":
                    memory = torch.sigmoid(k)[:, None] * memory + torch.outer(1 - torch.sigmoid(k), v)
                    out[b, t, h] = memory.T @ q.softmax(0)
                else:
                    alpha = torch.sigmoid(k.view(2, 2).mean(1)).pow(1 / 16)
                    slot_keys = alpha[:, None] * slot_keys + torch.outer(1 - alpha, k)
                    slot_values = alpha[:, None] * slot_values + torch.outer(1 - alpha, v)
                    out[b, t, h] = slot_values.T @ (slot_keys @ q).softmax(0)
    return out


@pytest.mark.parametrize("recurrence", ["gla", "hgrn2", "gsa"])
@pytest.mark.parametrize("mix", [0.5, 1.0, 0.25])
def test_the_formula(recurrence: str, mix: float) -> None:
    mixer, x = liger(recurrence=recurrence, mix=mix, window=3, slots=2), torch.randn(2, 7, 16, dtype=torch.float64)
    softmax = Attention(16, heads=HEADS, key_value_heads=HEADS // GROUPS, window=3).double()
    softmax.load_state_dict(mixer.state_dict())
    expected = (1 - mix) * softmax(x)[0] + mix * mixer.to_output(by_hand(mixer, x, recurrence).flatten(-2))
    torch.testing.assert_close(mixer(x)[0], expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 4), (8, 8), (8, 3), (7, 5), (4, 6), (5, 1)])
def test_pooling_is_adaptive_average_pooling(inputs: int, outputs: int) -> None:
    x = torch.randn(3, inputs)
    torch.testing.assert_close(x @ pooling(inputs, outputs), F.adaptive_avg_pool1d(x, outputs))


@pytest.mark.parametrize("recurrence", ["gla", "hgrn2", "gsa"])
def test_conversion_adds_no_parameter(recurrence: str) -> None:
    softmax = Attention(16, heads=4, key_value_heads=2, base=5e3, qk_norm=True).double()
    made = Liger.from_softmax(softmax, recurrence=recurrence, window=5)
    before, after = dict(softmax.named_parameters()), dict(made.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert made.base == 5e3 and made.window == 5
    assert made.initial_state(1).memory.dtype == torch.float64


def test_the_controls() -> None:
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert not torch.allclose(liger(mix=1.0, gate="none")(x)[0], liger(mix=1.0)(x)[0])
    fresh = Liger.from_softmax(Attention(16).double(), gate="fresh")
    assert {name for name, _ in fresh.named_parameters() if "gate" in name} == {"to_gate.weight"}
    assert fresh(x)[0].dtype == torch.float64
    ungated = liger(mix=1.0, gate="none")
    queries, keys, values = ungated.project(x)
    keys, values = keys.softmax(-1).repeat_interleave(2, 2), values.repeat_interleave(2, 2)
    weights = torch.einsum("bthk,bshk->bhts", queries.softmax(-1), keys).tril()
    read = torch.einsum("bhts,bshv->bthv", weights, values)
    torch.testing.assert_close(ungated(x)[0], ungated.to_output(read.flatten(-2)))


@pytest.mark.parametrize("gate", ["pooled", "none"])
def test_learned_features(gate: str) -> None:
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    mixer = liger(mix=1.0, gate=gate, features="learned")
    before = mixer(x)[0]
    for weights in (mixer.query_features, mixer.key_features):
        assert weights is not None and weights.shape == (HEADS, WIDTH, WIDTH)
        weights.data += torch.randn_like(weights)
    assert not torch.allclose(mixer(x)[0], before)
    queries, keys, values = mixer.project(x)
    out = x.new_zeros(9, HEADS, WIDTH)
    for h in range(HEADS):
        q, k, v = queries[0, :, h], keys[0, :, h // GROUPS], values[0, :, h // GROUPS]
        u, w = q @ mixer.query_features[h], k @ mixer.key_features[h]
        alpha = torch.sigmoid(k).pow(1 / 16) if gate == "pooled" else torch.ones_like(k)
        memory = x.new_zeros(2 * WIDTH, WIDTH)
        for t in range(9):
            written = torch.outer(torch.cat([w[t], -w[t]]).softmax(0), v[t])
            memory = torch.cat([alpha[t], alpha[t]])[:, None] * memory + written
            out[t, h] = memory.T @ torch.cat([u[t], -u[t]]).softmax(0)
    torch.testing.assert_close(mixer(x)[0], mixer.to_output(out.flatten(1))[None])


def test_learned_features_start_as_the_identity() -> None:
    made = Liger.from_softmax(Attention(16, key_value_heads=2).double(), features="learned")
    assert {name for name, _ in made.named_parameters() if "features" in name} == {"query_features", "key_features"}
    assert made.key_features is not None and made.key_features.dtype == torch.float64
    assert torch.equal(made.key_features, torch.eye(4).double().expand(4, 4, 4))
    assert made.initial_state(1).memory.shape == (1, 4, 8, 4)
    assert Liger(16).key_features is None


def test_the_recurrence_is_kept_in_float32_under_half_precision() -> None:
    mixer = Liger(16, window=4).bfloat16()
    y, state = mixer(torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrence": "lstm"}, "one of gla, hgrn2, gsa, got 'lstm'"),
        ({"gate": "open"}, "one of pooled, fresh, none, got 'open'"),
        ({"gate": "none", "recurrence": "gsa"}, "gsa writes 1 − α"),
        ({"features": "exp"}, "one of softmax, learned, got 'exp'"),
        ({"features": "learned", "recurrence": "hgrn2"}, "hgrn2 has no feature map"),
        ({"mix": 0.0}, r"attention\(window\)"),
        ({"slots": 0}, "slots at least 1"),
        ({"gate_normalizer": 0.0}, "must be positive"),
        ({"window": None}, "None is softmax attention"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Liger(16, **options)
