"""In-context copying and look-up: say a string again, or what followed some of its tokens.

Unlike `copying`, there is no fixed time to wait and nothing is blank: the whole string must be in the state, whatever
its length. A state of constant size can hold only so much; attention just looks.

Source: Jelassi et al. 2024 (arXiv 2402.01032), section 3 (copying) and 4.2 (n-gram look-up); Olsson et al. 2022,
arXiv 2209.11895 (induction heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, as_batch, require


@dataclass
class InContextCopying(GeneratedTask):
    """x_1 … x_n, the mark, and again x_1 … x_n, each token predicted at the one before it.

    Tokens: 0 begins and pads, 1 is the mark, symbols are 2 …, uniform. In training n is uniform between `min_symbols`
    and `symbols`; a test split "length 40" has strings of n = 40. The metric is the share of positions right.
    """

    name: ClassVar[str] = "in_context_copying"

    alphabet: int = 26
    min_symbols: int = 4
    symbols: int = 20
    """Of the longest string in training."""
    tested_symbols: tuple[int, ...] = (20, 40, 80)

    def __post_init__(self) -> None:
        self.tested_symbols = tuple(self.tested_symbols)
        require(self.alphabet >= 2, f"alphabet must be at least 2, got {self.alphabet}")
        require(1 <= self.min_symbols <= self.symbols, "in_context_copying needs 1 <= min_symbols <= symbols")
        require(min(self.tested_symbols, default=1) >= 1, f"tested_symbols are positive, got {self.tested_symbols}")

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
        """`tested_symbols`."""
        return self.tested_symbols

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + 2 · longest)."""
        longest = length or self.symbols
        size = rng.integers(self.min_symbols, longest + 1, rows) if length is None else np.full(rows, length)
        shown = rng.integers(2, 2 + self.alphabet, (rows, longest))
        time = np.arange(1 + 2 * longest)
        # Position 0 begins; 1 … n show; n + 1 is the mark; then come x_1 … x_{n−1}.
        n = size[:, None]
        again = time - n - 1
        inputs = np.where((time >= 1) & (time <= n), shown[:, (time - 1).clip(0, longest - 1)], 0)
        back = np.take_along_axis(shown, (again - 1).clip(0, longest - 1), axis=1)
        inputs = np.where((again >= 1) & (again < n), back, inputs)
        inputs[again == 0] = 1
        mask = (again >= 0) & (again < n)
        targets = np.where(mask, np.take_along_axis(shown, again.clip(0, longest - 1), axis=1), 0)
        return as_batch(inputs, targets, mask)

    def baselines(self) -> Metrics:
        """The constant answer; and "look-up": what followed the last token read, where it stood first in the string."""
        right = count = 0
        for batch in self.test_batches():
            for tokens, targets, mask in zip(*(part.numpy() for part in batch[:3]), strict=True):
                string = tokens[1 : int(np.argmax(tokens == 1))]
                for place in np.flatnonzero(mask):
                    same = np.flatnonzero(string[:-1] == tokens[place])
                    said = string[0] if tokens[place] == 1 else string[same[0] + 1] if len(same) else -1
                    right += int(said == targets[place])
                    count += 1
        return {**super().baselines(), "look-up of one token": right / count}


@dataclass
class Lookup(GeneratedTask):
    """A string, the mark, `given` consecutive tokens of it, and then the `asked` tokens that followed them.

    Tokens: 0 begins, 1 is the mark, symbols are 2 …. No run of `given` tokens stands twice in a string, so the answer
    is one. With `given` = `asked` = 1 this is induction over every token: the symbols then are all different.
    """

    name: ClassVar[str] = "lookup"

    alphabet: int = 32
    symbols: int = 24
    """Of the string, in training."""
    given: int = 1
    asked: int = 1
    tested_symbols: tuple[int, ...] = ()
    """Other lengths to test at, besides `symbols`."""

    def __post_init__(self) -> None:
        self.tested_symbols = tuple(self.tested_symbols)
        require(self.given >= 1 and self.asked >= 1, "given and asked must be positive")
        shortest, longest = min(self.test_lengths), max(self.test_lengths)
        require(
            shortest >= self.given + self.asked, f"a string of {shortest} has no {self.given} + {self.asked} tokens"
        )
        require(
            longest <= self.alphabet if self.given == 1 else 2 * longest <= self.alphabet**self.given,
            f"an alphabet of {self.alphabet} has too few runs of {self.given} for strings of {longest} without repeats",
        )

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
        """`symbols`, and `tested_symbols`."""
        return (self.symbols, *(length for length in self.tested_symbols if length != self.symbols))

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + symbols + given + asked); the last position scores the last answer."""
        length = length or self.symbols
        if self.given == 1:
            string = 2 + rng.random((rows, self.alphabet)).argsort(1)[:, :length]
        else:
            string = np.stack([self._string(rng, length) for _ in range(rows)])
        start = rng.integers(0, length - self.given - self.asked + 1, rows)
        part = np.take_along_axis(string, start[:, None] + np.arange(self.given + self.asked), axis=1)
        column = np.ones((rows, 1), dtype=np.int64)
        inputs = np.concatenate([0 * column, string, column, part[:, :-1]], axis=1)
        targets = np.zeros_like(inputs)
        targets[:, -self.asked :] = part[:, self.given :]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -self.asked :] = True
        return as_batch(inputs, targets, mask)

    def _string(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A string without a repeated run: one symbol after another, uniform among those that repeat none."""
        while True:
            string = rng.integers(2, 2 + self.alphabet, self.given - 1).tolist()
            seen: set[tuple[int, ...]] = set()
            while len(string) < length:
                before = tuple(string[len(string) - self.given + 1 :])
                free = [s for s in range(2, 2 + self.alphabet) if (*before, s) not in seen]
                if not free:
                    break
                string.append(free[int(rng.integers(len(free)))])
                seen.add((*before, string[-1]))
            if len(string) == length:
                return np.array(string)

    def baselines(self) -> Metrics:
        """The constant answer; and "search", which finds the given tokens in the string: 1."""
        right = count = 0
        for batch in self.test_batches():
            for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
                end = tokens.index(1)
                key = tokens[end + 1 : end + 1 + self.given]
                found = next(i for i in range(1, end) if tokens[i : i + self.given] == key)
                said = tokens[found + self.given : found + self.given + self.asked]
                right += sum(a == b for a, b in zip(said, targets[-self.asked :], strict=True))
                count += self.asked
        return {**super().baselines(), "search": right / count}
