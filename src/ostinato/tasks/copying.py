"""Copying: what was shown must be said again, after a wait (copying) or out of noise (selective copying).

Plain copying (Hochreiter and Schmidhuber 1997; Arjovsky et al. 2016) has its symbols at fixed places, which a
fixed filter can find; selective copying (Gu and Dao 2023, arXiv 2312.00752, section 4.1) has them at random
places, which asks for a transition that depends on the input. Token 0 is blank, 1 asks for the answer, the
symbols are 2 ….
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@dataclass
class Copying(GeneratedTask):
    """`symbols`, a wait of blanks that ends in the marker, then one blank for each answer.

    The length is symbols + delay + symbols; the last `symbols` positions are scored, in the order shown.
    """

    name: ClassVar[str] = "copying"

    symbols: int = 8
    """How many are shown."""
    alphabet: int = 8
    """How many different ones there are."""
    delay: int = 50
    """Steps between the last symbol and the first answer; the last of them is the marker."""

    def __post_init__(self) -> None:
        require(self.symbols >= 1, f"symbols must be positive, got {self.symbols}")
        require(self.alphabet >= 2, f"alphabet must be at least 2, got {self.alphabet}")
        require(self.delay >= 1, f"delay must be at least 1 (the marker), got {self.delay}")

    @property
    def vocab_size(self) -> int:
        """alphabet + 2."""
        return self.alphabet + 2

    @property
    def chance(self) -> float:
        """1 / alphabet."""
        return 1 / self.alphabet

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Only the training length."""
        return (2 * self.symbols + self.delay,)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 2 symbols + delay)."""
        shown = rng.integers(2, 2 + self.alphabet, (rows, self.symbols))
        inputs = np.zeros((rows, 2 * self.symbols + self.delay), dtype=np.int64)
        inputs[:, : self.symbols] = shown
        inputs[:, self.symbols + self.delay - 1] = 1
        return _ask_at_end(inputs, shown)


@dataclass
class SelectiveCopying(GeneratedTask):
    """`symbols` at random places among blanks, then one marker for each answer, in the order shown.

    The length is places + symbols. The defaults have a vocabulary of 16 with blank and marker.
    """

    name: ClassVar[str] = "selective_copying"

    symbols: int = 8
    alphabet: int = 14
    places: int = 64
    """Steps among which the symbols are spread; longer ones are tested when `tested_places` names them."""
    tested_places: tuple[int, ...] = ()
    """Other numbers of places to test at, besides `places`."""

    def __post_init__(self) -> None:
        self.tested_places = tuple(self.tested_places)
        require(self.symbols >= 1, f"symbols must be positive, got {self.symbols}")
        require(self.alphabet >= 2, f"alphabet must be at least 2, got {self.alphabet}")
        fewest = min((self.places, *self.tested_places))
        require(fewest >= self.symbols, f"{self.symbols} symbols do not fit in {fewest} places")

    @property
    def vocab_size(self) -> int:
        """alphabet + 2."""
        return self.alphabet + 2

    @property
    def chance(self) -> float:
        """1 / alphabet."""
        return 1 / self.alphabet

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """The training length, and those of `tested_places`."""
        return tuple(places + self.symbols for places in (self.places, *self.tested_places))

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, places + symbols)."""
        places = self.places if length is None else length - self.symbols
        shown = rng.integers(2, 2 + self.alphabet, (rows, self.symbols))
        where = np.sort(rng.random((rows, places)).argsort(1)[:, : self.symbols], axis=1)
        inputs = np.zeros((rows, places + self.symbols), dtype=np.int64)
        np.put_along_axis(inputs, where, shown, axis=1)
        inputs[:, places:] = 1
        return _ask_at_end(inputs, shown)


def _ask_at_end(inputs: np.ndarray, answers: np.ndarray) -> Batch:
    """A batch whose last positions are scored against `answers`."""
    targets = np.zeros_like(inputs)
    targets[:, -answers.shape[1] :] = answers
    mask = np.zeros(inputs.shape, dtype=bool)
    mask[:, -answers.shape[1] :] = True
    return as_batch(inputs, targets, mask)
