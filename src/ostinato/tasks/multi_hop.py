"""Multi-hop induction: follow a chain of "what came after this token the last time" (arXiv 2402.09268, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@dataclass
class MultiHop(GeneratedTask):
    """From position i, hop to the step after the last earlier occurrence of x_i; after `hops` hops, say that token.

        find(i) = 1 + max{j < i : x_j = x_i},   the answer at i is x at find(find(… i)).

    Tokens are uniform. Every position from which all hops exist is scored. One hop is induction; a recurrence
    does `hops` of them with a table of what followed each token, and of what the hops from there gave.
    """

    name: ClassVar[str] = "multi_hop"

    hops: int = 2
    vocabulary: int = 4
    length: int = 40
    tested_lengths: tuple[int, ...] = (40, 256)

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.hops >= 1, f"hops must be positive, got {self.hops}")
        require(self.vocabulary >= 2, f"vocabulary must be at least 2, got {self.vocabulary}")
        shortest = min((self.length, *self.tested_lengths))
        require(
            shortest > self.hops * self.vocabulary,
            f"{self.hops} hops over {self.vocabulary} tokens need a length above {self.hops * self.vocabulary}, "
            f"got {shortest}",
        )

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """1 / vocabulary."""
        return 1 / self.vocabulary

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        length = length or self.length
        inputs = rng.integers(0, self.vocabulary, (rows, length))
        row = np.arange(rows)
        # found[h] is where h hops from each position lead, −1 where they lead nowhere.
        found = np.full((self.hops + 1, rows, length), -1)
        found[0] = np.arange(length)
        last = np.full((rows, self.vocabulary), -1)
        for t in range(length):
            before = last[row, inputs[:, t]]
            for hop in range(1, self.hops + 1):
                # The step after the last occurrence is at most t, whose shorter hops are known by now.
                there = found[hop - 1, row, before + 1]
                found[hop, :, t] = np.where(before >= 0, there, -1)
            last[row, inputs[:, t]] = t
        reached = found[self.hops]
        targets = np.take_along_axis(inputs, np.maximum(reached, 0), axis=1)
        return as_batch(inputs, targets, reached >= 0)
