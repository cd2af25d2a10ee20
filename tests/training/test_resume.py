from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ostinato
from ostinato.errors import CheckpointError, ConfigurationError
from ostinato.files import read_tensors
from ostinato.tasks.base import Task
from ostinato.tasks.registry import task
from ostinato.tasks.text import Text
from ostinato.training.checkpoints import last_checkpoint
from ostinato.training.fit import fit
from ostinato.training.history import History

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "device": "cpu"}


def _stop_at(step: int) -> list[Callable[[Any], bool]]:
    return [lambda report: report.step == step]


@pytest.mark.parametrize("name", ["text", "word_problem", "language model"])
def test_ten_and_ten_steps_are_twenty(small: Callable[..., Any], text: Text, tmp_path: Path, name: str) -> None:
    """Bit for bit: losses, weights, evaluations; with dropout, carried states, momentum and a moving rate."""
    chosen: Task = task("word_problem", length=6, tested_lengths=(6,), test_size=8) if name == "word_problem" else text

    def build(seed: int) -> torch.nn.Module:
        if name != "language model":
            return small(chosen.vocab_size, seed=seed)
        torch.manual_seed(seed)
        return ostinato.LanguageModel(d_model=16, plan="min_gru, attention(window=8)", depth=2, dropout=0.1)

    options: dict[str, Any] = {**QUIET, "steps": 20, "evaluate_every": 4, "checkpoint_every": 7}
    whole = build(0)
    straight = fit(whole, chosen, directory=tmp_path / "straight", **options)
    first = build(0)
    fit(first, chosen, directory=tmp_path / "parts", callbacks=_stop_at(10), **options)
    second = build(5)  # other weights: all comes from the checkpoint
    parts = fit(second, chosen, directory=tmp_path / "parts", resume=True, **options)

    assert parts.losses == straight.losses and parts.gradient_norms == straight.gradient_norms
    assert parts.learning_rates == straight.learning_rates and parts.tokens == straight.tokens
    assert [(e.step, e.metrics) for e in parts.evaluations] == [(e.step, e.metrics) for e in straight.evaluations]
    for (key, mine), theirs in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    for file in ("optimizer", "random", *(["state"] if chosen.carries_state else [])):
        left, right = (
            read_tensors(tmp_path / run / "checkpoints" / "step-00000020" / f"{file}.safetensors")[0]
            for run in ("straight", "parts")
        )
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), file
    assert parts.seconds == sorted(parts.seconds)


def test_lines_after_the_checkpoint_are_forgotten(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    run = tmp_path / "run"
    straight = fit(small(), text, steps=8, checkpoint_every=3, directory=run, keep_checkpoints=9, **QUIET)
    # As if killed after step 8, with the checkpoint of step 6 the last, and a line cut short.
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    resumed = fit(small(), text, steps=8, checkpoint_every=3, directory=run, resume=True, **QUIET)
    assert resumed.steps == straight.steps and resumed.losses == straight.losses
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8 + len(resumed.evaluations)


def test_resuming_a_finished_run_changes_nothing(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    first = fit(small(), text, steps=3, directory=tmp_path / "run", **QUIET)
    again = fit(small(), text, steps=3, directory=tmp_path / "run", resume=True, **QUIET)
    assert again.finished and again.losses == first.losses and again.final == first.final


def test_a_run_can_be_made_longer(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    fit(small(), text, steps=3, directory=tmp_path / "run", **QUIET)
    longer = fit(small(), text, steps=5, directory=tmp_path / "run", resume=True, **QUIET)
    assert longer.steps == [1, 2, 3, 4, 5] and longer.finished


def test_a_run_is_not_overwritten(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    fit(small(), text, steps=1, directory=tmp_path / "run", **QUIET)
    with pytest.raises(ConfigurationError, match="pass resume=True"):
        fit(small(), text, steps=1, directory=tmp_path / "run", **QUIET)


def test_killed_before_the_first_checkpoint(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    def die(report: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(small(), text, steps=3, checkpoint_every=2, directory=tmp_path / "run", callbacks=[die], **QUIET)
    resumed = fit(small(), text, steps=3, directory=tmp_path / "run", resume=True, **QUIET)
    assert resumed.steps == [1, 2, 3] and resumed.losses == fit(small(), text, steps=3, **QUIET).losses


def test_no_run_to_resume(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run in"):
        fit(small(), text, steps=1, directory=tmp_path / "nowhere", resume=True, **QUIET)


def test_another_task_or_batch_size(small: Callable[..., Any], text: Text, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(small(), text, steps=1, directory=run, **QUIET)
    other = Text(files=text.files, window=8)
    with pytest.raises(ConfigurationError, match="of the task text"):
        fit(small(), other, steps=2, directory=run, resume=True, **QUIET)
    with pytest.raises(ConfigurationError, match="batch_size=4, not 8"):
        fit(small(), text, steps=2, directory=run, resume=True, **{**QUIET, "batch_size": 8})
    with pytest.raises(CheckpointError, match="weights of another model"):
        fit(small(width=16), text, steps=2, directory=run, resume=True, **QUIET)


SCRIPT = """
import sys
import torch
import ostinato
from ostinato.tasks.text import Text
from ostinato.training.fit import fit

run, file, steps = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
model = ostinato.LanguageModel(d_model=8, plan="min_gru", depth=1, dropout=0.1)
fit(model, Text(files=(file,), window=16, test_rows=4), steps=int(steps), batch_size=4, checkpoint_every=5,
    evaluate_every=0, directory=run, progress=False, device="cpu", schedule=lambda step: 1.0)
"""


def _in_process(run: Path, text: Text, steps: int, resume: bool) -> History:
    """The same run as the script's."""
    torch.manual_seed(0)
    model = ostinato.LanguageModel(d_model=8, plan="min_gru", depth=1, dropout=0.1)
    options: dict[str, Any] = {"checkpoint_every": 5, "evaluate_every": 0, "schedule": lambda step: 1.0, **QUIET}
    return fit(model, text, steps=steps, directory=run, resume=resume, **options)


def test_kill_dash_nine(text: Text, tmp_path: Path) -> None:
    """Killed at any moment, a run goes on from its last checkpoint, along the curve of one never stopped."""
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(killed), text.files[0], "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    try:
        while not (killed / "checkpoints" / "step-00000025").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the run did not get to step 25 in two minutes"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    found = last_checkpoint(killed)
    assert found is not None
    step = int(found.name.removeprefix("step-"))
    assert step >= 20 and step % 5 == 0
    resumed = _in_process(killed, text, step + 7, resume=True)
    straight = _in_process(tmp_path / "straight", text, step + 7, resume=False)
    assert resumed.losses == straight.losses and len(resumed.losses) == step + 7
    assert not [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]


def test_full_disk(text: Text, tmp_path: Path) -> None:
    """A write that fails half-way (here: a limit on the size of files) leaves the old checkpoint whole."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    first = _in_process(run, text, 5, resume=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not save .*step-00000010: .*step-00000005, is whole"):
            _in_process(run, text, 10, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.json", "step-00000005"]
    assert _in_process(run, text, 10, resume=True).losses[:5] == first.losses
    assert (run / "checkpoints" / "step-00000010").is_dir()
