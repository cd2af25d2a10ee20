"""Masked text: some bytes of a window are hidden, and must be said from what stands before and behind.

Source: BERT (arXiv 1810.04805), section 3.1; by characters and without its random replacements, as in Hydra's
reproduction (arXiv 2407.09941).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import _TEST, _TRAIN, Batch, Metrics, Task, as_batch, require
from ostinato.tasks.text import read_corpus

MASK = 256


@dataclass(kw_only=True)
class MaskedText(Task):
    """`share` of the bytes of a random window are replaced by the token 256; they alone are scored, in nats.

    The last `held_out` of the corpus is the test text, in windows one after the other, at most `test_size` of them.
    """

    name: ClassVar[str] = "masked_text"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    corpus: str = "pydoc"
    """See `ostinato.tasks.text`."""
    window: int = 128
    share: float = 0.2
    held_out: float = 0.1
    seed: int = 0
    """Of the places that are hidden in the test."""
    test_size: int = 256

    def __post_init__(self) -> None:
        require(self.window >= 2 and self.test_size >= 1, "window is at least 2, test_size at least 1")
        require(0 < self.share < 1 and 0 < self.held_out < 1, "share and held_out lie between 0 and 1")
        require(len(self._parts[1]) >= self.window, f"there is less than one window of {self.window} held out")

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(read_corpus(self.corpus), dtype=np.uint8)
        split = int(len(data) * (1 - self.held_out))
        return data[:split], data[split:]

    @property
    def vocab_size(self) -> int:
        """256 bytes and the mask."""
        return MASK + 1

    @property
    def num_classes(self) -> int:
        """256."""
        return MASK

    @property
    def chance(self) -> float:
        """1 / 256."""
        return 1 / MASK

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Windows at random places."""
        rng = np.random.default_rng([_TRAIN, seed, step])
        text = self._parts[0]
        starts = rng.integers(0, len(text) - self.window + 1, (batch_size, 1))
        return self._masked(text[starts + np.arange(self.window)], rng)

    def test_batches(self) -> Iterator[Batch]:
        """The windows held out, in batches of at most 64."""
        text = self._parts[1]
        count = min(self.test_size, len(text) // self.window)
        windows = text[: count * self.window].reshape(count, self.window)
        rng = np.random.default_rng([_TEST, self.seed])
        for start in range(0, count, 64):
            yield self._masked(windows[start : start + 64], rng)

    def _masked(self, bytes_: np.ndarray, rng: np.random.Generator) -> Batch:
        hidden = rng.random(bytes_.shape) < self.share
        return as_batch(np.where(hidden, MASK, bytes_.astype(np.int64)), bytes_, hidden)

    def baselines(self) -> Metrics:
        """The frequencies of single bytes; and those of bytes between the same two neighbours, where both are seen."""
        train = self._parts[0].astype(np.int64)
        single = np.bincount(train, minlength=MASK) + 0.01
        single /= single.sum()
        between = np.zeros((MASK, MASK, MASK), dtype=np.float32)
        np.add.at(between, (train[:-2], train[2:], train[1:-1]), 1)
        sums, counts = [0.0, 0.0], 0
        for batch in self.test_batches():
            inputs, targets, mask = (part.numpy() for part in batch[:3])
            for row, place in np.argwhere(mask):
                wanted = targets[row, place]
                near = [inputs[row, p] if 0 <= p < self.window else MASK for p in (place - 1, place + 1)]
                chance = single[wanted]
                sums[0] -= np.log(chance)
                if MASK not in near:
                    seen = between[near[0], near[1]]
                    chance = (seen[wanted] + chance) / (seen.sum() + 1)
                sums[1] -= np.log(chance)
                counts += 1
        return {"frequencies of bytes": sums[0] / counts, "between the same neighbours": sums[1] / counts}
