"""SelectivBench: follow the hidden states of a random artificial grammar past gaps, noise and wrong symbols.

The visible symbol is ambiguous: a letter stands for many states (its instances), and the model names the state that
the walk is in, at every step. What it must remember is one state; what it must ignore comes between the symbols.

    task = ostinato.task("selectivbench", variant="T2", letters=8, depth=8, length=60, gap=(1, 5))

Source: SelectivBench (arXiv 2601.12598), sections on the grammar and the tasks, and the authors' generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, Tally, require

_TRAIN, _TEST = 0, 1

NONE, ZERO, WRONG = "none", "zero", "wrong"


class Variant(NamedTuple):
    """What a variant puts between the elements, where the options do not say otherwise."""

    filler: str
    """`zero`: vectors of zeros after every element; `wrong`: ungrammatical symbols after some."""
    gap: tuple[int, int]
    """Fewest and most steps between two elements (for `wrong`: where there are any)."""
    noise: float
    """η: U(0, η) is added to every component of every input."""
    tested_gaps: tuple[int, ...] = ()
    """Fixed gaps of the test set; none: the test has the gaps of training."""


VARIANTS = {
    "T1": Variant(ZERO, (1, 1), 0.0),
    "T2": Variant(ZERO, (1, 10), 0.2),
    "T3": Variant(WRONG, (1, 1), 0.0),
    "T4": Variant(ZERO, (1, 10), 0.2, (10, 20, 50, 100)),
}


class Grammar(NamedTuple):
    """A random partial deterministic automaton that emits the symbol of the state it enters.

    State 0 is the end, "#", and symbol 0; instance i of letter a is state 1 + a · depth + i, and its symbol is 1 + a.
    """

    letters: int
    depth: int
    table: Int[np.ndarray, "states symbols"]
    """The state that follows a state on a symbol, −1 where there is no edge. The end has none."""
    starts: Int[np.ndarray, " starts"]
    """Where strings begin, with equal probability."""

    @property
    def states(self) -> int:
        """letters · depth + 1."""
        return len(self.table)

    @property
    def symbols(self) -> int:
        """letters + 1."""
        return self.letters + 1

    def symbol(self, state: np.ndarray) -> np.ndarray:
        """What a state shows."""
        return np.where(state == 0, 0, 1 + (state - 1) // self.depth)

    def possible(self) -> Bool[np.ndarray, "states symbols"]:
        """Which symbols can come after a state; after the end, those that strings begin with."""
        possible = self.table >= 0
        possible[0, self.symbol(self.starts)] = True
        return possible


@lru_cache(maxsize=64)
def make_grammar(letters: int, depth: int, starts: int = 4, density: float = 0.4, seed: int = 0) -> Grammar:
    """Draw a grammar.

    For each state but the end and each symbol: one instance of the symbol is picked, uniformly, and with probability
    `density` (for the end: density / depth) it follows the state. The whole is drawn again while the end is among the
    starts, or a state has no path to the end.

    Args:
        letters: n, how many letters there are.
        depth: D, the instances of each.
        starts: different start states.
        density: ρ.
        seed: of the draw.

    Raises:
        ConfigurationError: sizes that make no grammar, or none found in 10 000 draws.
    """
    require(letters >= 1 and depth >= 1, f"a grammar needs letters and instances, got {letters} and {depth}")
    require(1 <= starts <= letters * depth, f"starts must be between 1 and {letters * depth}, got {starts}")
    require(0 < density <= 1, f"density is a probability above 0, got {density}")
    rng = np.random.default_rng([seed, letters, depth])
    states = letters * depth + 1
    first = 1 + np.arange(letters) * depth
    for _ in range(10_000):
        table = np.full((states, letters + 1), -1)
        instance = rng.integers(0, depth, (states, letters))
        edge = rng.random((states, letters + 1)) < np.array([density / depth] + [density] * letters)
        table[:, 1:] = first + instance
        table[:, 0] = 0
        table[~edge] = -1
        table[0] = -1
        chosen = rng.choice(states, starts, replace=False)
        if 0 not in chosen and bool(reaches_end(table).all()):
            table.setflags(write=False)
            return Grammar(letters, depth, table, np.sort(chosen))
    require(False, f"no grammar of density {density} with a path to the end from every state in 10000 draws; raise it")
    raise AssertionError


def reaches_end(table: Int[np.ndarray, "states symbols"]) -> Bool[np.ndarray, " states"]:
    """Which states have a path to the end."""
    reached = np.zeros(len(table) + 1, dtype=bool)  # the last stands for "no edge", −1
    reached[0] = True
    while True:
        more = reached[:-1] | reached[table].any(1)
        if (more == reached[:-1]).all():
            return more
        reached[:-1] = more


def sample_sequences(
    grammar: Grammar, rows: int, length: int = 200, *, rng: np.random.Generator, longest: int = 200
) -> Int[np.ndarray, "rows length"]:
    """Hidden states of strings one after another, cut to `length`.

    A string starts in a uniform start state and walks along uniform edges to the end, which it keeps; strings of over
    `longest` states are thrown away. Many walks are made at a time.

    Raises `ConfigurationError` if next to no string is short enough.
    """
    degree = (grammar.table >= 0).sum(1)
    successors = np.sort(grammar.table, axis=1)[:, ::-1]  # those that are there come first
    out = np.zeros((rows, length), dtype=np.int64)
    row, filled, tried, kept = 0, 0, 0, 0
    while row < rows:
        walks = int(np.clip(2 * (rows - row) * max(1, length // 32) * (tried + 64) / (kept + 64), 64, 1 << 14))
        states = np.zeros((walks, longest), dtype=np.int64)
        states[:, 0] = grammar.starts[rng.integers(0, len(grammar.starts), walks)]
        going = np.arange(walks)
        for t in range(1, longest):
            here = states[going, t - 1]
            states[going, t] = successors[here, (rng.random(len(going)) * degree[here]).astype(np.int64)]
            going = going[states[going, t] != 0]
            if not len(going):
                break
        lengths = (states != 0).sum(1) + 1
        lengths[going] = 0  # still on their way
        tried, kept = tried + walks, kept + int((lengths > 0).sum())
        require(kept * 10_000 >= tried, f"of {tried} strings {kept} have at most {longest} symbols; raise `longest`")
        for walk in np.flatnonzero(lengths):
            part = states[walk, : min(lengths[walk], length - filled)]
            out[row, filled : filled + len(part)] = part
            filled += len(part)
            if filled == length:
                row, filled = row + 1, 0
                if row == rows:
                    break
    return out


@dataclass(kw_only=True)
class SelectivBench(GeneratedTask):
    """Vectors: one-hot symbols of a hidden walk with gaps and noise between; every step asks for the walk's state.

    `T1`: a vector of zeros after each symbol. `T2`: gaps of random length, and noise. `T3`: now and then a symbol that
    the grammar forbids there, and no other gaps. `T4`: trained as T2, tested at fixed gaps. The metric counts elements
    (a symbol with its gap): softmax outputs are summed over the element, and the largest sum names the state.

    Gaps and noise come from the same stream as the walks, which training and test do not share. (In the authors'
    release sample i is seeded by seed × i for both, so that their test sequences are also training sequences.)
    """

    name: ClassVar[str] = "selectivbench"
    reads_vectors: ClassVar[bool] = True

    variant: str = "T1"
    letters: int = 8
    """n; the paper has 20 to 40."""
    depth: int | None = None
    """D, instances of a letter; None takes as many as letters."""
    length: int = 60
    """Elements of a sequence; the paper has 200."""
    starts: int = 4
    density: float = 0.4
    gap: tuple[int, int] | None = None
    """Fewest and most steps in a gap (U(fewest, most), rounded); None takes the variant's."""
    noise: float | None = None
    """η; None takes the variant's."""
    wrong_from: int | None = None
    """T3: the first element that a wrong symbol can follow; None is a quarter of the length."""
    wrong_probability: float = 0.1
    """T3: how likely it follows."""
    tested_gaps: tuple[int, ...] | None = None
    """Fixed gaps of the test set, each a split of its own; None takes the variant's."""
    grammar_seed: int = 0

    def __post_init__(self) -> None:
        require(self.variant in VARIANTS, f"variant is one of {', '.join(VARIANTS)}, got {self.variant!r}")
        standard = VARIANTS[self.variant]
        self.depth = self.letters if self.depth is None else self.depth
        gap = tuple(standard.gap if self.gap is None else self.gap)
        require(len(gap) == 2 and 0 <= gap[0] <= gap[1], f"gap is (fewest, most) steps, got {gap}")
        self.gap = gap[0], gap[1]
        self.noise = standard.noise if self.noise is None else self.noise
        self.wrong_from = self.length // 4 if self.wrong_from is None else self.wrong_from
        self.tested_gaps = tuple(standard.tested_gaps if self.tested_gaps is None else self.tested_gaps)
        require(self.length >= 1, f"length must be positive, got {self.length}")
        require(0 <= self.noise < 1, f"noise must be in [0, 1), below the symbol's own 1, got {self.noise}")
        require(0 <= self.wrong_probability <= 1, f"wrong_probability must be in [0, 1], got {self.wrong_probability}")
        require(min(self.tested_gaps, default=0) >= 0, f"tested_gaps are numbers of steps, got {self.tested_gaps}")
        require(
            not (self.tested_gaps and standard.filler == WRONG),
            "tested_gaps are gaps of zeros; T3 has wrong symbols: leave them out",
        )

    @property
    def grammar(self) -> Grammar:
        """The grammar; raises `ConfigurationError` as `make_grammar` does."""
        assert self.depth is not None
        return make_grammar(self.letters, self.depth, self.starts, self.density, self.grammar_seed)

    @property
    def vocab_size(self) -> int:
        """letters + 1, the width of the input vectors."""
        return self.letters + 1

    @property
    def num_classes(self) -> int:
        """letters · depth + 1 hidden states."""
        assert self.depth is not None
        return self.letters * self.depth + 1

    @property
    def chance(self) -> float:
        """1 / states."""
        return 1 / self.num_classes

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`length` alone: test sets differ in their gaps."""
        return (self.length,)

    def generate(
        self, rng: np.random.Generator, rows: int, length: int | None = None, *, gap: int | None = None
    ) -> Batch:
        """Sequences of `length` elements with gaps drawn as in training, or all of `gap` zeros; padded at their ends.

        `inputs` (rows, time, letters + 1) float32; `begins` marks the first step of each element, `mask` is False in
        the padding.
        """
        assert self.gap is not None and self.noise is not None and self.wrong_from is not None
        length = length or self.length
        grammar = self.grammar
        states = sample_sequences(grammar, rows, length, rng=rng)
        filler = VARIANTS[self.variant].filler if gap is None else ZERO
        low, high = self.gap if gap is None else (gap, gap)
        # As the authors draw them: uniform, then rounded, so that the ends are half as likely as the rest.
        gaps = np.rint(rng.uniform(low, high, states.shape)).astype(np.int64)
        forbidden: np.ndarray = ~grammar.possible()
        if filler == WRONG:
            wrong = (rng.random(states.shape) < self.wrong_probability) & (forbidden.sum(axis=1) > 0)[states]
            wrong[:, : self.wrong_from] = False
            gaps = np.where(wrong, gaps, 0)
        time = int((1 + gaps).sum(1).max())
        begins = np.zeros((rows, time), dtype=bool)
        np.put_along_axis(begins, np.cumsum(1 + gaps, axis=1) - 1 - gaps, True, axis=1)
        element = np.cumsum(begins, axis=1) - 1
        mask = np.arange(time) < (1 + gaps).sum(1, keepdims=True)
        targets = np.take_along_axis(states, element, axis=1)
        shown = grammar.symbol(targets)
        seen = begins
        if filler == WRONG:
            # Uniform among the forbidden symbols: the largest of as many random numbers.
            gap_steps = mask & ~begins
            draw = rng.random((int(gap_steps.sum()), grammar.symbols))
            shown[gap_steps] = np.where(forbidden[targets[gap_steps]], draw, -1).argmax(1)
            seen = mask
        inputs = np.zeros((rows, time, grammar.symbols), dtype=np.float32)
        np.put_along_axis(inputs, shown[..., None], seen[..., None].astype(np.float32), axis=2)
        if self.noise:
            inputs += rng.random(inputs.shape, dtype=np.float32) * np.float32(self.noise) * mask[..., None]
        targets[~mask] = 0
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(mask),
            begins=torch.from_numpy(begins),
        )

    def test_batches(self) -> Iterator[Batch]:
        """`test_size` sequences in batches of at most 64; the same walks at each fixed gap, where there are any."""
        for gap in self.tested_gaps or (None,):
            for start in range(0, self.test_size, 64):
                rng = np.random.default_rng([_TEST, self.seed, start])
                batch = self.generate(rng, min(64, self.test_size - start), gap=gap)
                yield batch if gap is None else batch._replace(split=f"gap {gap}")

    def score(self, logits: Float[Tensor, "batch time classes"], batch: Batch) -> dict[str, Tally]:
        """`accuracy` over elements, `step_accuracy` over steps, `loss` (nats a step)."""
        assert batch.begins is not None
        count = float(batch.mask.sum())
        right = ((logits.argmax(-1) == batch.targets) & batch.mask).sum()
        return {
            "accuracy": element_accuracy(logits, batch.targets, batch.begins, batch.mask),
            "step_accuracy": (float(right), count),
            "loss": (self.loss(logits, batch).item() * count, count),
        }

    def baselines(self) -> Metrics:
        """Tables of the likeliest state, counted on 256 training sequences, and the filter that knows the grammar.

        All are told which steps are gaps. `unigram` reads the present symbol, `bigram` also the one before.
        """
        train = sample_sequences(self.grammar, 256, self.length, rng=np.random.default_rng([_TRAIN, self.seed, 0]))
        rng = np.random.default_rng([_TEST, self.seed, 0])
        test = sample_sequences(self.grammar, self.test_size, self.length, rng=rng)
        return {
            "unigram table": table_accuracy(self.grammar, train, test, 1),
            "bigram table": table_accuracy(self.grammar, train, test, 2),
            "filter that knows the grammar": filter_accuracy(self.grammar, test),
        }


def element_accuracy(
    logits: Float[Tensor, "batch time classes"],
    targets: Int[Tensor, "batch time"],
    begins: Bool[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Tally:
    """How many elements are named right, and how many there are.

    Softmax outputs are summed over the steps from one `begins` to the next (padding aside); the largest sum decides.
    """
    probabilities = logits.float().softmax(-1) * mask.unsqueeze(-1)
    element = begins.long().cumsum(1) - 1
    element = element + torch.arange(len(logits), device=logits.device).unsqueeze(1) * logits.shape[1]
    sums = probabilities.new_zeros(logits.shape[0] * logits.shape[1], logits.shape[2])
    sums.index_add_(0, element.flatten(), probabilities.flatten(0, 1))
    named = sums.argmax(-1)[element]
    return float(((named == targets) & begins).sum()), float(begins.sum())


def table_accuracy(grammar: Grammar, train: np.ndarray, test: np.ndarray, order: int) -> float:
    """The share of states that a table of the last `order` symbols names, with counts of `train`.

    The first symbols of a sequence are read after end symbols. A context that training lacks has the state 0.
    """
    context, held_out = (_contexts(grammar.symbol(states), order, grammar.symbols) for states in (train, test))
    counts = np.zeros((grammar.symbols**order, grammar.states), dtype=np.int64)
    np.add.at(counts, (context, train), 1)
    return float((counts.argmax(1)[held_out] == test).mean())


def _contexts(symbols: np.ndarray, order: int, base: int) -> np.ndarray:
    padded = np.pad(symbols, ((0, 0), (order - 1, 0)))
    number = np.zeros_like(symbols)
    for offset in range(order):
        number = number * base + padded[:, offset : offset + symbols.shape[1]]
    return number


def filter_accuracy(grammar: Grammar, states: np.ndarray) -> float:
    """The share of states that the likeliest walk names, given the visible symbols so far and the grammar.

    After its start a string is a function of its symbols: only starts with the same letter can be confused. What
    any model can reach on average.
    """
    degree = np.maximum((grammar.table >= 0).sum(1), 1)
    symbols = grammar.symbol(states)
    rows = len(states)
    place = np.zeros((rows, len(grammar.starts)), dtype=np.int64)
    weight = np.zeros(place.shape)
    right = 0
    for t in range(states.shape[1]):
        anew = (symbols[:, t - 1] == 0)[:, None] if t else np.ones((rows, 1), dtype=bool)
        onward = grammar.table[place, symbols[:, t, None]]
        fits = np.where(anew, grammar.symbol(grammar.starts) == symbols[:, t, None], (onward >= 0) & (weight > 0))
        weight = np.where(fits, np.where(anew, 1.0, weight / degree[place]), 0.0)
        place = np.where(anew, grammar.starts, np.where(onward >= 0, onward, 0))
        # Walks that have met count together.
        together = (weight[:, None, :] * (place[:, None, :] == place[:, :, None])).sum(2) * (weight > 0)
        best = together.argmax(1)
        right += int((place[np.arange(rows), best] == states[:, t]).sum())
        weight = weight / np.maximum(weight.max(1, keepdims=True), 1e-300)
    return right / states.size
