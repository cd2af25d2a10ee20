"""Passkey: digits hidden at some depth of a repetitive text must be said at its end.

    T_recall is the longest text at which they are found, whatever the depth: test far beyond the trained length.

The text is that of the task as it is given to language models, word by word, or, for small models, its bare bones:
the same filler, one mark before the key and one mark that asks for it.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.2; the wording of Stuffed Mamba (arXiv 2410.07145),
section 5, and its authors' generator.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ostinato.tasks.base import Batch, GeneratedTask, Metrics, Tally, as_batch, require

PREFIX = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The passkey is {key}. Remember it. {key} is the passkey."
SUFFIX = "What is the pass key? The passkey is"

WORDINGS = ("marks", "words")

_DIGIT = 1
"""Token of the digit 0: token 0 is not used by a text, so that a model can pad with it."""
_MARK, _ASK = 11, 12


def passkey_text(key: str, copies: int, depth: float) -> str:
    """The text for a language model: `copies` of the filler, one of which, at a relative depth, is the key's sentence.

    Args:
        key: what is hidden, five digits in the paper.
        copies: how many sentences of filler and key there are in all, at least one.
        depth: 0 is the beginning, 1 the end.
    """
    require(copies >= 1, f"copies must be positive, got {copies}")
    require(0 <= depth <= 1, f"depth lies between 0 and 1, got {depth}")
    parts = [FILLER] * copies
    parts[min(copies - 1, int(depth * copies))] = KEY.format(key=key)
    return f"{PREFIX}\n\n{' '.join(parts)}\n\n{SUFFIX}"


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|[.?]|\{key\}", text)


_VOCABULARY = sorted({word for text in (PREFIX, FILLER, KEY, SUFFIX) for word in _words(text)} - {"{key}"})
_NUMBER = {word: 13 + index for index, word in enumerate(_VOCABULARY)}


def _tokens(text: str) -> np.ndarray:
    """The words as token ids; −1 stands for the key."""
    return np.array([_NUMBER.get(word, -1) for word in _words(text)])


@dataclass
class Passkey(GeneratedTask):
    """`digits` digits at a depth of the filler; after the question they are read back, one by one.

    Tokens: 0 is nothing, 1 … 10 the digits, 11 the mark of the key and 12 that of the question, then the words. With
    the wording "words" the text is that of `passkey_text`, words and points being tokens, and the filler cut to
    `length` exactly; with "marks" it is filler, 11, the key, filler, 12. The digit asked is predicted at the token
    before it: the right digits so far are given.

    Training depths are uniform; a test has equally many sequences at each of `depths` depths, (i + ½) / depths. Scores
    of each depth are reported as "accuracy at depth 0.25".
    """

    name: ClassVar[str] = "passkey"

    digits: int = 5
    length: int = 64
    """Tokens of a training sequence."""
    tested_lengths: tuple[int, ...] = (64, 256, 1024)
    depths: int = 4
    wording: str = "marks"
    """"marks" or "words"."""

    def __post_init__(self) -> None:
        self.tested_lengths = tuple(self.tested_lengths)
        require(self.wording in WORDINGS, f"wording is one of {', '.join(WORDINGS)}, got {self.wording!r}")
        require(self.digits >= 1 and self.depths >= 1, "digits and depths must be positive")
        shortest, least = min((self.length, *self.tested_lengths)), self._fixed() + 1
        require(shortest >= least, f"a text around {self.digits} digits has at least {least} tokens, got {shortest}")

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What comes before the filler, the key's sentence, and the question; −1 stands for the key."""
        if self.wording == "marks":
            return np.empty(0, dtype=np.int64), np.array([_MARK, -1]), np.array([_ASK])
        return _tokens(PREFIX), _tokens(KEY), _tokens(SUFFIX)

    def _fixed(self) -> int:
        """Tokens that are not filler; of the answer, all but the last digit are read."""
        prefix, key, suffix = self._parts()
        places = int((key == -1).sum())
        return len(prefix) + len(key) + places * (self.digits - 1) + len(suffix) + self.digits - 1

    @property
    def vocab_size(self) -> int:
        """Digits, marks and words: 43."""
        return 13 + len(_VOCABULARY)

    @property
    def chance(self) -> float:
        """1 / 10: one digit."""
        return 0.1

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """`tested_lengths`."""
        return self.tested_lengths

    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """Sequences of shape (rows, length); the last `digits` positions are scored."""
        space = (length or self.length) - self._fixed()
        prefix, sentence, suffix = self._parts()
        keys = _DIGIT + rng.integers(0, 10, (rows, self.digits))
        depth = rng.random(rows) if length is None else (rng.permutation(rows) % self.depths + 0.5) / self.depths
        cycle = _tokens(FILLER)
        filler = cycle[np.arange(space) % len(cycle)]
        before = (depth * (space + 1)).astype(np.int64)
        if self.wording == "words":  # a sentence begins after a point
            ends = np.concatenate([[0], 1 + np.flatnonzero(filler == _NUMBER["."])])
            before = ends[np.searchsorted(ends, before, side="right") - 1]
        inputs = np.empty((rows, length or self.length), dtype=np.int64)
        for row, place in enumerate(before):
            key = np.concatenate([keys[row] if token == -1 else [token] for token in sentence])
            parts = [prefix, filler[:place], key, filler[place:], suffix, keys[row, :-1]]
            inputs[row] = np.concatenate(parts)
        targets = np.zeros_like(inputs)
        targets[:, -self.digits :] = keys
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, -self.digits :] = True
        return as_batch(inputs, targets, mask)

    def depth_of(self, batch: Batch) -> Tensor:
        """The share of the filler that lies before each key, (rows,) in [0, 1]."""
        prefix, sentence, _ = self._parts()
        digit = (batch.inputs >= _DIGIT) & (batch.inputs < _DIGIT + 10)
        before = digit.int().argmax(1) - len(prefix) - int(np.argmax(sentence == -1))
        return before / max(1, batch.inputs.shape[1] - self._fixed())

    def score(self, logits: Tensor, batch: Batch) -> dict[str, Tally]:
        """Those of every task, and the accuracy at each depth, in as many parts as `depths`."""
        found = super().score(logits, batch)
        right = ((logits.argmax(-1) == batch.targets) & batch.mask).sum(1)
        part = (self.depth_of(batch) * self.depths).long().clamp(max=self.depths - 1)
        for index in part.unique().tolist():
            here = part == index
            name = f"accuracy at depth {(index + 0.5) / self.depths:.3g}"
            found[name] = (float(right[here].sum()), float(batch.mask[here].sum()))
        return found

    def baselines(self) -> Metrics:
        """The constant answer; and "first digits", which says the first digits of the text: the oracle, 1."""
        right, count = 0, 0
        for batch in self.test_batches():
            digit = (batch.inputs >= _DIGIT) & (batch.inputs < _DIGIT + 10)
            place = digit.int().argmax(1, keepdim=True) + torch.arange(self.digits)
            said = batch.inputs.gather(1, place)
            right += int((said == batch.targets[:, -self.digits :]).sum())
            count += said.numel()
        return {**super().baselines(), "first digits": right / count}
