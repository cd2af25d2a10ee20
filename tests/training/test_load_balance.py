"""The routers' balance loss: in every objective, in ensembles, and that it balances."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.layers.routing import load_balancing_loss, router_logits
from ostinato.models.token_classifier import TokenClassifier
from ostinato.tasks.registry import task
from ostinato.training.ensemble import fit_together
from ostinato.training.fit import fit
from ostinato.training.load_balance import balanced, load_balance, loads
from ostinato.training.plugs import task_loss

TASK = task("mqar", vocabulary=16, length=16, pairs=3, test_size=8)


def _model(seed: int = 0, plan: str = "mom(heads=2)*2") -> Any:
    torch.manual_seed(seed)
    return TokenClassifier(16, 8, plan)


def test_the_term_is_the_loss_over_all_layers() -> None:
    model, batch = _model(), TASK.train_batch(0, 4, 0)
    with router_logits(model) as logits:
        plain, _ = task_loss(model, TASK, batch, None)
    whole, _ = balanced(weight=0.5)(model, TASK, batch, None)
    assert len(logits) == 2
    torch.testing.assert_close(whole - plain, 0.5 * load_balancing_loss(logits, 4, 2), rtol=1e-5, atol=1e-6)
    whole.backward()
    assert all(float(block.mixer.router.weight.grad.abs().max()) > 0 for block in model.backbone.blocks)


def test_fit_balances_a_router_that_prefers_one_memory() -> None:
    after = {}
    for weight in (0.0, 1.0):
        model = _model(1)
        router = model.backbone.blocks[0].mixer.router
        with torch.no_grad():
            router.weight.mul_(0.1).add_(torch.tensor([[0.2], [0.1], [-0.1], [-0.2]]))
        options: dict[str, Any] = {"steps": 30, "batch_size": 8, "learning_rate": 3e-2, "weight_decay": 0.0}
        fit(model, TASK, objective=balanced(weight=weight), progress=False, device="cpu", evaluate_every=0, **options)
        with load_balance(model) as term:
            model(TASK.train_batch(99, 16, 0).inputs)
        after[weight] = term().item() / 0.01
    assert after[1.0] < after[0.0]
    assert after[1.0] == pytest.approx(2.0, abs=0.1)


def test_members_of_an_ensemble_are_balanced_each_for_itself() -> None:
    options: dict[str, Any] = {"steps": 3, "batch_size": 4, "warmup": 1, "device": "cpu", "added_loss": load_balance}
    together = [
        {name: value.clone() for name, value in model.state_dict().items()}
        for model in fit_together(_model, TASK, (0, 1), **options)
    ]
    single = [
        {name: value.clone() for name, value in model.state_dict().items()}
        for seed in (0, 1)
        for model in fit_together(_model, TASK, (seed,), **options)
    ]
    for mine, alone in zip(together, single, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)


def test_loads_are_shares() -> None:
    found = loads(_model(), TASK.train_batch(0, 4, 0).inputs)
    assert len(found) == 2 and all(sum(layer) == pytest.approx(2.0) for layer in found)


def test_errors() -> None:
    with pytest.raises(ConfigurationError, match="no mixture of memories"), load_balance(_model(plan="gla")):
        pass
    model = _model()
    with load_balance(model) as term:
        model(TASK.train_batch(0, 4, 0).inputs)
        model(TASK.train_batch(0, 4, 0).inputs)
        with pytest.raises(ConfigurationError, match="once each"):
            term()
