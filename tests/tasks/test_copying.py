from __future__ import annotations

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.copying import Copying, SelectiveCopying


def test_copying_layout() -> None:
    batch = Copying(symbols=3, alphabet=4, delay=5).train_batch(0, 32, seed=0)
    assert batch.inputs.shape == (32, 11)
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        assert all(2 <= token < 6 for token in tokens[:3])
        assert tokens[3:] == [0, 0, 0, 0, 1, 0, 0, 0]
        assert targets[8:] == tokens[:3]
        assert mask == [False] * 8 + [True] * 3


def test_selective_copying_keeps_the_order() -> None:
    batch = SelectiveCopying(symbols=3, alphabet=4, places=7).train_batch(0, 64, seed=0)
    assert batch.inputs.shape == (64, 10)
    places = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        shown = [token for token in tokens[:7] if token]
        assert len(shown) == 3 and all(2 <= token < 6 for token in shown)
        assert tokens[7:] == [1, 1, 1] and targets[7:] == shown
        assert mask == [False] * 7 + [True] * 3
        places |= {index for index in range(7) if tokens[index]}
    assert places == set(range(7))


def test_selective_copying_at_other_lengths() -> None:
    task = SelectiveCopying(places=16, tested_places=(32,), test_size=4)
    assert [batch.inputs.shape[1] for batch in task.test_batches()] == [24, 40]
    for batch in task.test_batches():
        assert ((batch.inputs >= 2).sum(1) == 8).all()


@pytest.mark.parametrize("options", [{"symbols": 0}, {"alphabet": 1}, {"delay": 0}])
def test_bad_copying(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        Copying(**options)


def test_too_few_places() -> None:
    with pytest.raises(ConfigurationError, match="8 symbols do not fit in 4 places"):
        SelectiveCopying(tested_places=(4,))
