"""MAD's recall tasks: an oracle that reads what the task shows is always right, and nothing else is asked."""

from __future__ import annotations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.mad import ContextRecall, FuzzyRecall, Memorization


@pytest.mark.parametrize("noise", [0, 5])
def test_context_recall_by_a_reader(noise: int) -> None:
    task = ContextRecall(keys=4, values=3, length=24, noise=noise, noise_share=0.4, tested_lengths=(48,))
    assert task.vocab_size == 7 + noise and task.test_lengths == (24, 48)
    hidden = 0
    for batch in (task.train_batch(0, 32, seed=1), *task.test_batches()):
        for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
            known: dict[int, int] = {}
            for place in range(0, len(tokens), 2):
                key, value = tokens[place : place + 2]
                assert not mask[place + 1]
                if key >= 7:
                    hidden += 1
                    assert value >= 7 and not mask[place]
                    continue
                assert key < 4 <= value < 7 and mask[place] == (key in known)
                assert known.setdefault(key, value) == value
                assert not mask[place] or targets[place] == value
    assert (hidden > 0) == (noise > 0)


def _pairs(tokens: list[int], symbols: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Keys and values, and where the value starts; the last pair may be cut off."""
    found, place = [], 0
    while place < len(tokens):
        start = place
        while place < len(tokens) and tokens[place] < symbols:
            place += 1
        middle = place
        while place < len(tokens) and tokens[place] >= symbols:
            place += 1
        found.append((tuple(tokens[start:middle]), tuple(tokens[middle:place]), middle))
    return found


@pytest.mark.parametrize("motif", [1, 2, 3])
def test_fuzzy_recall_by_a_reader(motif: int) -> None:
    task = FuzzyRecall(symbols=4, motif=motif, length=40, tested_lengths=(64,))
    sizes = set()
    for batch in (task.train_batch(0, 32, seed=1), *task.test_batches()):
        for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
            known: dict[tuple[int, ...], tuple[int, ...]] = {}
            wanted = [False] * len(tokens)
            pairs = _pairs(tokens, 4)
            for index, (key, value, middle) in enumerate(pairs):
                last = index == len(pairs) - 1
                assert (1 <= len(key) <= motif and len(set(key)) == len(key)) or last
                sizes.add(len(key))
                if key in known:
                    assert value == known[key] or last
                    for place in range(middle, middle + len(value)):
                        wanted[place - 1] = True
                        assert targets[place - 1] == tokens[place]
                elif not last:
                    known[key] = value
            # What is asked at the last place, or within a pair that is cut off, is not in the sequence.
            end = pairs[-2][2] + len(pairs[-2][1]) - 1
            assert mask[:end] == wanted[:end]
    assert sizes >= set(range(1, motif + 1))
    test = next(iter(task.test_batches())).inputs.tolist()
    assert all(len(key) == motif for tokens in test for key, _, _ in _pairs(tokens, 4)[:-1])


def test_facts_are_the_same_in_all_sequences() -> None:
    task = Memorization(facts=9, length=12)
    known: dict[int, int] = {}
    for batch in (*(task.train_batch(step, 8, seed=step) for step in range(5)), *task.test_batches()):
        inputs, targets, mask = (part.numpy() for part in batch[:3])
        assert not inputs[:, 1::2].any() and mask[:, 1::2].all() and not mask[:, 0::2].any()
        for key, value in zip(inputs[:, 0::2].flat, targets[:, 1::2].flat, strict=True):
            assert known.setdefault(int(key), int(value)) == value
    assert sorted(known) == list(range(1, 10)) and sorted(known.values()) == list(range(10, 19))
    other = Memorization(facts=9, length=12, map_seed=1).train_batch(0, 64, seed=0)
    assert any(known[k] != v for k, v in zip(other.inputs[:, 0].tolist(), other.targets[:, 1].tolist(), strict=True))


def test_a_constant_is_no_better_than_chance() -> None:
    for task in (ContextRecall(), FuzzyRecall(), Memorization()):
        assert np.isclose(task.baselines()["most frequent answer"], task.chance, atol=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ContextRecall(length=5), "even"),
        (lambda: ContextRecall(noise=3, noise_share=1.0), "noise_share"),
        (lambda: FuzzyRecall(motif=8), "motif"),
        (lambda: FuzzyRecall(length=8), "two pairs"),
        (lambda: Memorization(facts=1), "facts"),
    ],
)
def test_what_cannot_be_is_said(build: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()  # type: ignore[operator]
