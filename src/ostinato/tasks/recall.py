"""Recall: a value must be found again by its key (multi-query associative recall, induction)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, as_batch, require


@dataclass
class MultiQueryRecall(GeneratedTask):
    """Multi-query associative recall, MQAR (Arora et al. 2023, arXiv 2312.04927; the generator of Zoology).

    `pairs` key–value pairs stand at the front. Keys are drawn from 1 … vocabulary/2 − 1, values from the second
    half, each without repetition. Afterwards every key is asked once, at an even offset 2g from the end of the
    pairs, the gaps g = 0, 1, … distinct and drawn with probability ∝ (g + 1)^(power − 1). Only queries are scored;
    the answer is not shown. All other positions hold random tokens (or 0, without `random_filling`).
    """

    name: ClassVar[str] = "mqar"

    vocabulary: int = 256
    length: int = 128
    pairs: int = 16
    power: float = 0.01
    """The smaller, the sooner keys are asked."""
    random_filling: bool = True
    tested_lengths: tuple[int, ...] = ()
    """Other lengths to test at, besides `length`."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Several (length, pairs) instead of one: each training batch is of one of them, drawn at random, and each is
    tested. `length` and `pairs` then say nothing."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        self.sizes = tuple((length, pairs) for length, pairs in self.sizes)
        if self.sizes:
            require(not self.tested_lengths, "sizes are tested themselves: leave out tested_lengths")
            require(len(dict(self.sizes)) == len(self.sizes), f"the lengths of sizes must differ, got {self.sizes}")
            for length, pairs in self.sizes:
                MultiQueryRecall(vocabulary=self.vocabulary, length=length, pairs=pairs)
            return
        require(self.vocabulary >= 4 and self.vocabulary % 2 == 0, "vocabulary must be even and at least 4")
        require(
            1 <= self.pairs < self.vocabulary // 2,
            f"{self.pairs} distinct keys do not fit in a vocabulary of {self.vocabulary}",
        )
        shortest = min((self.length, *self.tested_lengths))
        require(
            (shortest - 2 * self.pairs) // 2 >= self.pairs,
            f"{self.pairs} pairs and their queries need a length of {4 * self.pairs}, got {shortest}",
        )

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """One value out of half the vocabulary."""
        return 2 / self.vocabulary

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`length`, and `tested_lengths`; or those of `sizes`."""
        return tuple(dict(self.sizes)) or (self.length, *self.tested_lengths)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        if self.sizes:
            length = length or self.sizes[rng.integers(len(self.sizes))][0]
        length = length or self.length
        pairs = dict(self.sizes).get(length, self.pairs)
        half = self.vocabulary // 2
        keys = 1 + _choose(rng, rows, np.zeros(half - 1), pairs)
        values = half + _choose(rng, rows, np.zeros(half), pairs)
        gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
        asked = 2 * pairs + 2 * _choose(rng, rows, (self.power - 1) * np.log(gaps), pairs)

        inputs = rng.integers(0, self.vocabulary, (rows, length))
        if not self.random_filling:
            inputs[:] = 0
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(inputs, asked, keys, axis=1)
        targets = np.zeros_like(inputs)
        np.put_along_axis(targets, asked, values, axis=1)
        mask = np.zeros(inputs.shape, dtype=bool)
        np.put_along_axis(mask, asked, True, axis=1)
        return as_batch(inputs, targets, mask)

    def baselines(self) -> Metrics:
        """The most frequent answer; and, measured, the value that stood last before the queries."""
        right, count = 0, 0
        for batch in self.test_batches():
            end = 2 * dict(self.sizes).get(batch.inputs.shape[1], self.pairs)
            last = batch.inputs[:, end - 1 : end]
            right += int(((batch.targets == last) & batch.mask).sum())
            count += int(batch.mask.sum())
        return {**super().baselines(), "last value": right / count}


@dataclass
class Induction(GeneratedTask):
    """The token that followed the special one must be said when the special one returns (Olsson et al. 2022).

    Tokens 1 … vocabulary − 1 are uniform; 0 stands once at a random place, and once at the end, where the token
    after its first occurrence is asked. The length counts both.
    """

    name: ClassVar[str] = "induction"

    vocabulary: int = 16
    length: int = 64
    tested_lengths: tuple[int, ...] = (64, 256, 1024)

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.vocabulary >= 3, f"vocabulary must be at least 3, got {self.vocabulary}")
        shortest = min((self.length, *self.tested_lengths))
        require(shortest >= 3, f"a length must be at least 3, got {shortest}")

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """1 / (vocabulary − 1)."""
        return 1 / (self.vocabulary - 1)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        length = length or self.length
        inputs = rng.integers(1, self.vocabulary, (rows, length))
        place = rng.integers(0, length - 2, rows)
        row = np.arange(rows)
        inputs[row, place] = 0
        inputs[:, -1] = 0
        targets = np.zeros_like(inputs)
        targets[:, -1] = inputs[row, place + 1]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -1] = True
        return as_batch(inputs, targets, mask)


def _choose(rng: np.random.Generator, rows: int, log_weights: np.ndarray, size: int) -> np.ndarray:
    """In every row, `size` distinct indices, drawn one after another with the given weights.

    By the Gumbel-top-k trick: adding Gumbel noise to the log-weights and sorting is the same draw, for all rows
    at once (Vieira 2014; Kool et al. 2019, arXiv 1903.06059).
    """
    noisy = log_weights + rng.gumbel(size=(rows, len(log_weights)))
    return np.argsort(-noisy, axis=1)[:, :size]
