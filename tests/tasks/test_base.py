from __future__ import annotations

import importlib.util
from itertools import islice

import pytest
import torch
from torch.nn import functional

from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.tasks.base import Batch
from ostinato.tasks.registry import task, tasks

_NO_IMAGES = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="the images are scikit-learn's")
ALL = [pytest.param(name, marks=_NO_IMAGES) if name == "digits" else name for name in tasks()]
GENERATED = [name for name in ALL if name != "text"]


def _same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True)) and left.split == right.split


@pytest.mark.parametrize("name", ALL)
def test_batches_are_well_formed(name: str) -> None:
    built = task(name)
    for batch in (built.train_batch(0, 4, seed=0), next(iter(built.test_batches()))):
        assert batch.inputs.shape[:2] == batch.targets.shape == batch.mask.shape
        assert batch.targets.dtype == torch.long and batch.mask.dtype == torch.bool
        if built.reads_vectors:
            assert batch.inputs.shape[2] == built.vocab_size and batch.inputs.isfinite().all()
        else:
            assert batch.inputs.shape == batch.mask.shape and batch.inputs.dtype == torch.long
            assert batch.inputs.min() >= 0 and batch.inputs.max() < built.vocab_size
        assert batch.targets[batch.mask].max() < built.num_classes
        assert batch.mask.any(1).all()


@pytest.mark.parametrize("name", ALL)
def test_a_step_can_be_asked_for_alone(name: str) -> None:
    built = task(name)
    first = list(islice(built.train_batches(4, seed=7), 5))
    again = list(islice(built.train_batches(4, seed=7, start_step=3), 2))
    assert _same(first[3], again[0]) and _same(first[4], again[1])
    assert not _same(first[3], first[4])
    assert not _same(first[0], built.train_batch(0, 4, seed=8))


@pytest.mark.parametrize("name", ALL)
def test_options_rebuild_the_task(name: str) -> None:
    built = task(name)
    again = task(name, **built.options())
    assert again.fingerprint() == built.fingerprint()
    assert _same(next(iter(built.test_batches())), next(iter(again.test_batches())))


@pytest.mark.parametrize("name", GENERATED)
def test_generators_leave_the_global_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    task(name).train_batch(0, 4, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", GENERATED)
def test_test_set_is_fixed_by_its_seed(name: str) -> None:
    sets = [list(task(name, seed=seed, test_size=8).test_batches()) for seed in (0, 0, 1)]
    assert all(_same(a, b) for a, b in zip(sets[0], sets[1], strict=True))
    assert not _same(sets[0][0], sets[2][0])


@pytest.mark.parametrize("name", GENERATED)
def test_the_right_answers_score_one(name: str) -> None:
    built = task(name)
    batch = built.train_batch(0, 8, seed=0)
    logits = 50.0 * functional.one_hot(batch.targets, built.num_classes).float()
    for measure, (total, count) in built.score(logits, batch).items():
        assert total / count == pytest.approx(0 if measure == "loss" else 1, abs=1e-6)


def test_scores_against_counting() -> None:
    built = task("word_problem", group="Z3", length=4)
    batch = built.train_batch(0, 16, seed=0)
    logits = torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(0))
    right = sequences = nats = 0.0
    for row in range(16):
        hits = [int(logits[row, t].argmax()) == int(batch.targets[row, t]) for t in range(1, 5)]
        right += sum(hits)
        sequences += all(hits)
        nats -= sum(float(logits[row, t].log_softmax(0)[batch.targets[row, t]]) for t in range(1, 5))
    score = built.score(logits, batch)
    assert score["accuracy"] == (right, 64)
    assert score["sequence_accuracy"] == (sequences, 16)
    assert score["scaled_accuracy"][0] / 64 == pytest.approx((right / 64 - 1 / 3) / (2 / 3))
    assert score["loss"][0] == pytest.approx(nats, rel=1e-5)


def test_chance_is_what_guessing_scores() -> None:
    built = task("modular_arithmetic", dense=True)
    batch = built.train_batch(0, 2000, seed=0)
    guesses = torch.randint(5, 10, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    total, count = built.score(functional.one_hot(guesses, 10).float(), batch)["scaled_accuracy"]
    assert abs(total / count) < 0.02


def test_most_frequent_answer() -> None:
    built = task("word_problem", group="Z2", length=8, tested_lengths=(8,))
    targets = torch.cat([batch.targets[batch.mask] for batch in built.test_batches()])
    built.metric = "accuracy"  # type: ignore[misc]
    most = max(int((targets == token).sum()) for token in (1, 2))
    assert built.baselines()["most frequent answer"] == pytest.approx(most / len(targets))


def test_rows_and_steps() -> None:
    batch = task("parity", max_length=7).train_batch(0, 6, seed=0)
    assert batch.rows(2, 4).inputs.tolist() == batch.inputs[2:4].tolist()
    assert batch.steps(1, 3).targets.tolist() == batch.targets[:, 1:3].tolist()
    walk = task("selectivbench").train_batch(0, 4, seed=0)
    assert walk.begins is not None
    part = walk.rows(1, 3).steps(2, 7)
    assert part.begins is not None and torch.equal(part.begins, walk.begins[1:3, 2:7])
    assert part.inputs.shape == (2, 5, 9)


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="parity"):
        task("party")
    with pytest.raises(ConfigurationError, match="no option 'lenght'; it has seed, test_size, min_length"):
        task("parity", lenght=3)
