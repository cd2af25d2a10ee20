"""A cue long ago: which channel flashed once at the beginning is asked at the very end (S4's long memory, in small)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ostinato.tasks.base import Batch, GeneratedTask, require


@dataclass
class DelayedCue(GeneratedTask):
    """Vectors of `classes` channels, noise N(0, noise²) in all; one channel is raised by 1 for one step; which one?

    The cue comes at a uniform step before `window`; only the last step is scored, so the answer must be carried
    for `length` − `window` steps at least, and noise must not pile up on the way. No token ids: it `reads_vectors`.
    """

    name: ClassVar[str] = "delayed_cue"
    reads_vectors: ClassVar[bool] = True

    classes: int = 8
    length: int = 1024
    window: int = 64
    noise: float = 0.1
    tested_lengths: tuple[int, ...] = ()
    """Other lengths to test at, besides `length`."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.classes >= 2, f"classes must be at least 2, got {self.classes}")
        require(self.noise >= 0, f"noise must not be negative, got {self.noise}")
        shortest = min((self.length, *self.tested_lengths))
        require(1 <= self.window <= shortest, f"the cue's window must lie in 1 … {shortest}, got {self.window}")

    @property
    def vocab_size(self) -> int:
        """Channels: `classes`."""
        return self.classes

    @property
    def chance(self) -> float:
        """1 / classes."""
        return 1 / self.classes

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`length` and `tested_lengths`."""
        return (self.length, *(length for length in self.tested_lengths if length != self.length))

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length, classes)."""
        length = length or self.length
        inputs = self.noise * rng.standard_normal((rows, length, self.classes))
        cue = rng.integers(0, self.classes, rows)
        inputs[np.arange(rows), rng.integers(0, self.window, rows), cue] += 1
        targets = torch.zeros(rows, length, dtype=torch.long)
        targets[:, -1] = torch.from_numpy(cue)
        mask = torch.zeros(rows, length, dtype=torch.bool)
        mask[:, -1] = True
        return Batch(torch.from_numpy(inputs.astype(np.float32)), targets, mask)
