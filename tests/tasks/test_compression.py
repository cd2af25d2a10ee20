"""MAD's compression: uniform symbols and the end, all asked at their own places."""

from __future__ import annotations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.compression import Compression


def test_what_is_shown_is_what_is_asked() -> None:
    task = Compression(symbols=5, length=12)
    assert task.vocab_size == 6 and task.test_lengths == (12,)
    for batch in (task.train_batch(0, 64, seed=1), *task.test_batches()):
        assert batch.inputs.shape[1] == 12 and (batch.inputs[:, -1] == 5).all()
        assert batch.mask.all() and (batch.targets == batch.inputs).all()
        assert set(batch.inputs[:, :-1].unique().tolist()) == {0, 1, 2, 3, 4}


def test_chance_is_measured() -> None:
    task = Compression(test_size=512)
    guess = np.random.default_rng(0).integers(0, 15, (512, 32))
    guess[:, -1] = 15
    right = np.mean([guess == np.concatenate([batch.inputs.numpy() for batch in task.test_batches()])])
    assert right == pytest.approx(task.chance, abs=0.01)


@pytest.mark.parametrize("options", [{"symbols": 1}, {"length": 1}])
def test_what_cannot_be_is_said(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Compression(**options)
