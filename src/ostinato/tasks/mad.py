"""Recall in context among noise, of keys and values of several tokens, and of facts learned in training (MAD).

Three of the six tasks of mechanistic architecture design; selective copying is `selective_copying`, the plain recall is
`context_recall` without noise, and the sixth, which needs a decoder of its own, is `tasks.compression`. Answers alone
are scored, in training too; the authors train on every next token.

Source: Poli et al. 2024 (arXiv 2403.17844), section 3 and the authors' settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@dataclass
class ContextRecall(GeneratedTask):
    """Pairs of a key and its value, one after the other; each sequence has its own value for every key.

    Keys are uniform and come again; the value is asked at every key that was there before. With `noise`, a share of the
    pairs is replaced by two noise tokens. Tokens: keys, values, noise.
    """

    name: ClassVar[str] = "context_recall"

    keys: int = 8
    values: int = 8
    length: int = 128
    noise: int = 0
    """How many noise tokens there are; 0 for none."""
    noise_share: float = 0.2
    """Of the pairs, where there is noise."""
    tested_lengths: tuple[int, ...] = ()
    """Other lengths to test at, besides `length`."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.keys >= 1 and self.values >= 2 and self.noise >= 0, "there must be keys and at least two values")
        require(0 <= self.noise_share < 1, f"noise_share lies in [0, 1), got {self.noise_share}")
        for length in self.test_lengths:
            require(length >= 4 and length % 2 == 0, f"a length is even and at least 4, got {length}")

    @property
    def vocab_size(self) -> int:
        """keys + values + noise."""
        return self.keys + self.values + self.noise

    @property
    def chance(self) -> float:
        """1 / values."""
        return 1 / self.values

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`length`, and `tested_lengths`."""
        return (self.length, *self.tested_lengths)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        pairs = (length or self.length) // 2
        keys = rng.integers(0, self.keys, (rows, pairs))
        table = rng.integers(self.keys, self.keys + self.values, (rows, self.keys))
        hidden = np.zeros((rows, pairs), dtype=bool)
        if self.noise:
            hidden = rng.random((rows, pairs)) < self.noise_share
        # One key comes twice at least.
        keys[:, -1], hidden[:, [0, -1]] = keys[:, 0], False
        values = np.take_along_axis(table, keys, axis=1)
        shown = (keys[:, :, None] == np.arange(self.keys)) & ~hidden[:, :, None]
        before = np.cumsum(shown, axis=1) - shown
        again = (np.take_along_axis(before, keys[:, :, None], axis=2)[:, :, 0] > 0) & ~hidden
        tokens = np.stack([keys, values], axis=2)
        if self.noise:
            drawn = rng.integers(self.keys + self.values, self.vocab_size, tokens.shape)
            tokens = np.where(hidden[:, :, None], drawn, tokens)
        inputs = tokens.reshape(rows, -1)
        mask = np.stack([again, np.zeros_like(again)], axis=2).reshape(rows, -1)
        targets = np.where(mask, np.roll(inputs, -1, axis=1), 0)
        return as_batch(inputs, targets, mask)


@dataclass
class FuzzyRecall(GeneratedTask):
    """Keys and values of one to `motif` tokens each: what a key is must be told from several tokens in a row.

    A pair is with probability ½ one that was there before, else a new one: up to `motif` distinct key symbols, then up
    to `motif` distinct value symbols (the value it has, if the key happens to be an old one). All tokens of the values
    of keys that come again are asked. In tests every key has `motif` symbols. Tokens: key symbols, value symbols.
    """

    name: ClassVar[str] = "fuzzy_recall"

    symbols: int = 7
    """Of keys; there are as many of values."""
    motif: int = 3
    length: int = 128
    tested_lengths: tuple[int, ...] = ()
    """Other lengths to test at, besides `length`."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(1 <= self.motif <= self.symbols, f"motif lies in 1 … symbols={self.symbols}, got {self.motif}")
        require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")
        shortest = min(self.test_lengths)
        require(shortest >= 4 * self.motif, f"a length holds two pairs: {4 * self.motif} at least, got {shortest}")

    @property
    def vocab_size(self) -> int:
        """Twice `symbols`."""
        return 2 * self.symbols

    @property
    def chance(self) -> float:
        """1 / symbols."""
        return 1 / self.symbols

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`length`, and `tested_lengths`."""
        return (self.length, *self.tested_lengths)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        test, length = length is not None, length or self.length
        pairs = length // 2 + 1
        own = {
            "key": rng.random((rows, pairs, self.symbols)).argsort(2)[:, :, : self.motif],
            "value": self.symbols + rng.random((rows, pairs, self.symbols)).argsort(2)[:, :, : self.motif],
        }
        sizes = {name: rng.integers(1, self.motif + 1, (rows, pairs)) for name in own}
        if test:
            sizes["key"][:] = self.motif
        first, again = self._repeats(rng, own["key"], sizes["key"])
        own = {name: np.take_along_axis(part, first[:, :, None], axis=1) for name, part in own.items()}
        sizes = {name: np.take_along_axis(part, first, axis=1) for name, part in sizes.items()}
        ends = np.cumsum(sizes["key"] + sizes["value"], axis=1)
        starts = {"key": ends - sizes["key"] - sizes["value"], "value": ends - sizes["value"]}
        # One column more than is kept takes what lies beyond.
        tokens = np.zeros((rows, length + 2), dtype=np.int64)
        asked = np.zeros((rows, length + 2), dtype=bool)
        for name, part in own.items():
            for place in range(self.motif):
                at = np.where(place < sizes[name], starts[name] + place, length + 1).clip(max=length + 1)
                np.put_along_axis(tokens, at, part[:, :, place], axis=1)
                if name == "value":
                    np.put_along_axis(asked, at, again, axis=1)
        mask = asked[:, 1 : length + 1]
        return as_batch(tokens[:, :length], np.where(mask, tokens[:, 1 : length + 1], 0), mask)

    def _repeats(self, rng: np.random.Generator, keys: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every pair the first pair with its key, and whether that is an earlier one."""
        rows, pairs = sizes.shape
        digits = np.where(np.arange(self.motif) < sizes[:, :, None], keys + 1, 0)
        codes = (digits * (self.symbols + 1) ** np.arange(self.motif)).sum(2)
        old = rng.random((rows, pairs)) < 0.5
        old[:, 0], old[:, 1] = False, True
        earlier = (rng.random((rows, pairs)) * np.arange(pairs)).astype(np.int64)
        first = np.tile(np.arange(pairs), (rows, 1))
        row = np.arange(rows)
        for pair in range(1, pairs):
            codes[:, pair] = np.where(old[:, pair], codes[row, earlier[:, pair]], codes[:, pair])
            same = codes[:, :pair] == codes[:, pair : pair + 1]
            first[:, pair] = np.where(same.any(1), same.argmax(1), pair)
        return first, first < np.arange(pairs)


