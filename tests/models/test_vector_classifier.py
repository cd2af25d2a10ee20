from __future__ import annotations

import pytest
import torch
from torch import nn

from ostinato.errors import ConfigurationError, ShapeError, StateError
from ostinato.models.vector_classifier import VectorClassifier


def build(**options: object) -> VectorClassifier:
    torch.manual_seed(0)
    return VectorClassifier(5, 7, 16, "gla, attention(qk_norm=True)", **options).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("swiglu", [None, 2])
def test_a_sequence_in_parts_is_the_sequence(swiglu: int | None) -> None:
    model = build(swiglu=swiglu)
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    whole, _ = model(x)
    first, state = model(x[:, :4])
    second, _ = model(x[:, 4:], state)
    assert whole.shape == (2, 11, 7)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-12)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 0] = True
    anew, _ = model(x[:, 4:], state, reset=reset)
    assert torch.allclose(anew, model(x[:, 4:], model.initial_state(2))[0], atol=1e-12)


def test_the_norm_stands_after_the_sum() -> None:
    model = build()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    y = model.encoder(x)
    for block in model.blocks:
        y = nn.functional.layer_norm(y + block.mixer(y)[0], (16,))
    assert torch.allclose(model(x)[0], model.head(y), atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_norm_stands_before_the_mixer_and_the_head(norm: str) -> None:
    model = build(norm=norm, norm_place="pre")
    x = torch.randn(4, 6, 5, dtype=torch.float64)

    def normed(y: torch.Tensor) -> torch.Tensor:
        if norm == "layer":
            return nn.functional.layer_norm(y, (16,))
        return (y - y.mean((0, 1))) / (y.var((0, 1), unbiased=False) + 1e-5).sqrt()

    y = model.encoder(x)
    for block in model.blocks:
        y = y + block.mixer(normed(y))[0]
    assert torch.allclose(model(x)[0], model.head(normed(y)), atol=1e-12)


@pytest.mark.parametrize("swiglu", [None, 2])
def test_batch_norm_in_evaluation_takes_a_sequence_in_parts(swiglu: int | None) -> None:
    model = build(norm="batch", norm_place="pre", swiglu=swiglu)
    for _ in range(3):
        model(3 + 2 * torch.randn(8, 9, 5, dtype=torch.float64))
    model.eval()
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    whole, _ = model(x)
    first, state = model(x[:, :4])
    second, _ = model(x[:, 4:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-12)


def test_dropout_is_for_training() -> None:
    model = build(dropout=0.5)
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_bad_arguments() -> None:
    model = build()
    with pytest.raises(ShapeError, match="width 5"):
        model(torch.randn(1, 3, 4, dtype=torch.float64))
    with pytest.raises(StateError, match="2 mixers"):
        model(torch.randn(1, 3, 5, dtype=torch.float64), (None,))
    with pytest.raises(ConfigurationError, match="norm is one of layer, batch"):
        VectorClassifier(5, 2, 16, "gla", norm="group")
    with pytest.raises(ConfigurationError, match="norm_place one of post, pre"):
        VectorClassifier(5, 2, 16, "gla", norm_place="middle")
    with pytest.raises(ConfigurationError, match="num_classes"):
        VectorClassifier(5, 0, 16, "gla")
    with pytest.raises(ConfigurationError, match="dropout"):
        VectorClassifier(5, 2, 16, "gla", dropout=1.0)
