"""Word problems of finite groups: multiply everything seen so far (Siems et al. 2025, arXiv 2502.10297, section 5).

For S5 the problem is complete for NC¹: no fixed-depth diagonal recurrence and no Transformer solves it at every
length. Which groups a mixer can follow shows what its transitions can express.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import ClassVar

import numpy as np

from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require


@lru_cache(maxsize=16)
def group_table(name: str) -> np.ndarray:
    """The multiplication table of a group, `table[a, b]` = a∘b; element 0 is the identity.

    Names: `S3` … `S6` (all permutations), `A4` … `A6` (the even ones), `Z7` (the integers mod 7), `D4` (the 8
    symmetries of a square), `Q8` (the quaternions ±1, ±i, ±j, ±k), and direct products such as `Z2xS3`. Any other
    finite group is one of permutations (Cayley), and is written by generators in cycles: "(1 2 3)(4 5), (1 2)".
    A product of permutations applies the right one first: (a∘b)(i) = a(b(i)).

    Raises `ConfigurationError` for a name that is none of these or a group of over 1000 elements.
    """
    if "(" in name:
        table = _table_of(generated(_cycles(name)))
        table.setflags(write=False)
        return table
    factors = [_simple_table(part) for part in name.split("x")]
    table = factors[0]
    for other in factors[1:]:
        size = len(other)
        table = (table[:, None, :, None] * size + other[None, :, None, :]).reshape(len(table) * size, -1)
    require(len(table) <= 1000, f"{name} has {len(table)} elements; at most 1000 are supported")
    table.setflags(write=False)
    return table


def _simple_table(name: str) -> np.ndarray:
    match = re.fullmatch(r"([SAZDQ])(\d+)", name)
    if match is None or int(match[2]) < 1 or (match[1] == "Q" and match[2] != "8"):
        raise ConfigurationError(
            f"there is no group {name!r}; groups are S3, A5, Z7, D4, Q8, products such as Z2xS3, and what permutations "
            "generate, such as '(1 2 3)(4 5), (1 2)'"
        )
    kind, n = match[1], int(match[2])
    if kind == "Z":
        require(n <= 1000, f"Z{n} has more than 1000 elements")
        return np.add.outer(np.arange(n), np.arange(n)) % n
    if kind == "D":
        require(2 * n <= 1000, f"D{n} has more than 1000 elements")
        # Element s·n + r turns by r after reflecting s times: reflecting turns the turn around.
        flip, turn = np.divmod(np.arange(2 * n), n)
        product = (turn[:, None] + np.where(flip[:, None] == 1, -1, 1) * turn) % n
        return ((flip[:, None] + flip) % 2) * n + product
    if kind == "Q":
        return _quaternions()
    require(n <= 6, f"{name} has more than 1000 elements")
    return _table_of([p for p in permutations(range(n)) if kind == "S" or _is_even(p)])


def _table_of(elements: list[tuple[int, ...]]) -> np.ndarray:
    """The table of permutations that form a group, in their order."""
    number = {p: index for index, p in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


def _quaternions() -> np.ndarray:
    """Elements 2u + s: the unit u of 1, i, j, k, with the sign (−1)^s."""
    # unit[a, b] and sign[a, b] of the product of the units a and b.
    unit = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
    sign = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]])
    u, s = np.divmod(np.arange(8), 2)
    return 2 * unit[u[:, None], u] + (s[:, None] + s + sign[u[:, None], u]) % 2


def _cycles(text: str) -> list[tuple[int, ...]]:
    """Permutations in cycle notation, "(1 2 3)(4 5), (1 2)": what is not named stays."""
    pattern = r"(\(\s*\d+(\s+\d+)*\s*\)\s*)+"
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if re.fullmatch(pattern, part) is None:
            raise ConfigurationError(f"a permutation is written in cycles, such as (1 2 3)(4 5); got {part!r}")
    names = sorted({int(number) for number in re.findall(r"\d+", text)})
    place = {name: index for index, name in enumerate(names)}
    found = []
    for part in parts:
        image = list(range(len(names)))
        cycles = [[place[int(number)] for number in re.findall(r"\d+", c)] for c in re.findall(r"\(([^)]*)\)", part)]
        moved = [i for cycle in cycles for i in cycle]
        require(len(set(moved)) == len(moved), f"the cycles of one permutation share nothing; got {part!r}")
        for cycle in cycles:
            for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                image[here] = there
        found.append(tuple(image))
    return found


def generated(generators: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All products of some permutations, the identity first; raises `ConfigurationError` for over 1000 of them."""
    identity = tuple(range(len(generators[0])))
    found, known = [identity], {identity}
    for element in found:  # grows while it is read
        for generator in generators:
            product = tuple(generator[i] for i in element)
            if product not in known:
                require(len(found) < 1000, "these permutations generate more than 1000 elements")
                known.add(product)
                found.append(product)
    return found


