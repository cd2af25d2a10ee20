from __future__ import annotations

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.arithmetic import ModularArithmeticBrackets
from ostinato.tasks.base import Batch
from ostinato.tasks.languages import CycleNavigation, EvenPairs
from ostinato.tasks.registry import task


def _rows(batch: Batch):
    return zip(*(part.tolist() for part in batch[:3]), strict=True)


@pytest.mark.parametrize("dense", [True, False])
def test_cycle_navigation_against_walking(dense: bool) -> None:
    found = CycleNavigation(min_length=1, max_length=9, places=4, dense=dense).train_batch(0, 64, seed=0)
    assert set(found.inputs.unique().tolist()) == {0, 1, 2, 3}
    for tokens, targets, mask in _rows(found):
        place, moves = 0, [token for token in tokens if token]
        for position, token in enumerate(moves, start=1):
            place = (place + {1: 0, 2: 1, 3: -1}[token]) % 4
            assert targets[position] == 4 + place
            assert mask[position] == (dense or position == len(moves))
        assert not any(mask[1 + len(moves) :]) and not mask[0]


def test_even_pairs_against_counting_changes() -> None:
    for tokens, targets, mask in _rows(EvenPairs(min_length=1, max_length=9).train_batch(0, 64, seed=0)):
        word = [token for token in tokens if token]
        for position in range(1, len(word) + 1):
            changes = sum(word[i] != word[i - 1] for i in range(1, position))
            assert mask[position] and targets[position] == 1 + changes % 2


@pytest.mark.parametrize("times", [False, True])
def test_brackets_against_python(times: bool) -> None:
    found = ModularArithmeticBrackets(modulus=7, min_length=2, max_length=24, times=times).train_batch(0, 200, seed=0)
    signs = {1: "+", 2: "-", 3: "*", 12: "(", 13: ")"}
    lengths, forms = set(), set()
    for tokens, targets, mask in _rows(found):
        end = tokens.index(4)
        lengths.add(end)
        text = "".join(signs.get(token, str(token - 5)) for token in tokens[1:end])
        assert mask[end] and sum(mask) == 1 and set(tokens[end + 1 :]) <= {0}
        assert targets[end] == 5 + eval(text) % 7, text
        assert ("*" in text) <= times
        if end > 5:
            assert text[0] == "(" and text[-1] == ")"
        else:
            forms.add("".join("d" if character.isdigit() else character for character in text))
    assert lengths == set(range(2, 25)) and forms == {"d", "-d", "(d)", "(-d)"}


def test_brackets_at_a_test_length() -> None:
    batch = next(ModularArithmeticBrackets(tested_lengths=(100,), test_size=4).test_batches())
    assert batch.inputs.shape == (4, 101) and bool((batch.inputs[:, 100] == 4).all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cycle_navigation", {"places": 1}),
        ("even_pairs", {"min_length": 9, "max_length": 4}),
        ("modular_arithmetic_brackets", {"min_length": 1}),
        ("modular_arithmetic_brackets", {"modulus": 1}),
    ],
)
def test_bad_options(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        task(name, **options)


@pytest.mark.parametrize("name", ["cycle_navigation", "even_pairs", "modular_arithmetic_brackets"])
def test_chance_is_what_guessing_scores(name: str) -> None:
    built = task(name, test_size=400, tested_lengths=(30,))
    assert abs(built.baselines()["most frequent answer"]) < 0.15
