"""Scoring a model on a task's test set."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice

import torch
from torch import nn

from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Metrics, Task
from ostinato.training.carry import CarriedState


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, *, batches: int | None = None) -> Metrics:
    """Every score of the task, over its test set (or its first `batches` batches).

    Scores of the parts of the test set follow as "accuracy/length 256". Where the task carries state, each batch goes
    on from the state at the end of the one before. Dropout is off; the model's mode is put back.
    """
    if batches is not None and batches < 1:
        raise ConfigurationError(f"batches must be positive, got {batches}")
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    carried = CarriedState(task.carries_state)
    training = model.training
    model.eval()
    try:
        for batch in islice(task.test_batches(), batches):
            batch = batch.to(device)
            logits, state = model(batch.inputs, carried.value, reset=batch.reset)
            carried.update(state)
            for name, (total, count) in task.score(logits, batch).items():
                for key in (name, f"{name}/{batch.split}") if batch.split else (name,):
                    totals[key][0] += total
                    totals[key][1] += count
    finally:
        model.train(training)
    return {name: total / count for name, (total, count) in sorted(totals.items(), key=_by_split) if count}


def _by_split(item: tuple[str, list[float]]) -> bool:
    """The whole before its parts; otherwise in the order of appearance."""
    return "/" in item[0]
