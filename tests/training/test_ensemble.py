from __future__ import annotations

import pytest
import torch
from torch import nn

from ostinato.errors import ConfigurationError, DivergenceError
from ostinato.models.token_classifier import TokenClassifier
from ostinato.tasks.arithmetic import Parity
from ostinato.training.ensemble import fit_seeds, fit_together
from ostinato.training.fit import fit

TASK = Parity(min_length=2, max_length=8, tested_lengths=(8,), test_size=8)


def _build(plan: str):
    def build(seed: int) -> TokenClassifier:
        return TokenClassifier(3, 8, plan)

    return build


@pytest.mark.parametrize(
    "plan", ["delta_net(heads=2, conv=None, negative_eigenvalues=True)", "mamba(d_state=2)", "lstm"]
)
def test_each_member_is_what_fit_gives_alone(plan: str) -> None:
    options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup": 2, "clip": 0.5}
    together = fit_together(_build(plan), TASK, (3, 8), device="cpu", final_learning_rate=0.1, **options)
    assert len(together) == 2 and together.seeds == (3, 8)
    for seed, member in zip((3, 8), together, strict=True):
        torch.manual_seed(seed)
        alone = _build(plan)(seed)
        fit(alone, TASK, seed=seed, device="cpu", evaluate_every=0, progress=False, **options)
        for (name, ours), wanted in zip(member.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(
                ours, wanted, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_losses_and_progress_are_told() -> None:
    said: list[str] = []
    found = fit_together(_build("min_gru"), TASK, (0, 1), steps=20, batch_size=4, device="cpu", say=said.append)
    assert len(found.losses) == len(said) == 10 and all(len(losses) == 2 for losses in found.losses)
    assert said[-1].startswith("step 20 of 20, loss ")


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fit_together(_build("min_gru"), TASK, (0,), steps=1, batch_size=2, device="cpu")
    assert torch.equal(torch.rand(3), wanted)


def test_a_member_that_diverges_is_named() -> None:
    def build(seed: int) -> TokenClassifier:
        model = TokenClassifier(3, 8, "min_gru")
        if seed == 7:
            nn.init.constant_(model.head.weight, torch.inf)
        return model

    with pytest.raises(DivergenceError, match="seed 7"):
        fit_together(build, TASK, (0, 7), steps=40, batch_size=2, device="cpu", max_skipped=2)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one seed"):
        fit_together(_build("min_gru"), TASK, (), steps=1)

    class Buffered(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("offset", torch.zeros(2))

    with pytest.raises(ConfigurationError, match="Buffered has buffers"):
        fit_together(lambda seed: Buffered(), TASK, (0,), steps=1)


@pytest.mark.parametrize("gpu", [False, True])
def test_seeds_are_one_batch_on_a_gpu_and_the_same_models_anyway(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = list(fit_seeds(_build("min_gru"), TASK, (3, 5), steps=2, batch_size=2, device="cpu"))
    assert len(found) == (1 if gpu else 2)
    together = fit_together(_build("min_gru"), TASK, (3, 5), steps=2, batch_size=2, device="cpu")
    for model, wanted in zip((model for ensemble in found for model in ensemble), together, strict=True):
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
