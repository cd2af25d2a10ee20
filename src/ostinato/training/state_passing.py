"""Training on sequences that are longer than a window: the state is carried over some windows, without its gradient.

    fit(model, StatePassing(task("recall_stream", recent=12), windows=12))

Source: Stuffed Mamba (arXiv 2410.07145), section 5: twelve windows, then the state begins anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ostinato.tasks.base import Batch, GeneratedTask, require


@dataclass
class StatePassing(GeneratedTask):
    """A task whose training sequences are `windows` times as long, and shown window by window.

    Step s shows window s mod windows of a sequence of `windows` · task.length tokens, which the task draws as a
    training sequence of that length. Every window must ask something. Tests are the task's own.

    Raises `ConfigurationError` for fewer than one window, and for a task without a `length`.
    """

    name: ClassVar[str] = "state_passing"
    carries_state: ClassVar[bool] = True

    task: Any
    windows: int = 12
    _drawn: tuple[tuple[int, int, int], Batch] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.windows >= 1, f"there must be at least one window, got {self.windows}")
        require(hasattr(self.task, "length"), f"{self.task!r} has no length that could be made longer")
        self.seed, self.test_size = self.task.seed, self.task.test_size
        require(
            self.test_size <= 64 or self.test_size % 64 == 0,
            f"test batches must be of one size: a test_size of at most 64 or a multiple of it, got {self.test_size}",
        )

    @property
    def vocab_size(self) -> int:
        """The task's."""
        return int(self.task.vocab_size)

    @property
    def chance(self) -> float:
        """The task's."""
        return float(self.task.chance)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """The task's."""
        return tuple(self.task.test_lengths)

    def generate(self, rng: Any, rows: int, length: int | None = None) -> Batch:
        """The task's sequences, the long ones if no length is given."""
        return (self.task if length is not None else self._long()).generate(rng, rows, length)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """One window; `reset` marks the first step of each long sequence."""
        whole, window = divmod(step, self.windows)
        wanted = (whole, batch_size, seed)
        if self._drawn is None or self._drawn[0] != wanted:
            self._drawn = wanted, self._long().train_batch(*wanted)
        batch = self._drawn[1].steps(window * self.task.length, (window + 1) * self.task.length)
        return batch._replace(reset=_begins(batch) if window == 0 else torch.zeros_like(batch.mask))

    def test_batches(self) -> Iterator[Batch]:
        """The task's; each begins anew."""
        for batch in self.task.test_batches():
            yield batch._replace(reset=_begins(batch))

    def options(self) -> dict[str, Any]:
        """The task's, and how many windows."""
        return {"task": {"name": self.task.name, **self.task.options()}, "windows": self.windows}

    def _long(self) -> Any:
        return dataclasses.replace(self.task, length=self.windows * self.task.length)


def _begins(batch: Batch) -> torch.Tensor:
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    return first
