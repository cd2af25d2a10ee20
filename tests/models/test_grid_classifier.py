"""The grid classifier: one answer from the whole grid."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError, StateError
from ostinato.layers.md_tpe import MDTPE
from ostinato.models.grid_classifier import GridClassifier
from ostinato.models.plan import Layer, Plan


def test_one_answer_for_the_whole_grid() -> None:
    plan = Plan((Layer("whole_lightnet", {"heads": 2, "grid": (3, 4), "position": None}),))
    model = GridClassifier(2, 5, 16, plan, 2)
    x = torch.randn(3, 12, 2)
    logits, state = model(x)
    assert logits.shape == (3, 12, 5) and state is None and torch.equal(logits[:, 0], logits[:, -1])
    order = torch.randperm(12)
    assert torch.allclose(model(x[:, order])[0], logits, atol=1e-5)
    placed = GridClassifier(2, 5, 16, plan, positions=MDTPE(16, axes=(3, 4)))
    assert not torch.allclose(placed(x[:, order])[0], placed(x)[0], atol=1e-5)
    assert len(placed.mixers) == 1


def test_what_it_does_not_take() -> None:
    model = GridClassifier(2, 5, 16, "whole_lightnet")
    with pytest.raises(StateError, match="neither a state nor resets"):
        model(torch.randn(1, 4, 2), reset=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="must be positive"):
        GridClassifier(0, 5, 16, "whole_lightnet")
