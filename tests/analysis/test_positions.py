from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ostinato.analysis.positions import accuracy_by_position
from ostinato.errors import DataError
from ostinato.tasks.arithmetic import Parity


class Echo(nn.Module):
    """Answers with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, tokens, state=None, *, reset=None):
        return nn.functional.one_hot(tokens, 3).float() * self.weight, None


def test_against_counting_by_hand() -> None:
    batches = [Parity().generate(np.random.default_rng(seed), 5, 7) for seed in range(3)]
    found = accuracy_by_position(Echo().train(), batches)
    right = torch.cat([batch.inputs == batch.targets for batch in batches])[:, 1:].double()
    assert found.positions == list(range(1, 8)) and found.sequences == 15
    assert found.each == pytest.approx(right.mean(0).tolist())
    assert found.so_far == pytest.approx([float(right[:, : t + 1].all(1).double().mean()) for t in range(7)])
    assert found.so_far[0] == 1  # the parity of one bit is the bit


def test_the_mode_is_put_back() -> None:
    model = Echo().train()
    accuracy_by_position(model, [Parity().generate(np.random.default_rng(0), 2, 4)])
    assert model.training


def test_masks_must_agree() -> None:
    with pytest.raises(DataError, match="same positions"):
        accuracy_by_position(Echo(), [Parity(min_length=1, max_length=9).train_batch(0, 16, 0)])
    with pytest.raises(DataError, match="at least one"):
        accuracy_by_position(Echo(), [])
