"""Where a run's numbers go: the history, metrics.jsonl, TensorBoard, the bar."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ostinato._version import __version__
from ostinato.errors import ConfigurationError
from ostinato.files import FORMAT_VERSION, write_json
from ostinato.tasks.base import Metrics
from ostinato.training.history import MetricsFile, read_metrics
from ostinato.training.progress import ProgressBar, Silent
from ostinato.training.run import Run


class Log:
    """Writes as things happen; what it opens is closed by the stack it is given."""

    def __init__(
        self, run: Run, stack: ExitStack, settings: dict[str, Any], steps: int, progress: bool, tensorboard: bool
    ) -> None:
        self._run = run
        self._file: MetricsFile | None = None
        self._board: Any = None
        main = run.accelerator.is_main_process
        if run.directory is not None and main:
            run.directory.mkdir(parents=True, exist_ok=True)
            before = read_metrics(run.directory / "metrics.jsonl", run.step)
            for line in before:
                run.history.add(line)
            self._file = MetricsFile(run.directory / "metrics.jsonl", before)
            stack.callback(self._file.close)
            header = {"format": "ostinato", "version": FORMAT_VERSION, "kind": "run", **settings}
            versions = {"ostinato": __version__, "torch": torch.__version__}
            write_json(
                run.directory / "run.json",
                {**header, "model": getattr(run.model, "config", None), "versions": versions},
            )
        if tensorboard and main:
            self._board = _tensorboard(run.directory)
            stack.callback(self._board.close)
        show = progress and main and run.step < steps
        self.bar: ProgressBar | Silent = ProgressBar(steps, run.step, run.task.metric) if show else Silent()
        stack.callback(self.bar.close)
        times = [*run.history.seconds[-1:], *(e.seconds for e in run.history.evaluations[-1:])]
        self._start = time.perf_counter() - max(times, default=0.0)

    def _write(self, line: dict[str, Any]) -> None:
        self._run.history.add(line)
        if self._file is not None:
            self._file.write(line)

    def step(self, loss: float, norm: float, tokens: int, finite: bool) -> None:
        """Take in a step that was done, or skipped."""
        run = self._run
        self._write(
            {
                "step": run.step,
                "loss": loss if finite else None,
                "learning_rate": max(group["lr"] for group in run.optimizer.param_groups),
                "gradient_norm": norm if finite else None,
                "tokens": run.history.tokens + tokens,
                "seconds": round(time.perf_counter() - self._start, 4),
            }
        )
        if finite:
            self.bar.step(run.step, loss, tokens)
            if self._board is not None:
                self._board.add_scalar("train/loss", loss, run.step)
                self._board.add_scalar("train/gradient_norm", norm, run.step)

    def evaluation(self, metrics: Metrics) -> None:
        """Take in scores."""
        step = self._run.step
        self._write({"step": step, "seconds": round(time.perf_counter() - self._start, 4), "metrics": metrics})
        self.bar.evaluation(step, metrics)
        self.flush()
        for name, value in metrics.items() if self._board is not None else ():
            self._board.add_scalar(f"test/{name}", value, step)

    def flush(self) -> None:
        """Hand what is written to the system."""
        if self._file is not None:
            self._file.flush()


def _tensorboard(directory: Path | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigurationError("tensorboard=True needs it installed: pip install 'ostinato[tensorboard]'") from error
    if directory is None:
        raise ConfigurationError("tensorboard=True needs a directory to write to")
    return SummaryWriter(str(directory / "tensorboard"))
