"""Prompts read again, digits moved about, masked text, and mixed sizes of sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.tasks.masked_text import MASK, MaskedText
from ostinato.tasks.read_again import ReadAgain
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.set_disjointness import SetDisjointness
from ostinato.tasks.shifted_digits import ShiftedDigits


def test_the_prompt_comes_again_and_is_not_scored() -> None:
    inner = MultiQueryRecall(vocabulary=16, length=16, pairs=3, test_size=4)
    task = ReadAgain(inner, context=6, readings=3)
    once, again = inner.train_batch(5, 2, 1), task.train_batch(5, 2, 1)
    assert torch.equal(again.inputs[:, 12:], once.inputs)
    assert torch.equal(again.inputs[:, :6], once.inputs[:, :6]) and torch.equal(
        again.inputs[:, 6:12], once.inputs[:, :6]
    )
    assert not again.mask[:, :12].any() and torch.equal(again.mask[:, 12:], once.mask)
    assert [batch.inputs.shape for batch in task.test_batches()] == [(4, 28)]
    assert (task.vocab_size, task.chance) == (inner.vocab_size, inner.chance)
    assert torch.equal(ReadAgain(inner, 6, 1).train_batch(0, 2, 0).inputs, inner.train_batch(0, 2, 0).inputs)
    with pytest.raises(ConfigurationError, match="must be positive"):
        ReadAgain(inner, context=0)


def test_digits_are_moved_by_at_most_a_pixel() -> None:
    pytest.importorskip("sklearn")
    still = ShiftedDigits(shift=0).train_batch(3, 32, 0)
    moved = ShiftedDigits(shift=1).train_batch(3, 32, 0)
    assert torch.equal(still.targets, moved.targets)
    changed = 0
    for one, other in zip(still.inputs.view(-1, 8, 8), moved.inputs.view(-1, 8, 8), strict=True):
        padded = torch.nn.functional.pad(one, (1, 1, 1, 1), value=-1.0)
        found = [
            (down, across)
            for down in (-1, 0, 1)
            for across in (-1, 0, 1)
            if torch.equal(padded[1 - down : 9 - down, 1 - across : 9 - across], other)
        ]
        assert found
        changed += (0, 0) not in found
    assert changed > 16
    plain = next(iter(ShiftedDigits().test_batches())).inputs
    assert torch.equal(plain, next(iter(ShiftedDigits(shift=0).test_batches())).inputs)
    with pytest.raises(ConfigurationError, match="pixels come in rows"):
        ShiftedDigits(order="permuted")


def test_masked_text_hides_a_share_and_asks_it() -> None:
    task = MaskedText(window=32, test_size=70)
    batch = task.train_batch(0, 64, 0)
    assert torch.equal(batch.inputs == MASK, batch.mask) and torch.equal(
        batch.inputs[~batch.mask], batch.targets[~batch.mask]
    )
    assert batch.mask.double().mean() == pytest.approx(0.2, abs=0.03)
    assert [len(part.inputs) for part in task.test_batches()] == [64, 6]
    again = next(iter(task.test_batches()))
    assert torch.equal(again.inputs, next(iter(task.test_batches())).inputs)
    floors = task.baselines()
    assert floors["between the same neighbours"] < floors["frequencies of bytes"] < np.log(256)
    with pytest.raises(ConfigurationError, match="less than one window"):
        MaskedText(window=10**7)


@pytest.mark.parametrize("readings", [1, 2])
def test_mixed_batches_hold_all_sizes_in_one_shape(readings: int) -> None:
    task = SetDisjointness(readings=readings, mixed=True)
    batch = task.train_batch(0, 20, 0)
    assert batch.inputs.shape == (20, 1 + readings * 36)
    assert (batch.inputs[:, -1] == 3).all() and (batch.mask.sum(1) == 1).all() and batch.mask[:, -1].all()
    starts = (batch.inputs == 1).int().argmax(1)
    assert len(set(starts.tolist())) == 3
    for row, start in zip(batch.inputs, starts.tolist(), strict=True):
        assert not row[:start].any() and (row[start:] > 0).all()
    assert torch.equal(batch.inputs, task.train_batch(0, 20, 0).inputs)