@dataclass
class Memorization(GeneratedTask):
    """Facts: every key has one value, the same in all sequences, so that only the parameters can hold it.

    A sequence is key, blank, key, blank, …; the value is asked at the blank. Tokens: 0 blank, keys, values.
    """

    name: ClassVar[str] = "memorization"

    facts: int = 127
    length: int = 32
    map_seed: int = 0
    """Of the facts."""

    def __post_init__(self) -> None:
        require(self.facts >= 2, f"facts must be at least 2, got {self.facts}")
        require(self.length >= 2 and self.length % 2 == 0, f"length is even and at least 2, got {self.length}")

    @property
    def vocab_size(self) -> int:
        """1 + 2 · facts."""
        return 1 + 2 * self.facts

    @property
    def chance(self) -> float:
        """1 / facts."""
        return 1 / self.facts

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Only `length`."""
        return (self.length,)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        table = 1 + self.facts + np.random.default_rng(self.map_seed).permutation(self.facts)
        keys = rng.integers(0, self.facts, (rows, self.length // 2))
        inputs = np.zeros((rows, self.length), dtype=np.int64)
        inputs[:, 0::2] = 1 + keys
        targets = np.zeros_like(inputs)
        targets[:, 1::2] = table[keys]
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, 1::2] = True
        return as_batch(inputs, targets, mask)
