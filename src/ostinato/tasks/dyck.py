"""Dyck languages: brackets that must be closed in the right order, and shuffles of them, where each kind counts alone.

Dyck-k with a bound on depth is regular, without one it needs a stack; Dyck-1 and shuffles need counters.

Sources: Hewitt et al. 2020 (arXiv 2010.07515), section 2 (Dyck-(k, m)); Suzgun et al. 2019 (arXiv 1911.03329) and
Bhattamishra et al. 2020 (arXiv 2009.11264), section 4 (Dyck, Shuffle-k).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ostinato.tasks.base import Metrics, require
from ostinato.tasks.languages import PrefixLanguage


@dataclass
class _Brackets(PrefixLanguage):
    """What the two have in common: symbols 0 … k − 1 open, k … 2k − 1 close; every word is a prefix of the language.

    Where both are allowed, the next bracket opens with probability `opening`; which kind, is uniform.
    """

    kinds: int = 2
    """k."""
    max_depth: int | None = None
    """No more brackets than so many are open at once; None sets no bound."""
    opening: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kinds >= 1, f"kinds must be positive, got {self.kinds}")
        require(self.max_depth is None or self.max_depth >= 1, f"max_depth must be positive, got {self.max_depth}")
        require(0 < self.opening < 1, f"opening is a probability between 0 and 1, got {self.opening}")

    def _opens(self, rng: np.random.Generator, depth: np.ndarray) -> np.ndarray:
        """Whether the next bracket opens, given how many are open."""
        opens = (rng.random(depth.shape) < self.opening) | (depth == 0)
        return opens if self.max_depth is None else opens & (depth < self.max_depth)


@dataclass
class Dyck(_Brackets):
    """Which bracket would have to be closed now?

    Tokens: 0 begins and pads, 1 … k open, k + 1 … 2k close. The answer is 1 if none is open, else 1 + the kind (1 … k)
    of the innermost that is. So every answer but the first is what the stack has on top.
    """

    name = "dyck"

    @property
    def vocab_size(self) -> int:
        """2 kinds + 1."""
        return 2 * self.kinds + 1

    @property
    def chance(self) -> float:
        """1 / (kinds + 1)."""
        return 1 / (self.kinds + 1)

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """A walk up and down, each closing bracket of the kind that it must be."""
        word = np.empty((rows, length), dtype=np.int64)
        stack = np.zeros((rows, length + 1), dtype=np.int64)
        depth = np.zeros(rows, dtype=np.int64)
        row = np.arange(rows)
        for t in range(length):
            opens = self._opens(rng, depth)
            kind = rng.integers(0, self.kinds, rows)
            word[:, t] = np.where(opens, kind, self.kinds + stack[row, depth])
            depth += np.where(opens, 1, -1)
            stack[row[opens], depth[opens]] = kind[opens]
        return word

    def answers(self, word: np.ndarray) -> np.ndarray:
        """0 where nothing is open, else 1 + the kind on top of the stack."""
        rows, length = word.shape
        answer = np.empty_like(word)
        stack = np.zeros((rows, length + 1), dtype=np.int64)
        depth = np.zeros(rows, dtype=np.int64)
        row = np.arange(rows)
        for t in range(length):
            opens = word[:, t] < self.kinds
            depth += np.where(opens, 1, -1)
            stack[row[opens], depth[opens]] = 1 + word[opens, t]
            answer[:, t] = stack[row, depth]
        return answer

    def baselines(self) -> Metrics:
        """The constant answer; and "last open": the kind last opened, as if nothing had been closed since."""
        return {**super().baselines(), "last opened": _score_of(self, self._last_opened)}

    def _last_opened(self, word: np.ndarray) -> np.ndarray:
        place = np.where(word < self.kinds, np.arange(word.shape[1]), -1)
        return 1 + np.take_along_axis(word, np.maximum.accumulate(place, axis=1), axis=1)


@dataclass
class ShuffleDyck(_Brackets):
    """Which kinds have an open bracket? Kinds are closed in any order: k counters instead of a stack.

    Tokens: 0 begins and pads, 1 … k open, k + 1 … 2k close. The answer is 1 + Σ 2^i over the kinds i = 0 … k − 1 that
    are open. The bracket that closes is one of the open ones, each with equal probability.
    """

    name = "shuffle_dyck"

    @property
    def vocab_size(self) -> int:
        """The larger of 2 kinds + 1 and 2^kinds + 1."""
        return max(2 * self.kinds, 2**self.kinds) + 1

    @property
    def chance(self) -> float:
        """1 / 2^kinds."""
        return 2.0**-self.kinds

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """A walk of as many counters as there are kinds."""
        word = np.empty((rows, length), dtype=np.int64)
        count = np.zeros((rows, self.kinds), dtype=np.int64)
        row = np.arange(rows)
        for t in range(length):
            total = count.sum(1)
            opens = self._opens(rng, total)
            # The n-th open bracket, counted over the kinds.
            number = (rng.random(rows) * total).astype(np.int64)
            kind = np.where(
                opens,
                rng.integers(0, self.kinds, rows),
                (number[:, None] >= count.cumsum(1)).sum(1).clip(max=self.kinds - 1),
            )
            word[:, t] = np.where(opens, kind, self.kinds + kind)
            count[row, kind] += np.where(opens, 1, -1)
        return word

    def answers(self, word: np.ndarray) -> np.ndarray:
        """The set of open kinds as a number."""
        kind = np.arange(self.kinds)
        change = (word[..., None] == kind).astype(np.int64) - (word[..., None] == self.kinds + kind)
        return ((change.cumsum(1) > 0) * 2**kind).sum(2)


def _score_of(task: PrefixLanguage, rule: object) -> float:
    """The metric of a rule that answers words, over the test set."""
    import torch
    from torch.nn import functional

    total = count = 0.0
    for batch in task.test_batches():
        said = task.first_answer + np.asarray(rule(batch.inputs[:, 1:].numpy() - 1))  # type: ignore[operator]
        answers = torch.cat([batch.inputs[:, :1], torch.from_numpy(said)], dim=1)
        more, cases = task.score(functional.one_hot(answers, task.num_classes).float(), batch)[task.metric]
        total, count = total + more, count + cases
    return total / count
