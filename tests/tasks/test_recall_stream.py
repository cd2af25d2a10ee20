"""The stream of writes and queries: its answers, its distribution, its oracle."""

from __future__ import annotations

from typing import Any

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.registry import task


def test_every_query_has_the_present_value_of_its_key() -> None:
    stream = task("recall_stream", tested_lengths=(200,), test_size=8)
    for batch in stream.test_batches():
        for row, tokens in enumerate(batch.inputs.tolist()):
            held: dict[int, int] = {}
            writes: list[int] = []
            for p in range(0, 200, 2):
                if batch.mask[row, p]:
                    assert tokens[p + 1] == held[tokens[p]] == int(batch.targets[row, p])
                    assert tokens[p] in writes[-12:]
                else:
                    assert writes[-24:].count(tokens[p]) <= 1
                    if len(writes) >= 24:
                        assert tokens[p] == writes[-24]
                    writes.append(tokens[p])
                held[tokens[p]] = tokens[p + 1]
        assert not batch.mask[:, 0].any() and not batch.mask[:, 1::2].any()
        assert 0.4 < batch.mask[:, ::2].double().mean() < 0.6


def test_training_asks_for_old_keys_as_often_as_for_new_ones() -> None:
    batch = task("recall_stream").train_batch(0, 400, 0)
    ages: list[float] = []
    for row, tokens in enumerate(batch.inputs.tolist()):
        writes: list[int] = []
        for p in range(0, 64, 2):
            if not batch.mask[row, p]:
                writes.append(tokens[p])
            elif len(writes) >= 8 and len(set(writes)) == len(writes):
                ages.append((writes[::-1].index(tokens[p]) + 0.5) / len(writes))
    assert len(ages) > 1000
    assert sum(ages) / len(ages) == pytest.approx(0.5, abs=0.02)


def test_baselines() -> None:
    found = task("recall_stream", tested_lengths=(64,), test_size=64).baselines()
    assert found["lookup"] == 1
    assert found["most frequent answer"] < 0.12
    assert found["last value"] < 0.35


@pytest.mark.parametrize("options", [{"keys": 1}, {"length": 7}, {"recent": 25}, {"tested_recent": 0}])
def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        task("recall_stream", **options)
