from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import ConfigurationError, DivergenceError
from ostinato.tasks.base import Batch, Task
from ostinato.tasks.registry import task
from ostinato.tasks.text import Text
from ostinato.training.fit import Report, fit

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "device": "cpu"}


def _weights(model: torch.nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_it_learns(small: Callable[..., Any]) -> None:
    parity = task("parity", max_length=6, tested_lengths=(6,), test_size=64)
    history = fit(small(3, dropout=0.0), parity, steps=60, **{**QUIET, "batch_size": 16}, learning_rate=0.02)
    assert history.finished and not history.interrupted and not history.skipped
    assert history.steps == list(range(1, 61)) and len(history.seconds) == len(history.losses) == 60
    assert sum(history.losses[-10:]) < 0.8 * sum(history.losses[:10])
    assert history.evaluations[-1].step == 60 and history.final == history.evaluations[-1].metrics["scaled_accuracy"]
    assert history.tokens == 60 * 16 * 7


def test_the_same_seed_gives_the_same_run(small: Callable[..., Any], text: Text) -> None:
    runs = []
    for seed, caller in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        model = small()
        runs.append((fit(model, text, steps=6, seed=seed, **QUIET).losses, _weights(model)))
        assert torch.equal(before, torch.get_rng_state()), "the caller's random state was touched"
    assert runs[0][0] == runs[1][0] and _equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_a_language_model(text: Text, tmp_path: Path) -> None:
    model = ostinato.LanguageModel(d_model=16, plan="min_gru, attention", depth=2)
    history = fit(model, text, steps=10, directory=tmp_path / "run", learning_rate=0.01, **QUIET)
    assert history.losses[-1] < history.losses[0]
    folder = tmp_path / "run" / "checkpoints" / "step-00000010" / "model"
    again = ostinato.LanguageModel.from_pretrained(folder)
    assert _equal(_weights(model), _weights(again))


def test_plain_step_by_hand(small: Callable[..., Any], text: Text) -> None:
    """Two steps of `fit` against the same written out, carried state and clipping included."""
    model, other = small(dropout=0.0), small(dropout=0.0)
    history = fit(model, text, steps=2, warmup=0, clip=0.05, weight_decay=0.0, learning_rate=0.1, **QUIET)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    state, losses = None, []
    for step, rate in enumerate((0.1, 0.01)):
        batch = text.train_batch(step, 4, seed=0)
        logits, state = other(batch.inputs, state)
        state = ostinato.state.detach(state)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-6)
    assert history.learning_rates == pytest.approx([0.1, 0.01])
    for mine, theirs in zip(_weights(model), _weights(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["text", "parity"])
def test_accumulation_changes_nothing(small: Callable[..., Any], text: Text, name: str) -> None:
    chosen: Task = text if name == "text" else task("parity", min_length=1, max_length=8, tested_lengths=(4,))
    losses = []
    for parts in (1, 2, 4):
        model = small(256, dropout=0.0).double()
        losses.append(fit(model, chosen, steps=5, gradient_accumulation=parts, **QUIET).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_state_is_carried(small: Callable[..., Any], text: Text) -> None:
    """With a learning rate of nearly nothing, the losses are those of reading the stripes in one piece."""
    model = small(dropout=0.0)
    history = fit(model, text, steps=4, learning_rate=1e-12, **QUIET)
    state = None
    for step, loss in enumerate(history.losses):
        batch = text.train_batch(step, 4, 0)
        with torch.no_grad():
            logits, state = model(batch.inputs, state)
        assert float(text.loss(logits, batch)) == pytest.approx(loss, rel=1e-5)


def test_bfloat16(small: Callable[..., Any], text: Text) -> None:
    model = small()
    history = fit(model, text, steps=5, mixed_precision="bf16", **QUIET)
    assert all(map(math.isfinite, history.losses)) and next(model.parameters()).dtype == torch.float32
    # The wrapper that casts is gone: the model gives what its own forward gives.
    assert model(torch.zeros(1, 2, dtype=torch.long))[0].dtype == torch.float32
    assert fit(model, text, steps=1, **QUIET).finished, "a second call with another precision works"


def test_files_of_a_run(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    run = tmp_path / "run"
    history = fit(small(), text, steps=7, evaluate_every=3, checkpoint_every=2, directory=run, **QUIET)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "history.json", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["last.json", "step-00000006", "step-00000007"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["step"] for line in lines if "metrics" in line] == [3, 6, 7]
    record = json.loads((run / "run.json").read_text())
    assert record["task"]["name"] == "text" and record["training"]["steps"] == 7
    assert history.load(run / "history.json") == history


def test_callbacks_see_and_stop(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def watch(report: Report) -> bool:
        seen.append((report.step, report.metrics is not None))
        return report.step == 5

    history = fit(small(), text, steps=9, evaluate_every=2, directory=tmp_path / "r", callbacks=[watch], **QUIET)
    assert seen == [(1, False), (2, True), (3, False), (4, True), (5, False)]
    assert not history.finished and not history.interrupted
    assert (tmp_path / "r" / "checkpoints" / "step-00000005").is_dir()


def test_mode_and_training_flag_are_put_back(small: Callable[..., Any], text: Text) -> None:
    model = small().eval()
    fit(model, text, steps=2, callbacks=[lambda report: not report.model.training], **QUIET)
    assert not model.training


class _Spoiled:
    """The text's loss, made NaN at some steps."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, model: Any, task: Task, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        logits, state = model(batch.inputs, state, reset=batch.reset)
        return task.loss(logits, batch) * (float("nan") if self.calls in self.bad else 1.0), state


def test_steps_that_are_not_finite_are_skipped(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    weights: list[list[Tensor]] = []

    def keep(report: Report) -> None:
        weights.append(_weights(report.model))

    model = small()
    history = fit(model, text, steps=6, objective=_Spoiled(2, 4), callbacks=[keep], directory=tmp_path / "run", **QUIET)
    assert history.skipped == [2, 4] and history.steps == [1, 3, 5, 6] and history.finished
    assert all(map(math.isfinite, history.losses))
    assert _equal(weights[0], weights[1]) and _equal(weights[2], weights[3]) and not _equal(weights[1], weights[2])
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_divergence_is_an_error(small: Callable[..., Any], text: Text) -> None:
    with pytest.raises(DivergenceError, match=r"3 steps in a row, up to step 4 .*lower the learning rate"):
        fit(small(), text, steps=9, objective=_Spoiled(2, 3, 4), max_skipped=3, **QUIET)


def test_ctrl_c(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    def press(report: Report) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    history = fit(small(), text, steps=20, directory=tmp_path / "run", callbacks=[press], **QUIET)
    assert history.interrupted and not history.finished and history.steps == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(small: Callable[..., Any], text: Text) -> None:
    def press(report: Report) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(small(), text, steps=20, callbacks=[press], **QUIET)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_progress_bar_is_shown(small: Callable[..., Any], text: Text, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small(), text, steps=4, evaluate_every=2, **{**QUIET, "progress": True})
    shown = capsys.readouterr()
    assert not shown.out and "step 2: bits per byte" in shown.err and "step 4: bits per byte" in shown.err


def test_tensorboard(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigurationError, match="needs a directory"):
        fit(small(), text, steps=2, tensorboard=True, **QUIET)
    fit(small(), text, steps=2, tensorboard=True, directory=tmp_path / "run", **QUIET)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"mixed_precision": "fp8"},
        {"gradient_accumulation": 3},
        {"device": "tpu"},
        {"resume": True},
        {"max_skipped": 0},
        {"evaluation_batches": 0},
        {"checkpoint_every": -1},
        {"learning_rate": float("nan")},
    ],
)
def test_bad_arguments(small: Callable[..., Any], text: Text, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        fit(small(), text, **{**QUIET, **options})


def test_not_a_task(small: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"build one by ostinato\.task"):
        fit(small(), "text", **QUIET)  # type: ignore[arg-type]


def test_a_vocabulary_too_small(small: Callable[..., Any], text: Text) -> None:
    model = small()
    model.vocab_size = 99
    with pytest.raises(ConfigurationError, match="the task text has 256 tokens, the model only 99"):
        fit(model, text, **QUIET)
