from __future__ import annotations

import numpy as np
import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.tasks.registry import task
from ostinato.tasks.selectivity import (
    Grammar,
    SelectivBench,
    element_accuracy,
    filter_accuracy,
    make_grammar,
    reaches_end,
    sample_sequences,
    table_accuracy,
)


def sample(grammar: Grammar, rows: int, length: int = 200, seed: int = 0) -> np.ndarray:
    return sample_sequences(grammar, rows, length, rng=np.random.default_rng(seed))


def elements(batch: object, row: int) -> list[tuple[int, int, int]]:
    """(first step, steps, state) of each element of a row."""
    firsts = np.flatnonzero(batch.begins[row].numpy()).tolist()  # type: ignore[attr-defined]
    total = int(batch.mask[row].sum())  # type: ignore[attr-defined]
    ends = [*firsts[1:], total]
    return [(a, b - a, int(batch.targets[row, a])) for a, b in zip(firsts, ends, strict=True)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 8, 20, 40])
def test_a_grammar_is_deterministic_and_reaches_its_end(size: int) -> None:
    grammar = make_grammar(size, size, starts=min(4, size * size), density=0.9 if size == 1 else 0.4, seed=3)
    assert grammar.states == size * size + 1 and grammar.table.shape == (grammar.states, size + 1)
    states, symbols = np.nonzero(grammar.table >= 0)
    # One successor for a state and a symbol, by the table's shape; and it shows that symbol.
    assert (grammar.symbol(grammar.table[states, symbols]) == symbols).all()
    assert (grammar.table[0] == -1).all() and 0 not in grammar.starts
    assert len(set(grammar.starts.tolist())) == len(grammar.starts)
    # Backward from the end, edge by edge, without the vectorised search.
    reached, waiting = {0}, [0]
    while waiting:
        target = waiting.pop()
        for state in np.flatnonzero((grammar.table == target).any(1)).tolist():
            if state not in reached:
                reached.add(state)
                waiting.append(state)
    assert len(reached) == grammar.states


def test_states_without_a_path_to_the_end_are_found() -> None:
    # 1 -> 2 -> end, 3 -> 4 -> 3.
    table = np.array([[-1, -1], [-1, 2], [0, -1], [-1, 4], [-1, 3]])
    assert reaches_end(table).tolist() == [True, True, True, False, False]


def test_edges_have_the_stated_density() -> None:
    tables = [make_grammar(20, 20, seed=seed).table[1:] for seed in range(8)]
    letters = np.mean([(table[:, 1:] >= 0).mean() for table in tables])
    ends = np.mean([(table[:, 0] >= 0).mean() for table in tables])
    # 8 · 400 · 20 and 8 · 400 draws; six standard errors.
    assert letters == pytest.approx(0.4, abs=6 * (0.24 / 64000) ** 0.5)
    assert ends == pytest.approx(0.4 / 20, abs=6 * (0.02 / 3200) ** 0.5)


def test_instances_are_uniform() -> None:
    grammar = make_grammar(8, 8, seed=0)
    instances = np.concatenate(
        [((table := make_grammar(8, 8, seed=seed).table[:, 1:])[table >= 0] - 1) % 8 for seed in range(10)]
    )
    share = np.bincount(instances, minlength=8) / len(instances)
    assert abs(share - 1 / 8).max() < 5 * (0.11 / len(instances)) ** 0.5
    assert make_grammar(8, 8, seed=0) is grammar and (make_grammar(8, 8, seed=1).table != grammar.table).any()


