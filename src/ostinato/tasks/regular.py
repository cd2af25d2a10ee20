"""Regular languages by their automata: is the prefix read so far in the language?

The seven grammars of Tomita, and the star-free and periodic ones on which recurrences differ: a language that never
counts (star-free) is within reach of positive real transitions, one that counts modulo a number is not.

Sources: Tomita 1982, as listed in Bhattamishra et al. 2020 (arXiv 2009.11264), appendix B (Tomita grammars, (aa)*,
(abab)*, D_n); Sarrof et al. 2024 (arXiv 2405.17394) for state-space models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ostinato.errors import UnknownNameError
from ostinato.tasks.base import require
from ostinato.tasks.languages import PrefixLanguage


class Automaton(NamedTuple):
    """A complete deterministic automaton over the symbols 0 and 1; state 0 is where it begins."""

    table: np.ndarray
    """`table[state, symbol]` is the next state."""
    accepts: np.ndarray
    """Whether a word may end in a state."""

    def run(self, word: np.ndarray) -> np.ndarray:
        """The states after every prefix of words (rows, length)."""
        states = np.empty_like(word)
        state = np.zeros(len(word), dtype=np.int64)
        for t in range(word.shape[1]):
            state = self.table[state, word[:, t]]
            states[:, t] = state
        return states

    def alive(self) -> np.ndarray:
        """Which states have a path to one that accepts."""
        alive = self.accepts.copy()
        while True:
            more = alive | alive[self.table].any(1)
            if (more == alive).all():
                return alive
            alive = more


def _automaton(rows: Sequence[tuple[int, int]], accepts: Sequence[int]) -> Automaton:
    table = np.array(rows)
    found = np.zeros(len(table), dtype=bool)
    found[list(accepts)] = True
    table.setflags(write=False)
    found.setflags(write=False)
    return Automaton(table, found)


def _bounded_brackets(depth: int) -> Automaton:
    """D_n = (0 D_{n−1} 1)*, brackets of one kind at most n deep: 0 opens, 1 closes. The last state is dead."""
    dead = depth + 1
    rows = [(d + 1 if d < depth else dead, d - 1 if d else dead) for d in range(depth + 1)]
    return _automaton([*rows, (dead, dead)], [0])


@lru_cache(maxsize=1)
def automata() -> dict[str, Automaton]:
    """The languages by name. Symbols are 0 and 1; the letters a and b of the literature are 0 and 1 too."""
    return {
        # 1*
        "tomita1": _automaton([(1, 0), (1, 1)], [0]),
        # (10)*
        "tomita2": _automaton([(2, 1), (0, 2), (2, 2)], [0]),
        # After an odd run of 1s, no odd run of 0s, at once or later. State 0: no odd run of 1s yet; 1: in one that is
        # odd so far; 2: there was one, and a run of 0s is odd so far; 3: there was one, and all is well; 4: dead.
        "tomita3": _automaton([(0, 1), (2, 0), (3, 4), (2, 3), (4, 4)], [0, 1, 3]),
        # No 000.
        "tomita4": _automaton([(1, 0), (2, 0), (3, 0), (3, 3)], [0, 1, 2]),
        # An even number of 0s and of 1s: state 2 (zeros mod 2) + (ones mod 2).
        "tomita5": _automaton([(2, 1), (3, 0), (0, 3), (1, 2)], [0]),
        # The number of 0s minus that of 1s is divisible by 3.
        "tomita6": _automaton([(1, 2), (2, 0), (0, 1)], [0]),
        # 0*1*0*1*
        "tomita7": _automaton([(0, 1), (2, 1), (2, 3), (4, 3), (4, 4)], [0, 1, 2, 3]),
        # The number of symbols is even; is divisible by 4. Both symbols are the letter a.
        "aa": _automaton([(1, 1), (0, 0)], [0]),
        "aaaa": _automaton([(1, 1), (2, 2), (3, 3), (0, 0)], [0]),
        # (0101)*
        "abab": _automaton([(1, 4), (4, 2), (3, 4), (4, 0), (4, 4)], [0]),
        "D2": _bounded_brackets(2),
        "D4": _bounded_brackets(4),
        "D12": _bounded_brackets(12),
    }


LANGUAGES = tuple(automata())


@dataclass
class RegularLanguage(PrefixLanguage):
    """Is the word so far in the language? The answer is 1 if not, 2 if so.

    Tokens: 0 begins and pads, 1 and 2 are the symbols 0 and 1. A uniform word would soon leave most languages for
    ever. So symbols are uniform among those after which a word of the language can still follow, except that a share
    `slip` of the words take a wrong one, where there is one, once: at a uniform step or the first chance after it.
    """

    name: ClassVar[str] = "regular_language"

    language: str = "tomita5"
    slip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language not in LANGUAGES:
            raise UnknownNameError("regular language", self.language, LANGUAGES)
        require(0 <= self.slip <= 1, f"slip is a share of the words, got {self.slip}")

    @property
    def automaton(self) -> Automaton:
        """That of the language."""
        return automata()[self.language]

    @property
    def vocab_size(self) -> int:
        """3."""
        return 3

    @property
    def chance(self) -> float:
        """1/2."""
        return 0.5

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """Words that stay alive, but for slips."""
        table, _ = self.automaton
        good = self.automaton.alive()[table]
        # The probability of a 1 in each state, for those who are careful and for those who slip.
        both = good[:, 0] == good[:, 1]
        careful, slipping = (np.where(both, 0.5, one) for one in (good[:, 1], good[:, 0]))
        when = np.where(rng.random(rows) < self.slip, rng.integers(0, length, rows), length)
        word = np.empty((rows, length), dtype=np.int64)
        state: Any = np.zeros(rows, dtype=np.int64)
        for t in range(length):
            word[:, t] = rng.random(rows) < np.where(when <= t, slipping[state], careful[state])
            state = table[state, word[:, t]]
        return word

    def answers(self, word: np.ndarray) -> np.ndarray:
        """1 where the automaton accepts."""
        return self.automaton.accepts[self.automaton.run(word)].astype(np.int64)
