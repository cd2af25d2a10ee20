"""MAD's compression: random tokens that are to be told again, each from one vector.

The task belongs to `models.sequence_autoencoder`, which hands on nothing but the output at the last position. A model
that labels every position could copy the token it stands on, so the task is not in the registry.

Source: Poli et al. 2024 (arXiv 2403.17844), section 3 and the authors' generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@dataclass
class Compression(GeneratedTask):
    """`length` − 1 uniform symbols and then the token that ends them; asked is every token at its own position.

    The last one is asked too, as by the authors; it is always the same. Tokens: the symbols, then the end.
    """

    name: ClassVar[str] = "compression"

    symbols: int = 15
    length: int = 32
    """The end counted in."""

    def __post_init__(self) -> None:
        require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")
        require(self.length >= 2, f"length must be at least 2, got {self.length}")

    @property
    def vocab_size(self) -> int:
        """symbols + 1."""
        return self.symbols + 1

    @property
    def chance(self) -> float:
        """1 / symbols in all places but the last, which can be known."""
        return (1 + (self.length - 1) / self.symbols) / self.length

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Only `length`."""
        return (self.length,)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        inputs = rng.integers(0, self.symbols, (rows, self.length))
        inputs[:, -1] = self.symbols
        return as_batch(inputs, inputs, np.ones(inputs.shape, dtype=bool))
