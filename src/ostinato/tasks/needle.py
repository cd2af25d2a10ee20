"""Needle in a haystack: of several marked pairs among random tokens, the value of one key is asked.

Source: the needle test of Kamradt (2023), in the synthetic form of RULER (arXiv 2404.06654), section 3 (single and
multi-key needles); tokens instead of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, Tally, as_batch, require

_MARK, _ASK = 1, 2


@dataclass
class Needle(GeneratedTask):
    """`needles` triples (mark, key, value) among hay; at the end the question mark and one key: what was its value?

    Tokens: 0 is nothing, 1 the mark, 2 the question, then `keys` keys, then `values` values. Hay is uniform over keys
    and values: only the mark tells a needle. Keys are different, values need not be. Training places are uniform; in a
    test the needle that is asked lies at each of `depths` depths, (i + ½) / depths of the hay, equally often, and the
    accuracy of each is reported as "accuracy at depth 0.25".
    """

    name: ClassVar[str] = "needle"

    needles: int = 4
    keys: int = 16
    values: int = 16
    length: int = 64
    tested_lengths: tuple[int, ...] = (64, 256, 1024)
    depths: int = 4

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.values >= 2 and self.depths >= 1, "a needle needs at least 2 values, and depths at least 1")
        require(1 <= self.needles <= self.keys, f"{self.needles} needles need as many different keys, got {self.keys}")
        shortest = min((self.length, *self.tested_lengths))
        least = 3 * self.needles + 2
        require(shortest >= least, f"{self.needles} needles and the question need {least} tokens, got {shortest}")

    @property
    def vocab_size(self) -> int:
        """3 + keys + values."""
        return 3 + self.keys + self.values

    @property
    def chance(self) -> float:
        """1 / values."""
        return 1 / self.values

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length); the last position is scored."""
        tested = length is not None
        length = length or self.length
        hay = length - 2 - 3 * self.needles
        items = hay + self.needles
        # Where the needles stand among the items (a token of hay, or a needle); the first is the one asked.
        order = rng.random((rows, items)).argsort(1)
        if tested:
            depth = (rng.permutation(rows) % self.depths + 0.5) / self.depths
            wanted = (depth * items).astype(np.int64)
            swap = np.argmax(order == wanted[:, None], axis=1)
            row = np.arange(rows)
            order[row, swap], order[row, 0] = order[row, 0], wanted
        place = order[:, : self.needles]
        key = 3 + rng.random((rows, self.keys)).argsort(1)[:, : self.needles]
        value = 3 + self.keys + rng.integers(0, self.values, key.shape)

        needle = np.zeros((rows, items), dtype=np.int64)
        np.put_along_axis(needle, place, 1, axis=1)
        width = 1 + 2 * needle
        begin = np.take_along_axis(width.cumsum(1) - width, place, axis=1)
        inputs = rng.integers(3, self.vocab_size, (rows, length))
        for offset, tokens in enumerate((np.full_like(key, _MARK), key, value)):
            np.put_along_axis(inputs, begin + offset, tokens, axis=1)
        inputs[:, -2] = _ASK
        inputs[:, -1] = key[:, 0]
        targets = np.zeros_like(inputs)
        targets[:, -1] = value[:, 0]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -1] = True
        return as_batch(inputs, targets, mask)

    def _found(self, batch: Batch) -> Tensor:
        """Where the mark of the needle that is asked stands, (rows,)."""
        following = batch.inputs.roll(-1, dims=1)
        return ((batch.inputs == _MARK) & (following == batch.inputs[:, -1:])).int().argmax(1)

    def score(self, logits: Tensor, batch: Batch) -> dict[str, Tally]:
        """Those of every task, and the accuracy at each depth, in as many parts as `depths`."""
        found = super().score(logits, batch)
        right = ((logits.argmax(-1) == batch.targets) & batch.mask).any(1)
        depth = self._found(batch) / (batch.inputs.shape[1] - 4)
        part = (depth * self.depths).long().clamp(max=self.depths - 1)
        for index in part.unique().tolist():
            here = part == index
            name = f"accuracy at depth {(index + 0.5) / self.depths:.3g}"
            found[name] = (float(right[here].sum()), float(here.sum()))
        return found

    def baselines(self) -> Metrics:
        """The constant answer; the value of the last needle, whatever its key; and the marked key's value: 1."""
        last = right = count = 0
        for batch in self.test_batches():
            row = torch.arange(len(batch.inputs))
            marks = batch.inputs == _MARK
            final = marks.shape[1] - 1 - marks.flip(1).int().argmax(1)
            last += int((batch.inputs[row, final + 2] == batch.targets[:, -1]).sum())
            right += int((batch.inputs[row, self._found(batch) + 2] == batch.targets[:, -1]).sum())
            count += len(row)
        return {**super().baselines(), "last needle": last / count, "search": right / count}