def test_walks_follow_the_grammar() -> None:
    grammar = make_grammar(8, 8, seed=1)
    states = sample(grammar, 300, 60)
    assert set(states[:, 0]) == set(grammar.starts.tolist())
    before, after = states[:, :-1], states[:, 1:]
    ended = before == 0
    assert np.isin(after[ended], grammar.starts).all()
    assert (grammar.table[before, grammar.symbol(after)][~ended] == after[~ended]).all()
    # Out of a state, edges are equally likely but for strings that were too long; the end is one of them.
    busiest = np.bincount(before[~ended]).argmax()
    following = after[before == busiest]
    counts = np.unique(following, return_counts=True)[1]
    assert len(counts) == (grammar.table[busiest] >= 0).sum()
    expected = len(following) / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 5 * len(counts) + 10


def test_long_strings_are_thrown_away() -> None:
    grammar = make_grammar(8, 8, seed=0)
    states = sample_sequences(grammar, 40, 100, rng=np.random.default_rng(0), longest=12)
    for row in states:
        ends = np.flatnonzero(row == 0)
        assert np.diff(np.concatenate([[-1], ends])).max() <= 12


@pytest.mark.parametrize(("size", "unigram", "bigram"), [(8, 0.24, 0.58), (20, 0.11, None), (40, 0.076, None)])
def test_the_symbol_says_as_little_as_the_card_says(size: int, unigram: float, bigram: float | None) -> None:
    # Memorised on 10 000 tokens, over six grammars; "about 1 % end symbols".
    ones, twos, ends = [], [], []
    for seed in range(6):
        grammar = make_grammar(size, size, seed=seed)
        states = sample(grammar, 50)
        ones.append(table_accuracy(grammar, states, states, 1))
        twos.append(table_accuracy(grammar, states, states, 2))
        ends.append((states == 0).mean())
    assert np.mean(ones) == pytest.approx(unigram, rel=0.2)
    if bigram is not None:
        assert np.mean(twos) == pytest.approx(bigram, rel=0.1)
    assert 0.005 < np.mean(ends) < 0.025


def test_tables_by_hand() -> None:
    grammar = make_grammar(2, 2, starts=1, density=0.9, seed=0)
    train = np.array([[1, 3, 2, 3], [1, 3, 2, 3]])
    test = np.array([[1, 3, 1, 3]])
    assert table_accuracy(grammar, train, test, 1) == 1.0  # a tie goes to the lower state, 1
    assert table_accuracy(grammar, train, test, 2) == 0.75  # after letter 2, letter 1 was state 2


def test_the_filter_is_sure_after_the_start() -> None:
    for seed in range(4):
        grammar = make_grammar(8, 8, seed=seed)
        letters = grammar.symbol(grammar.starts)
        accuracy = filter_accuracy(grammar, sample(grammar, 100, 60))
        assert accuracy > 0.97
        if len(set(letters.tolist())) == 4:
            assert accuracy == 1.0


def test_t1_is_one_zero_vector_after_each_symbol() -> None:
    built = task("selectivbench", length=20)
    batch = built.train_batch(0, 8, seed=0)
    assert batch.inputs.shape == (8, 40, 9) and batch.mask.all()
    assert batch.begins[:, ::2].all() and not batch.begins[:, 1::2].any()
    assert (batch.inputs[:, 1::2] == 0).all() and (batch.inputs[:, ::2].sum(-1) == 1).all()
    assert (batch.targets[:, ::2] == batch.targets[:, 1::2]).all()
    shown = built.grammar.symbol(batch.targets[:, ::2].numpy())
    assert (batch.inputs[:, ::2].argmax(-1).numpy() == shown).all()


def test_t2_has_gaps_of_every_length_and_noise() -> None:
    built = task("selectivbench", variant="T2", length=60, gap=(1, 5))
    batch = built.train_batch(0, 32, seed=0)
    lengths = []
    for row in range(32):
        parts = elements(batch, row)
        assert len(parts) == 60
        for first, steps, state in parts:
            lengths.append(steps - 1)
            assert (batch.targets[row, first : first + steps] == state).all()
        assert (batch.inputs[row, ~batch.mask[row]] == 0).all()
    share = np.bincount(lengths, minlength=6) / len(lengths)
    # Rounded uniform numbers: the ends are half as likely.
    assert share == pytest.approx([0, 1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8], abs=0.05)
    gap = batch.mask & ~batch.begins
    noise = batch.inputs[gap]
    assert noise.min() >= 0 and noise.max() <= 0.2 and noise.mean() == pytest.approx(0.1, abs=0.005)
    assert (batch.inputs[batch.begins].max(-1).values >= 1).all()


