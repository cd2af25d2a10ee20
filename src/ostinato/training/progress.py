"""What a run shows while it runs: a bar, and one line for each evaluation."""

from __future__ import annotations

import time
from typing import Any

from ostinato.tasks.base import Metrics


class ProgressBar:
    """A rich bar with loss, metric, tokens per second and the time left; without a terminal, lines only."""

    def __init__(self, steps: int, start: int, metric: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._metric = metric
        self._console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[score]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._id = self._bar.add_task("", total=steps, completed=start, loss="…", score="", speed="…")
        self._smooth: float | None = None
        self._tokens, self._since = 0, time.perf_counter()
        self._bar.start()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """Show a step done: its loss (averaged over about twenty), and the tokens it took."""
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        self._tokens += tokens
        speed = self._tokens / max(1e-9, time.perf_counter() - self._since)
        self._bar.update(self._id, completed=step, loss=f"{self._smooth:.3f}", speed=f"{speed:,.0f}")

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Show scores."""
        text = f"{self._metric.replace('_', ' ')} {metrics[self._metric]:.4f}"
        self._bar.update(self._id, score=text)
        self.say(
            f"step {step}: {text}, loss {self._smooth:.4f}" if self._smooth is not None else f"step {step}: {text}"
        )

    def say(self, text: Any) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, highlight=False)

    def close(self) -> None:
        """Take the bar down."""
        self._bar.stop()


class Silent:
    """Shows nothing."""

    def step(self, step: int, loss: float, tokens: int) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Nothing."""

    def say(self, text: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
