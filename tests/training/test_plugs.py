from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Batch, Task
from ostinato.tasks.registry import task
from ostinato.tasks.text import Text
from ostinato.training.fit import fit
from ostinato.training.plugs import backpropagation, task_loss, truncated

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "device": "cpu"}


def _gradients(model: nn.Module, rule: Any, chosen: Task, batch: Batch) -> tuple[list[Tensor], float, Any]:
    model.zero_grad()
    loss, state = rule(model, chosen, batch, None, task_loss, Tensor.backward)
    assert not loss.requires_grad and not any(leaf.requires_grad for _, leaf in ostinato.state.leaves(state))
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], float(loss), state


@pytest.mark.parametrize("length", [3, 7, 16])
def test_truncation_by_hand(small: Callable[..., Any], text: Text, length: int) -> None:
    model = small(dropout=0.0).double()
    batch = text.train_batch(0, 4, 0)
    found, loss, state = _gradients(model, truncated(length), text, batch)
    model.zero_grad()
    carried, total = None, 0.0
    for start in range(0, 16, length):
        logits, carried = model(batch.inputs[:, start : start + length], carried)
        carried = ostinato.state.map(Tensor.detach, carried)
        targets = batch.targets[:, start : start + length]
        part = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 64
        part.backward()
        total += part.item()
    assert loss == pytest.approx(total, rel=1e-6)
    for mine, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
    for (_, mine), (_, theirs) in zip(ostinato.state.leaves(state), ostinato.state.leaves(carried), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_truncation_longer_than_the_window_is_none(small: Callable[..., Any], text: Text) -> None:
    model, batch = small(dropout=0.0).double(), text.train_batch(0, 4, 0)
    mine, theirs = (_gradients(model, rule, text, batch) for rule in (truncated(99), backpropagation))
    assert mine[1] == pytest.approx(theirs[1])
    for left, right in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(left, right)


def test_truncation_passes_the_state_where_nothing_is_asked(small: Callable[..., Any]) -> None:
    copying = task("copying", symbols=2, delay=6)
    batch = copying.train_batch(0, 4, 0)
    model = small(copying.vocab_size, dropout=0.0).double()
    _, loss, _ = _gradients(model, truncated(3), copying, batch)
    with torch.no_grad():
        logits, _ = model(batch.inputs)
    assert loss == pytest.approx(float(copying.loss(logits, batch)), rel=1e-6)


def test_the_three_places_in_fit(small: Callable[..., Any], text: Text) -> None:
    calls: list[str] = []

    def objective(model: nn.Module, task: Task, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        calls.append("objective")
        loss, state = task_loss(model, task, batch, state)
        return 2 * loss, state

    def gradient(model: nn.Module, *rest: Any) -> tuple[Tensor, Any]:
        loss, state = backpropagation(model, *rest)
        calls.append("gradient")
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        return loss, state

    def curriculum(task: Task, step: int, batch_size: int, seed: int) -> Batch:
        calls.append(f"step {step}")
        return task.train_batch(0, batch_size, seed).steps(0, 2 + step)

    model = small(dropout=0.0)
    before = [p.clone() for p in model.parameters()]
    options: dict[str, Any] = {"objective": objective, "gradient": gradient, "curriculum": curriculum}
    history = fit(model, text, steps=2, weight_decay=0.0, **options, **QUIET)
    assert calls == ["step 0", "objective", "gradient", "step 1", "objective", "gradient"]
    assert history.tokens == 4 * 2 + 4 * 3 and history.gradient_norms == [0, 0]
    for left, right in zip(before, model.parameters(), strict=True):
        assert torch.equal(left, right)
    with torch.no_grad():
        batch = text.train_batch(0, 4, 0).steps(0, 2)
        assert history.losses[0] == pytest.approx(2 * float(text.loss(model(batch.inputs)[0], batch)), rel=1e-5)


def test_bad_length() -> None:
    with pytest.raises(ConfigurationError, match="positive"):
        truncated(0)