def test_t3_inserts_symbols_that_the_grammar_forbids() -> None:
    built = task("selectivbench", variant="T3", length=60, wrong_from=15)
    batch = built.train_batch(0, 64, seed=0)
    possible, count, candidates = built.grammar.possible(), 0, 0
    for row in range(64):
        for index, (first, steps, state) in enumerate(elements(batch, row)):
            assert batch.inputs[row, first].argmax() == built.grammar.symbol(np.array(state))
            candidates += index >= 15
            if steps > 1:
                count += 1
                assert index >= 15 and steps == 2
                wrong = batch.inputs[row, first + 1]
                assert wrong.sum() == 1 and not possible[state, int(wrong.argmax())]
                assert batch.targets[row, first + 1] == state
    assert count / candidates == pytest.approx(0.1, abs=6 * (0.09 / candidates) ** 0.5)


def test_t4_is_trained_as_t2_and_tested_at_fixed_gaps() -> None:
    options = {"length": 12, "gap": (1, 4), "test_size": 8}
    t2, t4 = (task("selectivbench", variant=variant, **options) for variant in ("T2", "T4"))
    for left, right in zip(t2.train_batch(3, 4, 1)[:3], t4.train_batch(3, 4, 1)[:3], strict=True):
        assert torch.equal(left, right)
    found = {batch.split: batch for batch in task("selectivbench", variant="T4", **options).test_batches()}
    assert list(found) == ["gap 10", "gap 20", "gap 50", "gap 100"]
    assert found["gap 20"].inputs.shape == (8, 12 * 21, 9) and found["gap 20"].mask.all()
    walks = [batch.targets[batch.begins].tolist() for batch in found.values()]
    assert all(walk == walks[0] for walk in walks)


def test_test_and_training_do_not_share_sequences() -> None:
    built = task("selectivbench", test_size=32)
    test = {tuple(row) for batch in built.test_batches() for row in batch.targets.tolist()}
    train = {tuple(row) for step in range(4) for row in built.train_batch(step, 32, 0).targets.tolist()}
    assert len(test) == 32 and not test & train


def test_element_accuracy_against_loops() -> None:
    built = task("selectivbench", variant="T2", letters=3, length=6, gap=(1, 3))
    batch = built.train_batch(0, 5, seed=0)
    logits = torch.randn(*batch.targets.shape, 10, generator=torch.Generator().manual_seed(0))
    right = 0
    for row in range(5):
        for first, steps, state in elements(batch, row):
            sums = sum(logits[row, t].softmax(0) for t in range(first, first + steps))
            right += int(sums.argmax()) == state  # type: ignore[union-attr]
    assert element_accuracy(logits, batch.targets, batch.begins, batch.mask) == (right, 30)
    assert built.score(logits, batch)["accuracy"] == (right, 30)


def test_baselines_are_ordered() -> None:
    found = task("selectivbench", test_size=64).baselines()
    assert 1 / 65 < found["unigram table"] < found["bigram table"] < found["filter that knows the grammar"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "T5"}, "T1, T2, T3, T4"),
        ({"noise": 1.0}, "noise"),
        ({"gap": (3, 1)}, "fewest"),
        ({"length": 0}, "length"),
        ({"variant": "T3", "tested_gaps": (3,)}, "tested_gaps"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SelectivBench(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="starts"):
        make_grammar(1, 2, starts=4)
    with pytest.raises(ConfigurationError, match="raise it"):
        make_grammar(3, 3, density=1e-6)
