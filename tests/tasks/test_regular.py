from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby, product

import numpy as np
import pytest

from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.tasks.regular import LANGUAGES, RegularLanguage, automata


def _no_odd_zeros_after_odd_ones(word: str) -> bool:
    odd = False
    for symbol, run in groupby(word):
        length = len(list(run))
        if odd and symbol == "0" and length % 2:
            return False
        odd |= symbol == "1" and length % 2 == 1
    return True


def _bounded(depth: int) -> Callable[[str], bool]:
    def check(word: str) -> bool:
        levels = [word[:i].count("0") - word[:i].count("1") for i in range(len(word) + 1)]
        return min(levels) >= 0 and max(levels) <= depth and levels[-1] == 0

    return check


# The definitions, in words of their own: none of them an automaton.
CHECKS: dict[str, Callable[[str], bool]] = {
    "tomita1": lambda w: "0" not in w,
    "tomita2": lambda w: re.fullmatch("(10)*", w) is not None,
    "tomita3": _no_odd_zeros_after_odd_ones,
    "tomita4": lambda w: "000" not in w,
    "tomita5": lambda w: w.count("0") % 2 == 0 and w.count("1") % 2 == 0,
    "tomita6": lambda w: (w.count("0") - w.count("1")) % 3 == 0,
    "tomita7": lambda w: re.fullmatch("0*1*0*1*", w) is not None,
    "aa": lambda w: len(w) % 2 == 0,
    "aaaa": lambda w: len(w) % 4 == 0,
    "abab": lambda w: re.fullmatch("(0101)*", w) is not None,
    "D2": _bounded(2),
    "D4": _bounded(4),
    "D12": _bounded(12),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_short_word_against_the_definition(language: str) -> None:
    automaton = automata()[language]
    assert automaton.accepts[0] == CHECKS[language]("")
    for length in (1, 5, 9):
        words = np.array(list(product((0, 1), repeat=length)))
        accepted = automaton.accepts[automaton.run(words)][:, -1]
        assert accepted.tolist() == [CHECKS[language]("".join(map(str, word))) for word in words]


@pytest.mark.parametrize("language", LANGUAGES)
def test_batches_against_the_definition(language: str) -> None:
    task = RegularLanguage(language=language, max_length=24)
    batch = task.train_batch(0, 60, seed=0)
    answers = []
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        word = "".join(str(token - 1) for token in tokens if token)
        found = [1 + CHECKS[language](word[: i + 1]) for i in range(len(word))]
        assert [target for target, scored in zip(targets, mask, strict=True) if scored] == found
        answers += found
    share = sum(answer == 2 for answer in answers) / len(answers)
    assert 0.1 < share < 0.9, "one answer alone would do"


def test_slips_are_as_many_as_asked() -> None:
    words = RegularLanguage(language="tomita1", slip=0.3).draw(np.random.default_rng(0), 4000, 4)
    assert abs((words == 0).any(1).mean() - 0.3) < 0.03
    # At a uniform step.
    first = (words == 0).argmax(1)[(words == 0).any(1)]
    assert np.abs(np.bincount(first, minlength=4) / len(first) - 0.25).max() < 0.05
    assert (RegularLanguage(language="tomita1", slip=0.0).draw(np.random.default_rng(0), 100, 20) == 1).all()


def test_bad_languages() -> None:
    with pytest.raises(UnknownNameError, match="tomita5"):
        RegularLanguage(language="tomita55")
    with pytest.raises(ConfigurationError, match="share"):
        RegularLanguage(slip=2)
