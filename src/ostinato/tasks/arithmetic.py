"""Counting: parity, ones modulo a number, and arithmetic modulo a number.

All need a transition with a negative (or complex) eigenvalue to be solved at every length, so all train on short
sequences and are tested on longer ones. Token 0 begins every sequence, which gives a recurrence from the
zero state its first write, and pads the end.

Source: Grazzi et al. 2024 (arXiv 2411.12537), formal languages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ostinato.tasks.base import Batch, GeneratedTask, as_batch, require
from ostinato.tasks.languages import PrefixLanguage


@dataclass
class Parity(PrefixLanguage):
    """Is the number of ones so far even or odd?

    Tokens: 0 begins and pads, 1 is a zero, 2 is a one; bits are uniform. The answer at a position is
    1 + (number of 2s so far mod 2).
    """

    name: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        """3."""
        return 3

    @property
    def chance(self) -> float:
        """1/2."""
        return 0.5

    def answers(self, word: np.ndarray) -> np.ndarray:
        """The number of ones so far, mod 2."""
        return word.cumsum(1) % 2


@dataclass
class ModularCounting(PrefixLanguage):
    """How many ones so far, modulo a number? `modulus` 2 is parity.

    Tokens: 0 begins and pads, 1 is a zero, 2 is a one; bits are uniform. The answer at a position is
    1 + (number of 2s so far mod modulus).
    """

    name: ClassVar[str] = "modular_counting"

    modulus: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.modulus >= 2, f"modulus must be at least 2, got {self.modulus}")

    @property
    def vocab_size(self) -> int:
        """1 + modulus: an answer needs as many tokens."""
        return 1 + self.modulus

    @property
    def chance(self) -> float:
        """1 / modulus."""
        return 1 / self.modulus

    def answers(self, word: np.ndarray) -> np.ndarray:
        """The number of ones so far, mod the modulus."""
        return word.cumsum(1) % self.modulus


@dataclass
class ModularArithmetic(GeneratedTask):
    """The value of `digit op digit op … digit =` modulo a number, without brackets.

    Tokens: 0 begins and pads, 1 `+`, 2 `−`, 3 `×`, 4 `=`, 5 … are the digits 0 … modulus − 1. `×` binds tighter.
    The answer is asked at `=`. A length counts the tokens of the expression with `=`, so it is even; operators and
    digits are uniform. With `dense` the value so far is asked at every digit as well.
    """

    name: ClassVar[str] = "modular_arithmetic"
    metric: ClassVar[str] = "scaled_accuracy"

    modulus: int = 5
    min_length: int = 4
    max_length: int = 40
    tested_lengths: tuple[int, ...] = (40, 100, 256)
    dense: bool = False

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.modulus >= 2, f"modulus must be at least 2, got {self.modulus}")
        for length in (self.min_length, self.max_length, *self.tested_lengths):
            require(
                length >= 2 and length % 2 == 0,
                f"a length counts digits, operators and '=', so it is even and at least 2; got {length}",
            )
        require(self.min_length <= self.max_length, "modular_arithmetic needs min_length <= max_length")

    @property
    def vocab_size(self) -> int:
        """5 + modulus."""
        return 5 + self.modulus

    @property
    def chance(self) -> float:
        """1 / modulus."""
        return 1 / self.modulus

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + longest)."""
        longest = length or self.max_length
        if length is None:
            digits = rng.integers(self.min_length // 2, self.max_length // 2 + 1, rows)
        else:
            digits = np.full(rows, length // 2)
        number = rng.integers(0, self.modulus, (rows, longest // 2))
        operator = rng.integers(1, 4, (rows, longest // 2))
        value = self._running_values(number, operator)

        inputs = np.zeros((rows, 1 + longest), dtype=np.int64)
        targets = np.zeros_like(inputs)
        mask = np.zeros(inputs.shape, dtype=bool)
        inside = np.arange(longest // 2) < digits[:, None]
        inputs[:, 1::2] = np.where(inside, 5 + number, 0)
        inputs[:, 2::2] = np.where(inside, operator, 0)
        targets[:, 1::2] = np.where(inside, 5 + value, 0)
        if self.dense:
            mask[:, 1::2] = inside
        row = np.arange(rows)
        inputs[row, 2 * digits] = 4
        targets[row, 2 * digits] = 5 + value[row, digits - 1]
        mask[row, 2 * digits] = True
        return as_batch(inputs, targets, mask)

    def _running_values(self, number: np.ndarray, operator: np.ndarray) -> np.ndarray:
        """The value of every prefix that ends in a digit: a sum of finished terms, and the last term."""
        value = np.empty_like(number)
        finished = np.zeros(len(number), dtype=np.int64)
        term = number[:, 0].copy()
        value[:, 0] = term % self.modulus
        for index in range(1, number.shape[1]):
            operation, next_number = operator[:, index - 1], number[:, index]
            times = operation == 3
            finished = np.where(times, finished, (finished + term) % self.modulus)
            sign = np.where(operation == 2, -1, 1)
            term = np.where(times, term * next_number, sign * next_number) % self.modulus
            value[:, index] = (finished + term) % self.modulus
        return value


@dataclass
class ModularArithmeticBrackets(GeneratedTask):
    """The value of an expression with brackets, such as `((3+(−1))−4)=`, modulo a number.

    Tokens: 0 begins and pads, 1 `+`, 2 `−`, 3 `×`, 4 `=`, 5 … the digits 0 … modulus − 1, then `(` and `)`. An
    expression of fewer than 5 tokens is d, −d, (d) or (−d); a longer one is (left op right), the length of `left`
    uniform over what leaves `right` a token, the operator uniform over + and − (and × with `times`). The answer is
    asked at `=`, which the length counts.

    Source: Grazzi et al. 2024 (arXiv 2411.12537), after Delétang et al. 2022 (arXiv 2207.02098).
    """

    name: ClassVar[str] = "modular_arithmetic_brackets"
    metric: ClassVar[str] = "scaled_accuracy"

    modulus: int = 5
    min_length: int = 3
    max_length: int = 40
    tested_lengths: tuple[int, ...] = (40, 100, 256)
    times: bool = False

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.modulus >= 2, f"modulus must be at least 2, got {self.modulus}")
        require(
            2 <= self.min_length <= self.max_length and min(self.tested_lengths, default=2) >= 2,
            "modular_arithmetic_brackets needs 2 <= min_length <= max_length: a digit and '='",
        )

    @property
    def vocab_size(self) -> int:
        """7 + modulus."""
        return 7 + self.modulus

    @property
    def chance(self) -> float:
        """1 / modulus."""
        return 1 / self.modulus

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, 1 + longest)."""
        longest = length or self.max_length
        lengths = rng.integers(self.min_length, self.max_length + 1, rows) if length is None else np.full(rows, length)
        inputs = np.zeros((rows, 1 + longest), dtype=np.int64)
        targets = np.zeros_like(inputs)
        mask = np.zeros(inputs.shape, dtype=bool)
        for row, size in enumerate(lengths.tolist()):
            tokens, value = self._expression(rng.random(size), size - 1)
            inputs[row, 1:size] = tokens
            inputs[row, size] = 4
            targets[row, size] = 5 + value % self.modulus
            mask[row, size] = True
        return as_batch(inputs, targets, mask)

    def _expression(self, draws: np.ndarray, length: int) -> tuple[list[int], int]:
        """The tokens and the value of an expression of `length` tokens, from at least so many numbers in [0, 1)."""
        opened, closed = 5 + self.modulus, 6 + self.modulus
        if length < 5:
            digit = int(draws[0] * self.modulus)
            forms = {1: [5 + digit], 2: [2, 5 + digit], 3: [opened, 5 + digit, closed]}
            return forms.get(length, [opened, 2, 5 + digit, closed]), digit if length % 2 else -digit
        size = 1 + int(draws[0] * (length - 4))
        operator = 1 + int(draws[1] * (3 if self.times else 2))
        left, a = self._expression(draws[2 : 2 + size], size)
        right, b = self._expression(draws[2 + size :], length - size - 3)
        value = {1: a + b, 2: a - b, 3: a * b % self.modulus}[operator]
        return [opened, *left, operator, *right, closed], value
