from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from ostinato.mixers.base import Mixer
from ostinato.training.parameters import parameter_groups


class Picky(Mixer):
    no_weight_decay = frozenset({"transition"})
    learning_rate_cap: ClassVar[dict[str, float]] = {"transition": 1e-3, "inner.weight": 5e-4}

    def __init__(self) -> None:
        super().__init__(4)
        self.transition = nn.Parameter(torch.zeros(2, 2))
        self.inner = nn.Linear(4, 4)
        self.plain = nn.Linear(4, 4, bias=False)


def _found(model: nn.Module, rate: float) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, rate, 0.1)
    for group in groups:
        assert len(group["names"]) == len(group["params"])
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_what_takes_no_decay(small: Callable[..., Any]) -> None:
    found = _found(small(), 0.01)
    assert found["head.weight"] == (0.01, 0.1)
    assert found["head.bias"] == found["embedding.weight"] == (0.01, 0.0)
    assert set(found) == {name for name, _ in small().named_parameters()}


@pytest.mark.parametrize("rate", [0.01, 1e-4])
def test_what_mixers_declare(rate: float) -> None:
    found = _found(nn.ModuleDict({"block": nn.Sequential(nn.LayerNorm(4), Picky())}), rate)
    assert found == {
        "block.0.weight": (rate, 0.0),
        "block.0.bias": (rate, 0.0),
        "block.1.transition": (min(rate, 1e-3), 0.0),
        "block.1.inner.weight": (min(rate, 5e-4), 0.1),
        "block.1.inner.bias": (rate, 0.0),
        "block.1.plain.weight": (rate, 0.1),
    }


def test_frozen_parameters_are_left_out() -> None:
    mixer = Picky()
    mixer.plain.weight.requires_grad_(False)
    assert "plain.weight" not in _found(mixer, 0.1)
