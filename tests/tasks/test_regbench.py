"""RegBench: what is written is what the automata allow; the baselines stand in their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Batch
from ostinato.tasks.regbench import RegBench

SMALL = {"symbols": 6, "most_states": 6, "most_words": 12, "longest_word": 9, "length": 60}


def test_automata_are_as_they_should_be() -> None:
    task = RegBench()
    edges, symbols, following = task.automata(np.random.default_rng(0), 200)
    assert set(np.unique(edges)) == {1, 2, 3}
    sizes, counts = set(), set()
    for row in range(200):
        reached, front = {0}, [0]
        while front:
            state = front.pop()
            own = [int(s) for s in symbols[row, state, : edges[row, state]]]
            to = [int(s) for s in following[row, state, : edges[row, state]]]
            assert len(set(own)) == len(own) and len(set(to)) == len(to) and state not in to
            front += [s for s in to if s not in reached]
            reached |= set(to)
        sizes.add(len({int(s) for state in range(12) for s in symbols[row, state, : edges[row, state]]}))
        counts.add(int(following[row][edges[row, :, None] > np.arange(3)].max()) + 1)
    assert max(sizes) > 15 and min(sizes) <= 4 and counts == set(range(4, 13))


def test_words_are_of_one_automaton_each() -> None:
    task = RegBench(**SMALL, test_size=64)
    rng = np.random.default_rng(1)
    automata = task.automata(np.random.default_rng(1), 32)
    tokens = task.generate(rng, 32).inputs.tolist()  # draws the automata first, from the same stream
    lengths, words = set(), set()
    for row, sequence in enumerate(tokens):
        text = [token for token in sequence if token]
        assert text[-1] != 1 or len(text) == task.length
        split = "".join(chr(96 + token) for token in text).split("a")  # token 1 is written a
        words.add(len(split))
        for word in split[:-1]:
            lengths.add(len(word))
        for word in split:
            state = 0
            for letter in word:
                found = [
                    i for i in range(automata.edges[row, state]) if automata.symbols[row, state, i] == ord(letter) - 98
                ]
                assert len(found) == 1
                state = automata.following[row, state, found[0]]
    assert lengths == set(range(1, 10)) and max(words) <= 12


def test_every_next_symbol_is_asked_and_no_end_of_a_word() -> None:
    for batch in (RegBench(**SMALL).train_batch(0, 16, seed=3), next(RegBench(**SMALL).test_batches())):
        after = batch.inputs[:, 1:]
        assert torch.equal(batch.mask[:, :-1], after >= 2)
        assert torch.equal(batch.targets[:, :-1][after >= 2], after[after >= 2])
    assert (RegBench(length=512).train_batch(0, 64, seed=0).inputs[:, -1] == 0).any(), "some are filled up"


def test_edges_are_taken_alike() -> None:
    task = RegBench(symbols=4, fewest_states=4, most_states=4, most_edges=1, length=40)
    for batch in task.test_batches():
        # With one edge a state, every word of a row begins alike.
        for row in batch.inputs.tolist():
            words = "".join(map(str, row)).replace("0", "").split("1")
            assert all(a.startswith(b) or b.startswith(a) for a in words for b in words)
    assert task.least_loss() == 0 and task.baselines()["automaton"] == 1
    assert task.baselines()["trigram"] > 0.8
    task = RegBench(symbols=4, fewest_symbols=4, fewest_states=4, most_states=4, length=64, test_size=512)
    edges = [len(np.flatnonzero(sets)) for sets in _sets_at(task, 0)]
    share = {size: edges.count(size) / len(edges) for size in (1, 2, 3)}
    assert all(abs(value - 1 / 3) < 0.07 for value in share.values())
    drawn = torch.cat([batch.targets[:, 0] for batch in task.test_batches()])
    counts = torch.bincount(drawn, minlength=6)[2:].double()
    assert counts.min() > 0.7 * counts.mean()


def _sets_at(task: RegBench, position: int) -> list[np.ndarray]:
    found = []
    for batch in task.test_batches():
        allowed = task.allowed(batch)
        assert allowed is not None
        found += list(allowed[:, position])
    return found


def _logits(batch: Batch, tokens: torch.Tensor, classes: int) -> torch.Tensor:
    return 20.0 * functional.one_hot(tokens, classes).float()


def test_valid_accuracy_counts_what_the_automaton_allows() -> None:
    task = RegBench(**SMALL, test_size=32)
    batch = next(task.test_batches())
    again = RegBench(**SMALL, test_size=32)  # has not drawn its test set yet
    for one in (task, again):
        total, count = one.score(_logits(batch, batch.targets, 8), batch)["valid_accuracy"]
        assert total == count == float(batch.mask.sum())
    allowed = torch.from_numpy(task.allowed(batch))
    assert not allowed[..., :2].any() and allowed.any(-1).all() and allowed.sum(-1).max() == 3
    assert allowed.gather(2, batch.targets.unsqueeze(-1)).squeeze(-1)[batch.mask].all()
    last = allowed.long().cumsum(-1).argmax(-1)  # the last one allowed
    scores = task.score(_logits(batch, last, 8), batch)
    assert scores["valid_accuracy"][0] == count and scores["accuracy"][0] < 0.9 * count
    wrong = (~allowed).long().argmax(-1)
    assert task.score(_logits(batch, wrong, 8), batch)["valid_accuracy"][0] == 0


def test_of_other_sequences_nobody_knows_the_automaton() -> None:
    task = RegBench(**SMALL, test_size=8)
    batch = task.train_batch(0, 4, seed=0)
    assert task.allowed(batch) is None
    assert "valid_accuracy" not in task.score(_logits(batch, batch.targets, 8), batch)


def test_baselines_in_their_order() -> None:
    task = RegBench(test_size=64, length=256)
    found = task.baselines()
    assert found["uniform"] < found["most frequent answer"] < found["bigram"] < found["trigram"] < found["automaton"]
    counts = [sets.sum() for batch in task.test_batches() for sets in task.allowed(batch)[batch.mask.numpy()]]
    assert found["uniform"] == pytest.approx(np.mean(counts) / 18)
    assert task.least_loss() == pytest.approx(np.log(counts).mean())


def test_what_n_grams_say() -> None:
    from ostinato.tasks.regbench import _counted

    # a b a c a b | a: after a came b twice, c once; at the start of a word a; after b came a.
    assert list(_counted([2, 3, 2, 4, 2, 3, 1, 2], 1))[:7] == [2, 2, 3, 2, 3, 2, 2]
    # Of two tokens: after b a came c.
    assert list(_counted([2, 3, 2, 4, 2, 3, 2], 2))[-1] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_edges": 4}, "most_edges"),
        ({"fewest_symbols": 19}, "fewest_symbols"),
        ({"fewest_states": 13}, "fewest_states"),
        ({"fewest_words": 0}, "fewest_words"),
        ({"longest_word": 1}, "longest_word"),
        ({"length": 3}, "length"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RegBench(**options)
