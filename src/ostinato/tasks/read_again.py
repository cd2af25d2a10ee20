"""A task whose prompt is read again: the first part of every sequence, several times over, then the rest.

Source: Just read twice (arXiv 2407.05483), JRT-Prompt; here on tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ostinato.tasks.base import Batch, Task, require
from ostinato.tasks.recall import MultiQueryRecall


@dataclass
class ReadAgain(Task):
    """The `context` first tokens of the task's sequences `readings` times, then what follows them, scored as before.

    In the first readings nothing is scored. With one reading it is the task itself. Sequences have no resets.
    """

    name: ClassVar[str] = "read_again"

    task: Task = field(default_factory=lambda: MultiQueryRecall(length=128, pairs=16))
    context: int = 32
    """How many tokens are read again; those of 16 pairs."""
    readings: int = 2

    def __post_init__(self) -> None:
        require(self.context >= 1 and self.readings >= 1, "context and readings must be positive")
        require(not self.task.carries_state, "a task that carries its state has no prompt of its own")

    @property
    def vocab_size(self) -> int:
        """The task's."""
        return self.task.vocab_size

    @property
    def num_classes(self) -> int:
        """The task's."""
        return self.task.num_classes

    @property
    def chance(self) -> float:
        """The task's."""
        return self.task.chance

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The task's, read again."""
        return self._again(self.task.train_batch(step, batch_size, seed))

    def test_batches(self) -> Iterator[Batch]:
        """The task's, read again."""
        return map(self._again, self.task.test_batches())

    def _again(self, batch: Batch) -> Batch:
        require(batch.reset is None, "a row of several sequences has no one prompt")
        times = self.readings - 1
        head = batch.inputs[:, : self.context]
        nothing = torch.zeros(head.shape[0], times * head.shape[1], dtype=torch.bool)
        return batch._replace(
            inputs=torch.cat([head] * times + [batch.inputs], dim=1),
            targets=torch.cat([batch.targets[:, : self.context]] * times + [batch.targets], dim=1),
            mask=torch.cat([nothing, batch.mask], dim=1),
        )
