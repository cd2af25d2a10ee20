"""`fit(capture=True)`: the curve of a run without it, in the same memory every step; clear errors where it cannot be.

Without a CUDA device a stand-in replays: it does a step again and writes what comes out where it lay the first time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ostinato
import ostinato.state
from ostinato.errors import BackendError, ConfigurationError
from ostinato.tasks.base import Batch, Task
from ostinato.tasks.text import Text
from ostinato.training import captured
from ostinato.training.captured import Captured, Step
from ostinato.training.fit import fit
from ostinato.training.plugs import backpropagation, task_loss, truncated
from ostinato.training.recorded import Recorded

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "evaluate_every": 0, "checkpoint_every": 0}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")


def build(plan: str = "gated_delta_net(heads=2), min_gru") -> ostinato.LanguageModel:
    torch.manual_seed(0)
    return ostinato.LanguageModel(d_model=32, plan=plan, depth=2, dropout=0.0)


def flat(step: Step) -> list[Tensor]:
    """All that a step computes."""
    return [step.loss, *(leaf for _, leaf in ostinato.state.leaves(step.after)), *step.gradients]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stand-in; how often each kind of step was replayed."""
    counts: list[int] = []

    class StandIn(Recorded):
        def __init__(self, function: Any, device: torch.device) -> None:
            super().__init__(function, device)
            self.step, self.calls, self.index = function.__self__, 0, len(counts)
            counts.append(0)

        def __call__(self) -> None:
            self.calls += 1
            if self.calls <= 4:
                return self.step.run()
            counts[self.index] += 1
            held = self.step.loss, self.step.after, list(self.step.gradients)
            before = flat(self.step)
            self.step.run()
            for old, new in zip(before, flat(self.step), strict=True):
                if old is not None:
                    old.copy_(new)
            self.step.loss, self.step.after, self.step.gradients = held

    monkeypatch.setattr(captured, "Recorded", StandIn)
    return counts


def test_a_recorded_run_is_the_run(text: Text, replays: list[int]) -> None:
    """The first window has no state, the others have one; three of these are done as ever, and one is recorded."""
    plain = fit(build(), text, steps=8, device="cpu", **QUIET)
    found = fit(build(), text, steps=8, device="cpu", capture=True, **QUIET)
    assert found.losses == plain.losses
    assert found.gradient_norms == plain.gradient_norms
    assert replays == [0, 8 - 1 - 4]


def test_kinds_are_recorded_apart_and_not_without_end(replays: list[int]) -> None:
    model = build("min_gru")
    task = ostinato.task("text", corpus="stdlib", window=8, max_bytes=20_000)
    rows = (4, 3, 2, 4, 3, 4, 3, 4, 3, 2, 4, 4)

    def losses(rule: Any) -> list[float]:
        found = []
        for step, count in enumerate(rows):
            model.zero_grad()
            loss, _ = rule(model, task, task.train_batch(step, count, 0), None, task_loss, Tensor.backward)
            found += [float(loss), *(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)]
        return found

    wanted = losses(backpropagation)
    assert losses(Captured(backpropagation, most=2)) == wanted
    assert replays == [rows.count(4) - 4, rows.count(3) - 4]


def test_where_there_is_no_gpu_nothing_changes(text: Text) -> None:
    plain = fit(build(), text, steps=6, device="cpu", **QUIET)
    assert fit(build(), text, steps=6, device="cpu", capture=True, **QUIET).losses == plain.losses


def test_steps_that_are_not_alike(text: Text) -> None:
    with pytest.raises(ConfigurationError, match=r"gradient_accumulation=1.* 2 and 'no'"):
        fit(build(), text, steps=1, capture=True, gradient_accumulation=2, **QUIET)


def test_a_refusal_is_told(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Recorded):
        def __call__(self) -> None:
            super().__call__()
            self.refused = "it asks for a number"

    monkeypatch.setattr(captured, "Recorded", Refusing)
    with pytest.raises(BackendError, match="train without capture: it asks for a number"):
        fit(build(), text, steps=1, device="cpu", capture=True, **QUIET)


@on_gpu
def test_what_a_device_refuses(text: Text) -> None:
    with pytest.raises(ConfigurationError, match="'fp16'"):
        fit(build(), text, steps=1, capture=True, mixed_precision="fp16", **QUIET)
    with pytest.raises(BackendError, match="train without capture"):
        fit(build(), text, steps=9, capture=True, gradient=truncated(8), **QUIET)


@on_gpu
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_on_a_device(text: Text, mixed_precision: str) -> None:
    plain = fit(build(), text, steps=12, mixed_precision=mixed_precision, **QUIET)
    found = fit(build(), text, steps=12, mixed_precision=mixed_precision, capture=True, **QUIET)
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)
    assert found.losses[-1] < found.losses[0]


class Noisy(nn.Module):
    """Dropout before an embedding's readout: the masks of two steps must differ."""

    vocab_size = 256

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout, self.read = nn.Embedding(256, 16), nn.Dropout(0.5), nn.Linear(16, 256)

    def forward(self, tokens: Tensor, state: Any = None, reset: Any = None) -> tuple[Tensor, Any]:
        return self.read(self.dropout(self.embed(tokens))), state


@on_gpu
def test_random_numbers_differ_from_step_to_step() -> None:
    class Same(Task):
        name, vocab_size, chance = "same", 256, 1 / 256

        def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
            ones = torch.ones(batch_size, 16, dtype=torch.long)
            return Batch(ones, ones, ones.bool())

        def test_batches(self) -> Any:
            yield self.train_batch(0, 2, 0)

    losses = fit(Noisy(), Same(), steps=12, capture=True, learning_rate=0.0, **QUIET).losses
    assert len(set(losses)) == len(losses)
