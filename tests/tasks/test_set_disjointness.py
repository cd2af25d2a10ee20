from __future__ import annotations

import pytest
from torch.nn import functional

from ostinato.errors import ConfigurationError
from ostinato.tasks.set_disjointness import SetDisjointness


@pytest.mark.parametrize("readings", [1, 2])
def test_sets_against_intersection(readings: int) -> None:
    task = SetDisjointness(vocabulary=40, sizes=((2, 8), (8, 2), (3, 3)), tested_sizes=((2, 8),), readings=readings)
    seen = set()
    for step in range(20):
        batch = task.train_batch(step, 16, seed=0)
        for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
            assert tokens[0] == 1 and tokens[-1] == 3 and mask == [False] * (len(tokens) - 1) + [True]
            parts = " ".join(map(str, tokens[1:-1])).split(" 2 ")
            assert len(parts) == 2 * readings and parts == parts[:2] * readings
            first, second = ([int(token) for token in part.split()] for part in parts[:2])
            assert len(set(first)) == len(first) and len(set(second)) == len(second)
            assert set(first) & set(second) == {targets[-1]} and min(first + second) >= 4
            seen.add((len(first), len(second)))
    assert seen == {(2, 8), (8, 2), (3, 3)}


def test_both_orders_are_scored() -> None:
    task = SetDisjointness(test_size=8)
    found = {}
    for batch in task.test_batches():
        found[batch.split] = task.score(functional.one_hot(batch.targets, 128).float(), batch)
    assert list(found) == ["first 2, second 32", "first 32, second 2", "first 4, second 48", "first 48, second 4"]
    for split, score in found.items():
        shorter = split in ("first 2, second 32", "first 4, second 48")
        assert ("accuracy, shorter first" in score) == shorter and ("accuracy, longer first" in score) != shorter


def test_baselines() -> None:
    found = SetDisjointness(test_size=32).baselines()
    assert found["search"] == 1
    assert found["any element of the shorter set"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert SetDisjointness(test_size=8, readings=2).baselines()["search"] == 1


@pytest.mark.parametrize("options", [{"sizes": ()}, {"tested_sizes": ((2, 63),)}, {"readings": 0}, {"sizes": ((1,),)}])
def test_bad_sets(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        SetDisjointness(**options)
