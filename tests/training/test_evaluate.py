from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.tasks.registry import task
from ostinato.tasks.text import Text
from ostinato.training.carry import CarriedState
from ostinato.training.evaluate import evaluate


@pytest.mark.parametrize("plan", ["min_gru", "attention"])
def test_bits_per_byte_are_those_of_reading_in_one_piece(text: Text, plan: str) -> None:
    """Windows change nothing: the state is carried. Four stripes of 25 from the held-out hundred."""
    torch.manual_seed(0)
    model = ostinato.LanguageModel(d_model=16, plan=plan, depth=1)
    torch.nn.init.normal_(model.embedding.weight)
    found = evaluate(model, text)["bits_per_byte"]
    answers = text.train_bytes[-1:] + text.test_bytes
    nats = 0.0
    for start in range(0, 100, 25):
        piece = torch.tensor([list(answers[start : start + 26])])
        with torch.no_grad():
            logits, _ = model(piece[:, :-1])
        nats += float(torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum"))
    assert found == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_splits_and_mode(small: Callable[..., Any]) -> None:
    parity = task("parity", tested_lengths=(4, 9), test_size=80)
    model = small(3, dropout=0.5)
    found = evaluate(model, parity)
    assert model.training
    assert found == evaluate(model, parity), "dropout is off"
    assert list(found)[:4] == ["accuracy", "scaled_accuracy", "sequence_accuracy", "loss"]
    both = [found["accuracy/length 4"], found["accuracy/length 9"]]
    assert found["accuracy"] == pytest.approx((4 * both[0] + 9 * both[1]) / 13)


def test_a_few_batches(small: Callable[..., Any]) -> None:
    parity = task("parity", tested_lengths=(4, 9), test_size=80)
    assert "accuracy/length 9" not in evaluate(small(3), parity, batches=1)
    with pytest.raises(ConfigurationError):
        evaluate(small(3), parity, batches=0)


def test_a_state_that_grows_is_dropped() -> None:
    carried = CarriedState(carries=True, limit=4)
    for windows in range(1, 4):
        carried.update({"cache": torch.zeros(2, 5 * windows)})
        assert carried.value["cache"].shape == (2, 5 * windows)
    carried.update({"cache": torch.zeros(2, 20)})
    assert carried.value is None and carried.windows == 0


def test_a_state_that_stops_growing_is_kept() -> None:
    carried = CarriedState(carries=True, limit=4)
    for windows in range(1, 20):
        carried.update({"cache": torch.zeros(2, min(3, windows), requires_grad=True)})
    assert carried.value["cache"].shape == (2, 3) and not carried.value["cache"].requires_grad


def test_a_broken_state_is_dropped() -> None:
    carried = CarriedState(carries=True)
    carried.update((torch.ones(2, 3), None))
    carried.clear_unless_finite()
    assert carried.value is not None and carried.rows(0, 1)[0].shape == (1, 3)
    carried.update((torch.tensor([[float("nan")]]), None))
    carried.clear_unless_finite()
    assert carried.value is None


def test_nothing_is_carried_between_separate_sequences() -> None:
    carried = CarriedState(carries=False)
    carried.update(torch.ones(2, 3))
    assert carried.value is None
