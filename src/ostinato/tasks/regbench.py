"""RegBench: a language is learned in context, from words that a random probabilistic automaton has made.

A sequence holds the words of one automaton, and no two sequences have the same one: what can follow can only be told
from the words before. Scored is every symbol but a word's end, which depends on nothing.

Source: Akyürek et al. 2024, In-Context Language Learning (arXiv 2401.12973), section 3, and the authors' generator
with its ranges (it leaves upper bounds out). It also minimises the automata and sorts out equal ones: the first changes
no word's probability, the second hardly ever happens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, Tally, as_batch, require

_PAD, _SEPARATOR, _FIRST_SYMBOL = 0, 1, 2


class Automata(NamedTuple):
    """One automaton a row; every word begins in state 0, may end anywhere, and takes each edge of a state alike."""

    edges: Int[np.ndarray, "rows states"]
    """How many lead out of a state."""
    symbols: Int[np.ndarray, "rows states most_edges"]
    """What an edge writes, all different within a state; meaningless from `edges` on."""
    following: Int[np.ndarray, "rows states most_edges"]
    """Where it leads: to different states, none to its own."""


@dataclass
class RegBench(GeneratedTask):
    """The next symbol of words whose automaton must be told from the words before, in the same sequence.

    An automaton has 4 … 12 states, 4 … `symbols` symbols, and in each state 1 … `most_edges` edges that write different
    symbols and lead to different other states. A sequence is 10 … 19 words of 1 … 49 symbols with a separator in
    between, cut at `length`, or filled up. Tokens: 0 fills up, 1 separates, 2 … are the symbols.

    `valid_accuracy` is RegBench's measure, for sequences of the test set: predictions that the automaton allows,
    what was drawn or not. `accuracy` asks for what was drawn, which nothing predicts surely.
    """

    name: ClassVar[str] = "regbench"
    metric: ClassVar[str] = "valid_accuracy"

    symbols: int = 18
    fewest_symbols: int = 4
    """Of one automaton."""
    fewest_states: int = 4
    most_states: int = 12
    most_edges: int = 3
    fewest_words: int = 10
    most_words: int = 19
    longest_word: int = 49
    length: int = 512

    def __post_init__(self) -> None:
        for low, high in (
            ("fewest_symbols", "symbols"),
            ("fewest_states", "most_states"),
            ("fewest_words", "most_words"),
        ):
            few, most = getattr(self, low), getattr(self, high)
            require(1 <= few <= most, f"{low} lies in 1 … {high}={most}, got {few}")
        most = min(self.fewest_symbols, self.fewest_states - 1)
        require(
            1 <= self.most_edges <= most,
            f"most_edges lies in 1 … {most}: edges write different symbols and lead to "
            f"different other states; got {self.most_edges}",
        )
        require(self.longest_word >= 2, f"longest_word must be at least 2, got {self.longest_word}")
        require(self.length >= 4, f"length must be at least 4, got {self.length}")
        self._allowed: dict[bytes, np.ndarray] = {}

    @property
    def vocab_size(self) -> int:
        """symbols + 2."""
        return self.symbols + 2

    @property
    def chance(self) -> float:
        """1 / symbols."""
        return 1 / self.symbols

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Only `length`."""
        return (self.length,)

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length)."""
        automata = self.automata(rng, rows)
        tokens, states = self._written(rng, automata)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = targets >= _FIRST_SYMBOL
        if length is not None:
            for row, allowed in zip(inputs, self._sets(automata, states[:, 1:]), strict=True):
                self._allowed[row.tobytes()] = allowed
        return as_batch(inputs, np.where(mask, targets, 0), mask)

    def automata(self, rng: np.random.Generator, rows: int) -> Automata:
        """One random automaton for each row."""
        most = self.most_states
        states = rng.integers(self.fewest_states, most + 1, (rows, 1, 1))
        size = rng.integers(self.fewest_symbols, self.symbols + 1, (rows, 1))
        alphabet = rng.random((rows, self.symbols)).argsort(1).argsort(1) < size
        edges = rng.integers(1, self.most_edges + 1, (rows, most))
        # Different ones by sorting noise; what is not to be had comes last.
        noise = rng.random((rows, most, self.symbols)) + ~alphabet[:, None]
        symbols = noise.argsort(2)[:, :, : self.most_edges]
        barred = np.eye(most, dtype=bool) | (np.arange(most) >= states)
        following = (rng.random((rows, most, most)) + barred).argsort(2)[:, :, : self.most_edges]
        return Automata(edges, symbols, following)

    def _written(self, rng: np.random.Generator, automata: Automata) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (rows, length + 1), and the states that the automaton was in before each."""
        rows, words = len(automata.edges), self.most_words
        count = rng.integers(self.fewest_words, words + 1, (rows, 1))
        sizes = rng.integers(1, self.longest_word + 1, (rows, words)) * (np.arange(words) < count)
        row = np.arange(rows)[:, None]
        state = np.zeros((rows, words), dtype=np.int64)
        written = np.full((rows, words, self.longest_word + 1), _PAD)
        passed = np.zeros_like(written)
        for t in range(self.longest_word):
            edge = (rng.random((rows, words)) * automata.edges[row, state]).astype(np.int64)
            passed[:, :, t] = state
            written[:, :, t] = _FIRST_SYMBOL + automata.symbols[row, state, edge]
            state = automata.following[row, state, edge]
        place = np.arange(self.longest_word + 1)
        np.copyto(written, _SEPARATOR, where=place == sizes[:, :, None])
        # All words of a row side by side. None follows the last one, whose separator falls away.
        starts = np.cumsum(sizes + 1, axis=1) - sizes - 1
        at = starts[:, :, None] + place
        end = np.cumsum(sizes + 1, axis=1)[row, count - 1] - 1
        at = np.where((place <= sizes[:, :, None]) & (at < end[:, :, None]), at, self.length + 1).clip(
            max=self.length + 1
        )
        tokens, states = (np.full((rows, self.length + 2), _PAD) for _ in range(2))
        np.put_along_axis(tokens, at.reshape(rows, -1), written.reshape(rows, -1), axis=1)
        np.put_along_axis(states, at.reshape(rows, -1), passed.reshape(rows, -1), axis=1)
        return tokens[:, :-1], states[:, :-1]

    def _sets(self, automata: Automata, states: np.ndarray) -> Bool[np.ndarray, "rows length vocab"]:
        """Which tokens can follow in a state."""
        sets = np.zeros((*automata.edges.shape, self.vocab_size), dtype=bool)
        there = np.arange(self.most_edges) < automata.edges[:, :, None]
        row, state, edge = np.nonzero(there)
        sets[row, state, _FIRST_SYMBOL + automata.symbols[row, state, edge]] = True
        return sets[np.arange(len(states))[:, None], states]

    def allowed(self, batch: Batch) -> Bool[np.ndarray, "batch time vocab"] | None:
        """Which tokens each next symbol could have been; None for sequences that are not of the test set."""
        rows = [row.tobytes() for row in batch.inputs.cpu().numpy()]
        if any(row not in self._allowed for row in rows):
            for _ in self.test_batches():  # As they are drawn, their sets are noted.
                pass
        if any(row not in self._allowed for row in rows):
            return None
        return np.stack([self._allowed[row] for row in rows])

    def score(self, logits: Float[Tensor, "batch time classes"], batch: Batch) -> dict[str, Tally]:
        """The tallies of every task, and of test sequences `valid_accuracy`."""
        scores = super().score(logits, batch)
        allowed = self.allowed(batch)
        if allowed is not None:
            said = logits.argmax(-1).cpu().numpy()
            scores["valid_accuracy"] = _valid(said, allowed, batch.mask.cpu().numpy())
        return scores

    def baselines(self) -> Metrics:
        """Measured: a constant, a guess among all symbols, n-grams of the same sequence, and who knows the automaton.

        The n-gram counts what followed the last one or two tokens of the same word, and says what did most often; where
        nothing did, one token fewer is looked at.
        """
        totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        for batch in self.test_batches():
            allowed = self.allowed(batch)
            assert allowed is not None
            mask = batch.mask.numpy()
            totals["uniform"] += np.array([allowed[mask].mean(1).sum() * self.vocab_size / self.symbols, mask.sum()])
            for name, order in (("bigram", 1), ("trigram", 2)):
                said = np.array([list(_counted(row, order)) for row in batch.inputs.tolist()])
                totals[name] += np.array(_valid(said, allowed, mask))
        found = {name: float(right / count) for name, (right, count) in totals.items()}
        return {**super().baselines(), **found, "automaton": 1.0}

    def least_loss(self) -> float:
        """The cross-entropy, in nats, of who knows the automaton: the mean logarithm of how many symbols can follow."""
        total, count = 0.0, 0
        for batch in self.test_batches():
            allowed, mask = self.allowed(batch), batch.mask.numpy()
            assert allowed is not None
            total, count = total + float(np.log(allowed[mask].sum(1)).sum()), count + int(mask.sum())
        return total / count


def _valid(said: np.ndarray, allowed: np.ndarray, mask: np.ndarray) -> Tally:
    """How many of the tokens said are allowed, of how many."""
    right = np.take_along_axis(allowed, said[:, :, None], axis=2)[:, :, 0]
    return float((right & mask).sum()), float(mask.sum())


def _counted(tokens: list[int], order: int) -> Iterator[int]:
    """After each token, what followed the last `order` tokens most often so far; of equals the first seen."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    context: tuple[int, ...] = ()
    for token in tokens:
        if token >= _FIRST_SYMBOL:
            for start in range(len(context) + 1):
                counts[context[start:]][token] += 1
        # A word begins anew: what stood before the separator says nothing.
        context = (token,) if token < _FIRST_SYMBOL else (*context, token)[-order:]
        seen = (counts[context[start:]] for start in range(len(context) + 1) if context[start:] in counts)
        yield next((found.most_common(1)[0][0] for found in seen), _FIRST_SYMBOL)
