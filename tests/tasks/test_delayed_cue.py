from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.tasks.delayed_cue import DelayedCue


def test_the_cue_is_where_it_should_be() -> None:
    batch = DelayedCue(length=40, window=10, noise=0.0).train_batch(0, 64, seed=0)
    assert batch.inputs.shape == (64, 40, 8) and batch.inputs.dtype == torch.float32
    row, step, channel = batch.inputs.nonzero(as_tuple=True)
    assert row.tolist() == list(range(64)) and int(step.max()) < 10 and len(set(step.tolist())) > 5
    assert (batch.inputs[row, step, channel] == 1).all()
    assert torch.equal(batch.targets[:, -1], channel)
    assert batch.mask.sum(1).eq(1).all() and batch.mask[:, -1].all()


def test_noise_has_its_size_everywhere() -> None:
    batch = DelayedCue(length=200, window=1, noise=0.3).train_batch(0, 32, seed=0)
    assert abs(float(batch.inputs[:, 1:].std()) - 0.3) < 0.01


def test_lengths() -> None:
    task = DelayedCue(length=20, window=5, tested_lengths=(20, 30), test_size=3)
    assert [batch.inputs.shape[1] for batch in task.test_batches()] == [20, 30]
    with pytest.raises(ConfigurationError, match="window must lie in 1 … 20"):
        DelayedCue(length=20, window=21)
    with pytest.raises(ConfigurationError, match="classes"):
        DelayedCue(classes=1)


def test_a_threshold_knows_the_cue_and_a_sum_does_not() -> None:
    """In noise of σ, the sum of W steps is right about as often as 1 + √W σ z₀ exceeds seven others √W σ z."""
    found = DelayedCue(length=256, window=64, test_size=512).baselines()
    z = 0.8 * torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))
    wanted = float((z[:, 0] + 1 > z[:, 1:].amax(1)).float().mean())
    assert found["largest value"] > 0.99 and abs(found["largest sum over the window"] - wanted) < 0.07
    assert found["most frequent answer"] < 0.25
