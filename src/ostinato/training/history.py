"""What happened in a run: losses, evaluations, times; as numbers, as JSON, as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ostinato.errors import CheckpointError
from ostinato.files import FORMAT_VERSION, check_version, read_json, write_atomically, write_json
from ostinato.tasks.base import Metrics


@dataclass
class Evaluation:
    """Scores after some step."""

    step: int
    seconds: float
    metrics: Metrics


@dataclass
class History:
    """The record of a run. Lists run along steps: `losses[i]` belongs to `steps[i]`, counted from 1."""

    task: str
    metric: str
    higher_is_better: bool
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The objective, before the step's update."""
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    """Before clipping."""
    seconds: list[float] = field(default_factory=list)
    """Since the start, evaluations and checkpoints included, pauses of an interrupted run not."""
    tokens: int = 0
    """Tokens seen in training."""
    skipped: list[int] = field(default_factory=list)
    """Steps without an update, because their loss or gradient was not finite."""
    evaluations: list[Evaluation] = field(default_factory=list)
    baselines: Metrics = field(default_factory=dict)
    """For the picture; filled by whoever measured them."""
    interrupted: bool = False
    """Whether Ctrl-C ended it before its time."""
    finished: bool = False
    """Whether all steps asked for were done."""

    @property
    def final(self) -> float | None:
        """The metric of the last evaluation."""
        return self.evaluations[-1].metrics[self.metric] if self.evaluations else None

    @property
    def best(self) -> float | None:
        """The best metric of all evaluations."""
        values = [evaluation.metrics[self.metric] for evaluation in self.evaluations]
        if not values:
            return None
        return max(values) if self.higher_is_better else min(values)

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        if "metrics" in line:
            self.evaluations.append(Evaluation(line["step"], line["seconds"], dict(line["metrics"])))
            return
        self.tokens = line["tokens"]
        if line["loss"] is None:
            self.skipped.append(line["step"])
            return
        self.steps.append(line["step"])
        self.losses.append(line["loss"])
        self.learning_rates.append(line["learning_rate"])
        self.gradient_norms.append(line["gradient_norm"])
        self.seconds.append(line["seconds"])

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, {"format": "ostinato", "version": FORMAT_VERSION, "kind": "history", **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote; raises `CheckpointError` for anything else."""
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("kind", None) != "history":
            raise CheckpointError(f"{path} is not the history of a run")
        check_version(path, content.pop("format", None), content.pop("version", None))
        try:
            content["evaluations"] = [Evaluation(**evaluation) for evaluation in content["evaluations"]]
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not the history of a run: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Draw loss and metric over the steps, baselines as lines; the ending decides the format (png, svg, pdf)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        left.plot(self.steps, self.losses, color="0.75", linewidth=0.8)
        left.plot(self.steps, smooth(self.losses), color="C0")
        left.set(xlabel="step", ylabel="training loss")
        values = [evaluation.metrics[self.metric] for evaluation in self.evaluations]
        right.plot([evaluation.step for evaluation in self.evaluations], values, "o-", markersize=3, color="C0")
        for index, (name, value) in enumerate(self.baselines.items()):
            right.axhline(value, color=f"C{index + 1}", linestyle="--", linewidth=0.9, label=name)
        right.set(xlabel="step", ylabel=f"{self.metric.replace('_', ' ')} on the test set")
        if self.baselines:
            right.legend(fontsize="small")
        figure.suptitle(self.task)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def smooth(values: list[float]) -> list[float]:
    """The mean of the last fiftieth of the run up to each step."""
    width = max(1, len(values) // 50)
    total, out = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        out.append(total / min(index + 1, width))
    return out


def read_metrics(path: Path, up_to: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to a step; a line that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= up_to:
            lines.append(line)
    return lines


class MetricsFile:
    """metrics.jsonl: one line for each step and each evaluation, as they happen."""

    def __init__(self, path: Path, lines: Iterable[dict[str, Any]] = ()) -> None:
        """Begin the file anew with `lines`, atomically: the old file or the new one, never half of one."""

        def write(temporary: Path) -> None:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

        write_atomically(path, write)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Hand everything to the disk's cache, so that it survives the death of this process."""
        self._file.flush()

    def close(self) -> None:
        """Finish."""
        self._file.close()
