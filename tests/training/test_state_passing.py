"""State carried over some windows of one long sequence, then begun anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.models.token_classifier import TokenClassifier
from ostinato.tasks.registry import task
from ostinato.training.evaluate import evaluate
from ostinato.training.fit import fit
from ostinato.training.plugs import task_loss
from ostinato.training.state_passing import StatePassing

OPTIONS: dict[str, Any] = {"keys": 4, "values": 3, "length": 16, "recent": 2, "tested_recent": 2}


def passing(windows: int = 3) -> StatePassing:
    return StatePassing(task("recall_stream", **OPTIONS, tested_lengths=(32,), test_size=8), windows)


def test_windows_are_pieces_of_one_long_sequence() -> None:
    whole = task("recall_stream", **{**OPTIONS, "length": 48}).train_batch(1, 4, 7)
    windows = [passing().train_batch(step, 4, 7) for step in (3, 4, 5)]
    for part in ("inputs", "targets", "mask"):
        assert torch.equal(torch.cat([getattr(window, part) for window in windows], 1), getattr(whole, part))
    resets = torch.cat([window.reset for window in windows], 1)  # type: ignore[misc]
    assert bool(resets[:, 0].all()) and int(resets.sum()) == 4


def test_the_state_is_carried_and_forgotten() -> None:
    torch.manual_seed(0)
    model = TokenClassifier(7, 8, "mamba2(heads=2, state_dim=4)")
    seen: list[Any] = []

    def watching(model: Any, chosen: Any, batch: Any, state: Any) -> Any:
        loss, after = task_loss(model, chosen, batch, state)
        alone, _ = model(batch.inputs, None)
        carried, _ = model(batch.inputs, state, reset=batch.reset)
        seen.append(torch.allclose(alone, carried, atol=1e-6))
        return loss, after

    fit(model, passing(), steps=7, batch_size=4, objective=watching, progress=False, device="cpu", evaluate_every=0)
    assert seen == [True, False, False, True, False, False, True]


def test_tests_are_those_of_the_task() -> None:
    torch.manual_seed(0)
    model = TokenClassifier(7, 8, "mamba2(heads=2, state_dim=4)")
    assert evaluate(model, passing()) == evaluate(model, passing().task)
    assert passing().fingerprint() != passing(4).fingerprint()


def test_errors() -> None:
    with pytest.raises(ConfigurationError, match="window"):
        passing(0)
    with pytest.raises(ConfigurationError, match="one size"):
        StatePassing(task("recall_stream", test_size=100))
