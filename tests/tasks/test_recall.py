from __future__ import annotations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.recall import Induction, MultiQueryRecall, _choose


@pytest.mark.parametrize("filling", [True, False])
def test_recall_against_a_dictionary(filling: bool) -> None:
    task = MultiQueryRecall(vocabulary=32, length=40, pairs=5, random_filling=filling)
    batch = task.train_batch(0, 64, seed=0)
    assert batch.inputs.shape == (64, 40)
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        keys, values = tokens[0:10:2], tokens[1:10:2]
        assert len(set(keys)) == 5 and all(1 <= key < 16 for key in keys)
        assert len(set(values)) == 5 and all(16 <= value < 32 for value in values)
        memory = dict(zip(keys, values, strict=True))
        asked = [position for position in range(40) if mask[position]]
        assert sorted(tokens[position] for position in asked) == sorted(keys)
        for position in asked:
            assert position >= 10 and position % 2 == 0
            assert targets[position] == memory[tokens[position]]
        if not filling:
            assert all(tokens[p] == 0 for p in range(10, 40) if p not in asked)


def test_recall_of_several_sizes() -> None:
    task = MultiQueryRecall(vocabulary=32, sizes=((16, 4), (24, 5)), test_size=8)
    trained = [task.train_batch(step, 4, seed=0) for step in range(12)]
    assert {(batch.inputs.shape[1], int(batch.mask.sum(1)[0])) for batch in trained} == {(16, 4), (24, 5)}
    tested = [(batch.split, int(batch.mask.sum(1)[0])) for batch in task.test_batches()]
    assert tested == [("length 16", 4), ("length 24", 5)]
    one = MultiQueryRecall(vocabulary=32, length=24, pairs=5, test_size=8)
    assert (next(iter(one.test_batches())).inputs == list(task.test_batches())[1].inputs).all()
    assert task.baselines()["last value"] == pytest.approx((4 / 4 + 5 / 5) / (4 + 5))


@pytest.mark.parametrize("sizes", [((16, 4), (16, 3)), ((16, 5),)])
def test_bad_sizes(sizes: tuple) -> None:
    with pytest.raises(ConfigurationError):
        MultiQueryRecall(vocabulary=32, sizes=sizes)


def test_early_gaps_are_likelier() -> None:
    early = MultiQueryRecall(vocabulary=32, length=64, pairs=2, power=0.01).train_batch(0, 512, 0)
    even = MultiQueryRecall(vocabulary=32, length=64, pairs=2, power=1.0).train_batch(0, 512, 0)
    positions = np.arange(64)
    means = [float((batch.mask.numpy() * positions).sum() / batch.mask.sum()) for batch in (early, even)]
    # Uniform gaps 0 … 29 lie at 4 + 2·14.5 on the average; 1/g gaps far earlier.
    assert abs(means[1] - 33) < 1.5 and means[0] < 25


def test_choose_draws_without_replacement_with_the_weights() -> None:
    log_weights = np.log(np.array([0.7, 0.2, 0.1]))
    drawn = _choose(np.random.default_rng(0), 20000, log_weights, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    first = np.bincount(drawn[:, 0], minlength=3) / 20000
    assert np.abs(first - [0.7, 0.2, 0.1]).max() < 0.015
    # Given that 0 came first, the second is 1 or 2 as 2 : 1.
    second = drawn[drawn[:, 0] == 0, 1]
    assert abs((second == 1).mean() - 2 / 3) < 0.02


def test_recall_baselines() -> None:
    found = MultiQueryRecall(test_size=64).baselines()
    # Each row asks each of its 16 values once, so the last value is right once in 16.
    assert found["last value"] == pytest.approx(1 / 16)
    assert 1 / 128 <= found["most frequent answer"] < 0.05


def test_induction_against_search() -> None:
    batch = Induction(vocabulary=6, length=9).train_batch(0, 128, seed=0)
    places = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        assert tokens.count(0) == 2 and tokens[-1] == 0
        places.add(tokens.index(0))
        assert mask == [False] * 8 + [True]
        assert targets[-1] == tokens[tokens.index(0) + 1] != 0
    assert places == set(range(7))


@pytest.mark.parametrize("options", [{"pairs": 40}, {"vocabulary": 5}, {"vocabulary": 16, "pairs": 8}])
def test_bad_recall(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        MultiQueryRecall(**options)


def test_bad_induction() -> None:
    with pytest.raises(ConfigurationError, match="at least 3"):
        Induction(length=2)
