from __future__ import annotations

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.in_context_copying import InContextCopying, Lookup


def test_copies_against_the_string() -> None:
    task = InContextCopying(alphabet=5, min_symbols=2, symbols=6)
    batch = task.train_batch(0, 100, seed=0)
    sizes = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        mark = tokens.index(1)
        string = tokens[1:mark]
        n = len(string)
        sizes.add(n)
        assert tokens[0] == 0 and all(2 <= token < 7 for token in string)
        assert tokens[mark + 1 :] == string[:-1] + [0] * (12 - 2 * n + 1 - 1)
        assert [place for place, here in enumerate(mask) if here] == list(range(mark, mark + n))
        assert targets[mark : mark + n] == string
    assert sizes == set(range(2, 7))


def test_copying_baselines() -> None:
    few = InContextCopying(alphabet=4, test_size=16, tested_symbols=(40,)).baselines()
    many = InContextCopying(alphabet=1000, test_size=16, tested_symbols=(10,)).baselines()
    # Among few symbols what followed one of them says little; among many it says nearly all.
    assert few["look-up of one token"] < 0.5 < 0.9 < many["look-up of one token"]


@pytest.mark.parametrize(("given", "asked", "alphabet"), [(1, 1, 16), (1, 3, 16), (2, 2, 6)])
def test_lookup_against_search(given: int, asked: int, alphabet: int) -> None:
    task = Lookup(alphabet=alphabet, symbols=12, given=given, asked=asked, tested_symbols=(14,))
    batch = task.train_batch(0, 100, seed=0)
    starts = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        mark = tokens.index(1)
        string, key = tokens[1:mark], tokens[mark + 1 : mark + 1 + given]
        assert len(string) == 12 and tokens[0] == 0 and all(2 <= token < 2 + alphabet for token in string)
        found = [i for i in range(12 - given + 1) if string[i : i + given] == key]
        assert len(found) == 1
        starts.add(found[0])
        answer = string[found[0] + given : found[0] + given + asked]
        assert targets[-asked:] == answer and tokens[mark + 1 + given :] == answer[:-1]
        assert sum(mask) == asked and all(mask[-asked:])
    assert starts == set(range(12 - given - asked + 1))


def test_lookup_baselines() -> None:
    assert Lookup(test_size=16, given=2, alphabet=12).baselines()["search"] == 1


@pytest.mark.parametrize("options", [{"alphabet": 20}, {"given": 0}, {"symbols": 1}, {"given": 2, "alphabet": 4}])
def test_bad_lookups(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        Lookup(**options)


@pytest.mark.parametrize("options", [{"alphabet": 1}, {"min_symbols": 30}, {"tested_symbols": (0,)}])
def test_bad_copies(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        InContextCopying(**options)
