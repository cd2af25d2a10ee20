"""Regular languages answered at every prefix: cycle navigation and even pairs (and, in `arithmetic`, parity).

Token 0 begins every sequence, which gives a recurrence from the zero state its first write, and pads the end.

Sources: Delétang et al. 2022 (arXiv 2207.02098), section 4; Grazzi et al. 2024 (arXiv 2411.12537), section 6.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@dataclass
class PrefixLanguage(GeneratedTask):
    """Random symbols 0 … symbols − 1, written as tokens 1 …; each prefix has an answer.

    With `dense` (the default) every position is scored, which states the same problem and is easier to optimise;
    otherwise the last one only, as in the papers. Subclasses define `symbols`, `first_answer` and `answers`, and `draw`
    where words are not uniform.
    """

    metric: ClassVar[str] = "scaled_accuracy"
    symbols: ClassVar[int] = 2

    min_length: int = 3
    """Symbols of the shortest training sequence."""
    max_length: int = 40
    """Symbols of the longest training sequence; lengths are uniform between the two."""
    tested_lengths: tuple[int, ...] = (40, 64, 128, 256)
    dense: bool = True

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(1 <= self.min_length <= self.max_length, f"{self.name} needs 1 <= min_length <= max_length")

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    @property
    def first_answer(self) -> int:
        """The token of answer 0."""
        return 1

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """Random words (rows, length) of the symbols: here uniform."""
        return rng.integers(0, self.symbols, (rows, length))

    @abstractmethod
    def answers(self, word: np.ndarray) -> np.ndarray:
        """The answers, from 0, of every prefix of words (rows, length)."""

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + longest)."""
        longest = length or self.max_length
        lengths = rng.integers(self.min_length, self.max_length + 1, rows) if length is None else np.full(rows, length)
        word = self.draw(rng, rows, longest)
        position = np.arange(1, longest + 1)
        inside = position <= lengths[:, None]
        scored = inside if self.dense else position == lengths[:, None]
        inputs = np.where(inside, 1 + word, 0)
        targets = np.where(inside, self.first_answer + self.answers(word), 0)
        start = np.zeros((rows, 1), dtype=np.int64)
        return as_batch(
            np.concatenate([start, inputs], 1),
            np.concatenate([start, targets], 1),
            np.concatenate([start.astype(bool), scored], 1),
        )


@dataclass
class CycleNavigation(PrefixLanguage):
    """Where on a cycle is one who stays, goes one on, or one back?

    Tokens: 0 begins and pads, 1 stays, 2 goes on, 3 goes back, 4 … are the places 0 … places − 1. The walk begins at
    place 0.
    """

    name: ClassVar[str] = "cycle_navigation"
    symbols: ClassVar[int] = 3

    places: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.places >= 2, f"a cycle has at least 2 places, got {self.places}")

    @property
    def vocab_size(self) -> int:
        """4 + places."""
        return 4 + self.places

    @property
    def chance(self) -> float:
        """1 / places."""
        return 1 / self.places

    @property
    def first_answer(self) -> int:
        """4, place 0."""
        return 4

    def answers(self, word: np.ndarray) -> np.ndarray:
        """The place after every move."""
        return np.array([0, 1, -1])[word].cumsum(1) % self.places


@dataclass
class EvenPairs(PrefixLanguage):
    """Is the number of places where the symbol changes even? (Or: is the last symbol the first?)

    Tokens: 0 begins and pads, 1 and 2 are the symbols. The answer is 1 if so, 2 if not.
    """

    name: ClassVar[str] = "even_pairs"

    @property
    def vocab_size(self) -> int:
        """3."""
        return 3

    @property
    def chance(self) -> float:
        """1/2."""
        return 0.5

    def answers(self, word: np.ndarray) -> np.ndarray:
        """0 where the symbol is the first one's."""
        return (word != word[:, :1]).astype(np.int64)
