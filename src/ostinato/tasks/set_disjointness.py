"""Set disjointness: two sets are read, one after the other; which element do they share?

A reader of constant memory must keep the first set whole while it reads the second: the smaller the first, the easier.
So the order matters to a causal recurrence, and both orders are tested.

Source: Just read twice (arXiv 2407.05483), section 3 and the authors' generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ostinato.tasks.base import _TEST, _TRAIN, Batch, GeneratedTask, Metrics, Tally, as_batch, require

_PREFIX, _NEXT, _ASK, _FIRST = 1, 2, 3, 4
Sizes = tuple[int, int]


@dataclass
class SetDisjointness(GeneratedTask):
    """1 A 2 B 3: at the last token, the one element that A and B share.

    Tokens 4 … vocabulary − 1 are shuffled and halved; A is drawn from the one half, B from the other; then a random
    element of B becomes a random one of A. All sequences of a training batch have the same sizes, drawn from `sizes`.
    With `readings` of 2 the sets are shown twice, 1 A 2 B 2 A 2 B 3 (the prompt that is read twice).

    The splits are "first 2, second 32"; `accuracy, shorter first` and `accuracy, longer first` are means over orders.
    """

    name: ClassVar[str] = "set_disjointness"

    vocabulary: int = 128
    sizes: tuple[Sizes, ...] = ((2, 8), (8, 2), (4, 16), (16, 4), (2, 32), (32, 2))
    tested_sizes: tuple[Sizes, ...] = ((2, 32), (32, 2), (4, 48), (48, 4))
    readings: int = 1
    mixed: bool = False
    """Training batches hold all sizes, in equal shares, 0 before the shorter ones: they all have one shape."""

    def __post_init__(self) -> None:
        self.sizes, self.tested_sizes = _pairs(self.sizes), _pairs(self.tested_sizes)
        require(self.readings >= 1, f"readings must be positive, got {self.readings}")
        require(bool(self.sizes) and bool(self.tested_sizes), "there must be sizes to train on and sizes to test")
        half = (self.vocabulary - _FIRST) // 2
        for size in (*self.sizes, *self.tested_sizes):
            require(
                len(size) == 2 and min(size) >= 1 and max(size) <= half,
                f"sizes are two numbers between 1 and {half}, half of the tokens that are elements; got {size}",
            )

    @property
    def vocab_size(self) -> int:
        """`vocabulary`."""
        return self.vocabulary

    @property
    def chance(self) -> float:
        """One of the elements: 1 / (vocabulary − 4)."""
        return 1 / (self.vocabulary - _FIRST)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Those of `tested_sizes`."""
        return tuple(1 + self.readings * (first + second + 2) for first, second in self.tested_sizes)

    def generate(
        self, rng: np.random.Generator, rows: int, length: int | None = None, *, sizes: Sizes | None = None
    ) -> Batch:
        """Sequences of shape (rows, 1 + readings · (a + b + 2)), all of the same sizes; `length` is not used."""
        first, second = sizes or self.sizes[rng.integers(len(self.sizes))]
        shuffled = _FIRST + rng.random((rows, self.vocabulary - _FIRST)).argsort(1)
        half = (self.vocabulary - _FIRST) // 2
        left, right = shuffled[:, :first], shuffled[:, half : half + second].copy()
        row = np.arange(rows)
        shared = left[row, rng.integers(0, first, rows)]
        right[row, rng.integers(0, second, rows)] = shared
        column = np.ones((rows, 1), dtype=np.int64)
        parts: list[np.ndarray] = []
        for turn in range(self.readings):
            parts += [column * (_NEXT if turn else _PREFIX), left, column * _NEXT, right]
        inputs = np.concatenate([*parts, column * _ASK], axis=1)
        targets = np.zeros_like(inputs)
        targets[:, -1] = shared
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -1] = True
        return as_batch(inputs, targets, mask)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Sequences of sizes drawn for the batch, or of all of them."""
        if not self.mixed:
            return super().train_batch(step, batch_size, seed)
        rng = np.random.default_rng([_TRAIN, seed, step])
        shares = np.diff(np.linspace(0, batch_size, len(self.sizes) + 1).round().astype(int))
        parts = [self.generate(rng, rows, sizes=size) for rows, size in zip(shares, self.sizes, strict=True) if rows]
        longest = 1 + self.readings * (max(first + second for first, second in self.sizes) + 2)
        columns = zip(*((part.inputs, part.targets, part.mask) for part in parts), strict=True)
        inputs, targets, mask = (
            torch.cat([pad(piece, (longest - piece.shape[1], 0)) for piece in column]) for column in columns
        )
        return Batch(inputs, targets, mask)

    def test_batches(self) -> Iterator[Batch]:
        """`test_size` sequences of each pair of sizes, in batches of at most 64."""
        for first, second in self.tested_sizes:
            rng = np.random.default_rng([_TEST, self.seed, first, second])
            for start in range(0, self.test_size, 64):
                batch = self.generate(rng, min(64, self.test_size - start), sizes=(first, second))
                yield batch._replace(split=f"first {first}, second {second}")

    def _order(self, batch: Batch) -> str:
        """Which set came first, as every row of a batch has it."""
        first = int((batch.inputs[0] == _NEXT).int().argmax()) - 1
        both = (batch.inputs.shape[1] - 1) // self.readings - 2
        return "shorter" if 2 * first < both else "longer" if 2 * first > both else "equal"

    def score(self, logits: Tensor, batch: Batch) -> dict[str, Tally]:
        """Those of every task, and the accuracy of each order."""
        found = super().score(logits, batch)
        order = self._order(batch)
        if order != "equal":
            found[f"accuracy, {order} first"] = found["accuracy"]
        return found

    def baselines(self) -> Metrics:
        """The constant answer; any element of the shorter set, on the average; and the token read twice: 1."""
        guess = right = count = 0.0
        for batch in self.test_batches():
            inputs = batch.inputs[:, : 1 + (batch.inputs.shape[1] - 1) // self.readings]
            first = int((inputs[0] == _NEXT).int().argmax()) - 1
            shorter = min(first, inputs.shape[1] - 3 - first)
            seen = inputs.sort(1).values
            same = (seen[:, 1:] == seen[:, :-1]) & (seen[:, 1:] >= _FIRST)
            said = seen[:, 1:].gather(1, same.int().argmax(1, keepdim=True))[:, 0]
            right += float((said == batch.targets[:, -1]).sum())
            guess += len(inputs) / shorter
            count += len(inputs)
        found = {"any element of the shorter set": guess / count, "search": right / count}
        return {**super().baselines(), **found}


def _pairs(sizes: Any) -> tuple[Sizes, ...]:
    """Lists (of a JSON file) as tuples."""
    return tuple(tuple(size) for size in sizes)  # type: ignore[misc]