def _is_even(permutation: tuple[int, ...]) -> bool:
    n = len(permutation)
    return sum(permutation[i] > permutation[j] for i in range(n) for j in range(i + 1, n)) % 2 == 0


@dataclass
class WordProblem(GeneratedTask):
    """Elements x_1 … x_T, uniform; the answer at every t is x_1 ∘ … ∘ x_t.

    Token 0 begins each sequence, element g is token g + 1. Every position but the first is scored. The metric is
    the share of sequences with all of y_1 … y_T right.

    Three variants, of the same paper, can be combined: words of swaps, rests between the elements, and tokens to
    think in.
    """

    name: ClassVar[str] = "word_problem"
    metric: ClassVar[str] = "sequence_accuracy"

    group: str = "S3"
    length: int = 32
    """Elements in a training sequence."""
    tested_lengths: tuple[int, ...] = (32, 64, 128)
    letters: str = "all"
    """"all" elements, or "swaps": those of a symmetric group that exchange two things, and the identity."""
    every: int = 1
    """Only the first of each `every` elements is drawn, the others are the identity; the answer at t is then the
    product up to t − (every − 1)."""
    thinking: int = 0
    """Tokens `order + 1` after each element; its answer is asked at the last of them."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.length >= 1, f"length must be positive, got {self.length}")
        require(len(group_table(self.group)) >= 2, f"the group {self.group} has one element: nothing to learn")
        require(self.letters in ("all", "swaps"), f"letters is 'all' or 'swaps', got {self.letters!r}")
        swaps_make_sense = self.letters == "all" or re.fullmatch(r"S[2-6]", self.group) is not None
        require(swaps_make_sense, f"swaps are elements of S2 … S6, not of {self.group}")
        require(self.every >= 1, f"every must be positive, got {self.every}")
        require(self.thinking >= 0, f"thinking must not be negative, got {self.thinking}")

    @property
    def order(self) -> int:
        """How many elements the group has."""
        return len(group_table(self.group))

    @property
    def vocab_size(self) -> int:
        """order + 1, and one more if there are tokens to think in."""
        return self.order + 1 + (self.thinking > 0)

    @property
    def chance(self) -> float:
        """1 / order."""
        return 1 / self.order

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def alphabet(self) -> np.ndarray:
        """The elements that words are drawn from."""
        if self.letters == "all":
            return np.arange(self.order)
        elements = permutations(range(int(self.group[1:])))
        return np.array([g for g, p in enumerate(elements) if sum(i != a for i, a in enumerate(p)) in (0, 2)])

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + length · (1 + thinking))."""
        length = length or self.length
        table, letters = group_table(self.group), self.alphabet()
        word = letters[rng.integers(0, len(letters), (rows, length))]
        word[:, np.arange(length) % self.every > 0] = 0
        answers = np.zeros_like(word)
        product = np.zeros(rows, dtype=np.int64)
        for t in range(length):
            late = t - (self.every - 1)
            if late >= 0:
                product = table[product, word[:, late]]
            answers[:, t] = product
        width = 1 + self.thinking
        inputs = np.zeros((rows, 1 + length * width), dtype=np.int64)
        targets = np.zeros_like(inputs)
        mask = np.zeros(inputs.shape, dtype=bool)
        inputs[:, 1:] = self.order + 1
        inputs[:, 1::width] = word + 1
        targets[:, width::width] = answers + 1
        mask[:, width::width] = True
        return as_batch(inputs, targets, mask)
