"""Counter languages: a^n b^n, a^n b^n c^n, and so on; what comes next, once the first block is over?

A counter that grows without bound must be kept: what is trained on short blocks is tested on long ones.

Sources: Gers and Schmidhuber 2001 (IEEE Trans. Neural Networks 12(6)); Weiss et al. 2018 (arXiv 1805.04908).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, as_batch, require


@dataclass
class CounterLanguage(GeneratedTask):
    """Blocks of n of each letter, then the end: from the second letter's first on, the next symbol is known.

    Tokens: 0 begins, ends and pads, 1 … `letters` are a, b, …. Scored are the positions from the first b to the last
    letter, whose next token is determined by what came before. In a training sequence n is uniform in 1 … `max_count`;
    a test of a count has n uniform in its upper half, and its split is named by the length of its longest word.
    """

    name: ClassVar[str] = "counter_language"
    metric: ClassVar[str] = "sequence_accuracy"

    letters: int = 2
    """2 is a^n b^n, 3 is a^n b^n c^n."""
    max_count: int = 16
    tested_counts: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        self.tested_counts = tuple(self.tested_counts)
        require(2 <= self.letters <= 26, f"letters is between 2 and 26, got {self.letters}")
        require(self.max_count >= 1, f"max_count must be positive, got {self.max_count}")
        require(min(self.tested_counts, default=1) >= 1, f"tested_counts are positive, got {self.tested_counts}")

    @property
    def vocab_size(self) -> int:
        """letters + 1."""
        return self.letters + 1

    @property
    def chance(self) -> float:
        """1 / (letters + 1)."""
        return 1 / (self.letters + 1)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """letters · n for each n of `tested_counts`."""
        return tuple(self.letters * count for count in self.tested_counts)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + letters · the largest n)."""
        most = self.max_count if length is None else length // self.letters
        count = rng.integers(1 if length is None else 1 + most // 2, most + 1, rows)
        longest = self.letters * most
        # Position t ≥ 1 of a word holds the letter ⌈t / n⌉.
        letter = 1 + (np.arange(longest + 1)) // count[:, None]
        following = np.where(letter <= self.letters, letter, 0)
        inputs = np.concatenate([np.zeros((rows, 1), dtype=np.int64), following[:, :-1]], axis=1)
        return as_batch(inputs, following, inputs >= 2)

    def baselines(self) -> Metrics:
        """The constant answer; and "the same again", which says the letter just read: wrong at each block's end."""
        total = count = 0.0
        for batch in self.test_batches():
            said = functional.one_hot(batch.inputs, self.num_classes).to(torch.float32)
            more, cases = self.score(said, batch)[self.metric]
            total, count = total + more, count + cases
        return {**super().baselines(), "the same again": total / count}
