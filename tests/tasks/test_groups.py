from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.groups import WordProblem, group_table


@pytest.mark.parametrize(
    ("name", "order", "abelian"),
    [("Z7", 7, True), ("S3", 6, False), ("S4", 24, False), ("A4", 12, False), ("A5", 60, False), ("S5", 120, False),
     ("Z2xZ3", 6, True), ("Z2xS3", 12, False), ("D4", 8, False), ("D7", 14, False), ("D2", 4, True), ("Q8", 8, False),
     ("Q8xZ3", 24, False), ("(1 2 3)(4 5), (1 2)", 12, False), ("(1 2 3 4 5), (2 3 5 4)", 20, False),
     ("(7 9)", 2, True)],
)  # fmt: skip
def test_tables_are_groups(name: str, order: int, abelian: bool) -> None:
    table = group_table(name)
    assert table.shape == (order, order)
    everything = np.arange(order)
    assert (table[0] == everything).all() and (table[:, 0] == everything).all()
    assert (np.sort(table, axis=1) == everything).all() and (np.sort(table, axis=0) == everything[:, None]).all()
    assert (table[table] == table[:, table]).all()  # (ab)c = a(bc)
    assert (table == table.T).all() == abelian


def test_product_applies_the_right_one_first() -> None:
    elements = list(permutations(range(3)))
    table = group_table("S3")
    for i, a in enumerate(elements):
        for j, b in enumerate(elements):
            assert elements[table[i, j]] == tuple(a[b[k]] for k in range(3))


def test_alternating_group_is_even() -> None:
    # A4 has elements of order 1, 2, 3 only: one, three and eight of them.
    table = group_table("A4")
    orders = []
    for element in range(12):
        power, count = element, 1
        while power:
            power, count = table[power, element], count + 1
        orders.append(count)
    assert sorted(orders) == [1] + [2] * 3 + [3] * 8


def _orders(name: str) -> list[int]:
    """The order of every element: how often it goes into the identity."""
    table = group_table(name)
    found = []
    for element in range(len(table)):
        power, count = element, 1
        while power:
            power, count = table[power, element], count + 1
        found.append(count)
    return sorted(found)


def test_groups_of_equal_order_are_told_apart() -> None:
    assert _orders("Q8") == [1, 2, 4, 4, 4, 4, 4, 4]
    assert _orders("D4") == [1, 2, 2, 2, 2, 2, 4, 4]
    assert _orders("Z2xZ2xZ2") == [1, *[2] * 7]


def test_generators_give_the_named_groups() -> None:
    assert _orders("(1 2 3 4 5), (1 2)") == _orders("S5")
    assert _orders("(1 2 3), (3 4 5)") == _orders("A5")
    assert _orders("(1 2 3 4), (1 3)") == _orders("D4")
    # What is not named stays; names are not counted from 0, and need not be consecutive.
    assert _orders("(10 30)(20 40), (10 20)(30 40)") == _orders("Z2xZ2")
    # Z7 extended by Z3, the smallest group of odd order that is not abelian.
    assert len(_orders("(1 2 3 4 5 6 7), (2 3 5)(4 7 6)")) == 21


def test_word_problem_against_composing_permutations() -> None:
    elements = list(permutations(range(5)))
    batch = WordProblem(group="S5", length=6).train_batch(0, 32, seed=0)
    assert batch.inputs.shape == (32, 7)
    assert batch.mask.all(0).tolist() == [False] + [True] * 6
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert tokens[0] == 0
        product = tuple(range(5))
        for token, target in zip(tokens[1:], targets[1:], strict=True):
            factor = elements[token - 1]
            product = tuple(product[factor[i]] for i in range(5))
            assert elements[target - 1] == product


def test_cyclic_word_problem_is_addition() -> None:
    batch = WordProblem(group="Z5", length=8).train_batch(0, 16, seed=0)
    assert ((batch.inputs[:, 1:] - 1).cumsum(1) % 5 + 1 == batch.targets[:, 1:]).all()


@pytest.mark.parametrize(
    "name",
    ["Q6", "D600", "(1 2", "(1 2)(2 3)", "(1 2), x", "(1 2 3 4 5 6 7), (1 2)", "S7", "Z0", "Z2000", "s3", "S6xS3", ""],
)
def test_unknown_groups(name: str) -> None:
    with pytest.raises(ConfigurationError):
        group_table(name)


def test_trivial_group() -> None:
    with pytest.raises(ConfigurationError, match="nothing to learn"):
        WordProblem(group="Z1")


def test_words_of_swaps() -> None:
    task = WordProblem(group="S5", letters="swaps", length=40)
    elements = list(permutations(range(5)))
    assert len(task.alphabet()) == 11  # ten swaps and the identity
    drawn = set(task.train_batch(0, 32, seed=0).inputs[:, 1:].unique().tolist())
    assert all(sum(i != a for i, a in enumerate(elements[token - 1])) in (0, 2) for token in drawn)
    assert drawn == {letter + 1 for letter in task.alphabet()}


def test_rests_between_the_elements() -> None:
    table = group_table("S3")
    batch = WordProblem(every=4, length=12).train_batch(0, 16, seed=0)
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        product = 0
        for t in range(12):
            if t % 4:
                assert tokens[1 + t] == 1
            if t % 4 == 3:  # asked three tokens after the element
                product = table[product, tokens[1 + t - 3] - 1]
            assert targets[1 + t] == product + 1


def test_tokens_to_think_in() -> None:
    plain = WordProblem(length=5).train_batch(2, 8, seed=1)
    task = WordProblem(length=5, thinking=2)
    batch = task.train_batch(2, 8, seed=1)
    assert task.vocab_size == 8 and batch.inputs.shape == (8, 16)
    assert (batch.inputs[:, 1::3] == plain.inputs[:, 1:]).all() and (
        batch.targets[:, 3::3] == plain.targets[:, 1:]
    ).all()
    assert (batch.inputs[:, 2::3] == 7).all() and (batch.inputs[:, 3::3] == 7).all()
    assert batch.mask.sum(1).tolist() == [5] * 8 and batch.mask[:, 3::3].all()


@pytest.mark.parametrize(
    "options", [{"letters": "none"}, {"group": "A4", "letters": "swaps"}, {"every": 0}, {"thinking": -1}]
)
def test_bad_variants(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        WordProblem(**options)
