from __future__ import annotations

import math
from pathlib import Path

import pytest

from ostinato.errors import CheckpointError
from ostinato.training.history import Evaluation, History, MetricsFile, read_metrics, smooth
from ostinato.training.schedules import warmup_cosine


def _history() -> History:
    history = History("text", "bits_per_byte", False)
    for step in (1, 2, 3):
        line = {"step": step, "loss": 3.0 - step, "learning_rate": 0.1, "gradient_norm": 1.0}
        history.add({**line, "tokens": 10 * step, "seconds": 0.5 * step})
    history.add({"step": 4, "loss": None, "learning_rate": 0.1, "gradient_norm": None, "tokens": 40, "seconds": 2.0})
    for step, value in ((2, 4.0), (3, 3.5), (4, 3.7)):
        history.add({"step": step, "seconds": 1.0, "metrics": {"bits_per_byte": value}})
    return history


def test_lines_add_up() -> None:
    history = _history()
    assert history.steps == [1, 2, 3] and history.losses == [2.0, 1.0, 0.0] and history.skipped == [4]
    assert history.tokens == 40 and history.final == 3.7 and history.best == 3.5
    history.higher_is_better = True
    assert history.best == 4.0
    assert History("text", "loss", False).final is None and History("text", "loss", False).best is None


def test_save_and_load(tmp_path: Path) -> None:
    history = _history()
    history.baselines = {"gzip": 2.5}
    history.save(tmp_path / "history.json")
    again = History.load(tmp_path / "history.json")
    assert again == history and isinstance(again.evaluations[0], Evaluation)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("{}", "not the history of a run"),
        ('{"kind": "history", "format": "ostinato", "version": 99}', "update ostinato"),
        ('{"kind": "history", "format": "ostinato", "version": 1}', "not the history of a run"),
    ],
)
def test_foreign_files(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        History.load(tmp_path / "h.json")


def test_plot(tmp_path: Path) -> None:
    history = _history()
    history.baselines = {"gzip": 2.5}
    history.plot(tmp_path / "folder" / "curves.png")
    assert (tmp_path / "folder" / "curves.png").read_bytes().startswith(b"\x89PNG")
    history.plot(tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    assert read_metrics(path, 9) == []
    file = MetricsFile(path, [{"step": 1}])
    for step in (2, 3):
        file.write({"step": step})
    file.close()
    with open(path, "a") as more:
        more.write('[1]\n{"step": 2, "lo')
    assert read_metrics(path, 9) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_metrics(path, 2) == [{"step": 1}, {"step": 2}]


def test_smooth() -> None:
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    values = [float(i % 2) for i in range(100)]
    assert smooth(values)[0] == 0.0 and smooth(values)[1:] == [0.5] * 99


def test_warmup_and_cosine() -> None:
    factor = warmup_cosine(steps=110, warmup=10, final=0.1)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1) and factor(10) == pytest.approx(1)
    assert factor(109) == pytest.approx(0.1) and factor(500) == pytest.approx(0.1)
    halfway = 10 + 99 / 2
    assert factor(int(halfway)) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 49 / 99)))
    values = [factor(step) for step in range(10, 110)]
    assert values == sorted(values, reverse=True)
    assert warmup_cosine(steps=1, warmup=0)(0) == pytest.approx(1)
