"""A stream of writes and queries: the present value of a key, among keys that are rewritten again and again.

Trained on short streams nothing need ever be forgotten; tested on long ones, where only what was written last counts,
a memory that does not forget fills up.

Source: after Stuffed Mamba (arXiv 2410.07145), section 3; the stream itself is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, as_batch, require


@dataclass
class RecallStream(GeneratedTask):
    """Pairs key, value, key, value, …; with probability ½ a pair is a query, whose value is asked at its key.

    A write takes the next key of a random cyclic order of all keys, and a fresh value. A query repeats a key written
    before and has its present value: uniform over the keys written so far, or over the last `recent` writes. The first
    pair is a write. Tokens: keys 0 … keys − 1, then the values.
    """

    name: ClassVar[str] = "recall_stream"

    keys: int = 24
    values: int = 16
    length: int = 64
    """Tokens of a training stream: two a pair."""
    recent: int | None = None
    """Training queries ask for one of the last so many writes; None: of all."""
    tested_lengths: tuple[int, ...] = (64, 256, 768)
    tested_recent: int | None = 12
    """The same for tests, which are longer: None asks uniformly."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.keys >= 2 and self.values >= 2, "there must be at least two keys and two values")
        for length in (self.length, *self.tested_lengths):
            require(length >= 4 and length % 2 == 0, f"a length is even and at least 4, got {length}")
        for recent in (self.recent, self.tested_recent):
            require(recent is None or 1 <= recent <= self.keys, f"recent is in 1 … {self.keys} or None, got {recent}")

    @property
    def vocab_size(self) -> int:
        """keys + values."""
        return self.keys + self.values

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.values

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Streams of shape (rows, length): training queries without a length, test queries with one."""
        recent = self.recent if length is None else self.tested_recent
        pairs = (length or self.length) // 2
        order = np.argsort(rng.random((rows, self.keys)), axis=1)
        asks = rng.random((rows, pairs)) < 0.5
        asks[:, 0] = False
        fresh = rng.integers(0, self.values, (rows, pairs))
        back = rng.random((rows, pairs))
        written: np.ndarray = np.cumsum(~asks, axis=1) - ~asks  # before the pair
        known = np.minimum(written, self.keys if recent is None else recent)
        # Which write the pair is, or asks for: one of the last `keys`, so the last one of its key.
        write = np.where(asks, written - 1 - (back * known).astype(np.int64), written)
        key = np.take_along_axis(order, write % self.keys, axis=1)
        pair_of = np.argsort(asks, axis=1, kind="stable")  # the writes in the order of time, then the queries
        value = np.take_along_axis(fresh, np.take_along_axis(pair_of, write, axis=1), axis=1)
        inputs = np.stack([key, self.keys + value], axis=2).reshape(rows, 2 * pairs)
        targets = np.zeros_like(inputs)
        targets[:, ::2] = inputs[:, 1::2]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, ::2] = asks
        return as_batch(inputs, targets, mask)

    def baselines(self) -> Metrics:
        """The most frequent answer; the value that stood last; and the last value of the key: the oracle, 1."""
        last, looked_up, count = 0, 0, 0
        for batch in self.test_batches():
            before = batch.inputs.roll(1, dims=1)
            last += int(((batch.targets == before) & batch.mask).sum())
            for row, stream in enumerate(batch.inputs.tolist()):
                held: dict[int, int] = {}
                for p in range(0, len(stream), 2):
                    looked_up += int(batch.mask[row, p]) * (held.get(stream[p]) == stream[p + 1])
                    held[stream[p]] = stream[p + 1]
            count += int(batch.mask.sum())
        return {**super().baselines(), "last value": last / count, "lookup": looked_up / count}
