"""Attention transfer: new features come closer to softmax attention, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.models.language import LanguageModel
from ostinato.models.linearize import linearize
from ostinato.training.attention_transfer import transfer_attention


def teacher() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(d_model=32, plan="attention(heads=4, key_value_heads=2), min_gru", depth=3).eval()
    for block in model.backbone.blocks:
        for name, parameter in block.mixer.named_parameters():
            if name.startswith(("to_query", "to_key")):
                parameter.data.mul_(3)  # far from uniform attention
    return model


def test_the_features_learn_and_nothing_else_does() -> None:
    source = teacher()
    student = linearize(source, "lolcats", window=4)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    losses = transfer_attention(student, source, [tokens] * 30)
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    changed = {name for name, weight in student.state_dict().items() if not torch.equal(weight, before[name])}
    new = ("query_features", "key_features", "window_factor")
    assert changed == {f"backbone.blocks.{layer}.mixer.{name}" for layer in (0, 2) for name in new}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in source.parameters())


def test_the_loss_is_the_distance_of_the_layers_outputs() -> None:
    source = teacher()
    student = linearize(source, "lolcats", window=4)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = source.embedding(tokens)
        expected = 0.0
        for own, theirs in zip(student.backbone.blocks, source.backbone.blocks, strict=True):
            h = theirs.norm(x)
            expected += float((own.mixer(h)[0] - theirs.mixer(h)[0]).square().mean()) / 3
            x, _ = theirs(x, None, None, {})
    assert transfer_attention(student, source, [tokens])[0] == pytest.approx(expected, rel=1e-5)


def test_nothing_to_learn() -> None:
    source = teacher()
    with pytest.raises(ConfigurationError, match="nothing to learn"):
        transfer_attention(linearize(source, window=4), source, [])
