"""A cue long ago: which channel flashed once at the beginning is asked at the very end (S4's long memory, in small)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, require


@dataclass
class DelayedCue(GeneratedTask):
    """Vectors of `classes` channels, noise N(0, noise²) in all; one channel is raised by 1 for one step; which one?

    The cue comes at a uniform step before `window`; only the last step is scored, so the answer must be carried
    for `length` − `window` steps at least, and noise must not pile up on the way. No token ids: it `reads_vectors`.

    Sums of the input do not solve it: over a window of 64 the noise of 0.1 adds up to 0.8. The single step must be
    told from noise by its size, before anything is added up.
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

    def baselines(self) -> Metrics:
        """Beside the constant answer: the channel of the largest value, and of the largest sum over the window.

        The first is what a threshold before the memory can reach, the second what a linear memory can that weighs
        the steps of the window alike and forgets all others.
        """
        found = {"largest value": 0.0, "largest sum over the window": 0.0}
        count = 0
        for batch in self.test_batches():
            answers = {
                "largest value": batch.inputs.amax(1),
                "largest sum over the window": batch.inputs[:, : self.window].sum(1),
            }
            count += len(batch.targets)
            for name, values in answers.items():
                found[name] += float((values.argmax(-1) == batch.targets[:, -1]).sum())
        return super().baselines() | {name: right / count for name, right in found.items()}
