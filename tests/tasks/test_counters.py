from __future__ import annotations

import re

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.counters import CounterLanguage


@pytest.mark.parametrize("letters", [2, 3, 4])
def test_words_against_the_definition(letters: int) -> None:
    task = CounterLanguage(letters=letters, max_count=7)
    batch = task.train_batch(0, 100, seed=0)
    counts = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        word = "".join("·abcd"[token] for token in tokens)
        n = word.count("a")
        counts.add(n)
        assert re.fullmatch("·" + "".join(f"{'abcd'[i]}{{{n}}}" for i in range(letters)) + "·*", word)
        # Known is what follows from the first b on: the next letter, and 0 at the end.
        scored = [place for place, here in enumerate(mask) if here]
        assert scored == list(range(n + 1, letters * n + 1))
        assert all(targets[place] == [*tokens, 0][place + 1] for place in scored)
    assert counts == set(range(1, 8))


def test_tests_are_long() -> None:
    task = CounterLanguage(tested_counts=(16, 40), test_size=64)
    for batch, most in zip(task.test_batches(), (16, 40), strict=True):
        counts = (batch.inputs == 1).sum(1)
        assert batch.split == f"length {2 * most}" and counts.max() <= most and counts.min() > most // 2


def test_baselines() -> None:
    assert CounterLanguage(test_size=16).baselines() == {"most frequent answer": 0.0, "the same again": 0.0}


@pytest.mark.parametrize("options", [{"letters": 1}, {"max_count": 0}, {"tested_counts": (0,)}])
def test_bad_counters(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        CounterLanguage(**options)
