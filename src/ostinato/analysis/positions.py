"""How far a trained model stays right: accuracy at every position of sequences longer than the trained ones.

For a causal model and a task that asks at every prefix, position t of one long test set is the test of length t.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ostinato.errors import DataError
from ostinato.tasks.base import Batch


class PositionAccuracy(NamedTuple):
    """Shares of right answers, one for each scored position, and the number of sequences they are shares of."""

    positions: list[int]
    """The scored positions, in tokens from 0: with a start token, position t follows t symbols."""
    each: list[float]
    """Right at this position."""
    so_far: list[float]
    """Right at this and every scored position before: the sequence accuracy at this length."""
    sequences: int


@torch.no_grad()
def accuracy_by_position(model: nn.Module, batches: Iterable[Batch]) -> PositionAccuracy:
    """Accuracy at every scored position, over batches of one length whose masks are the same in every row.

    Dropout is off; the model's mode is put back. Raises `DataError` for batches of several lengths or masks, or none.
    """
    device = next(model.parameters()).device
    each = so_far = mask = None
    sequences = 0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            if mask is None:
                mask = batch.mask[0]
                each = torch.zeros(int(mask.sum()), dtype=torch.float64)
                so_far = torch.zeros_like(each)
            if batch.mask.shape[1:] != mask.shape or not bool((batch.mask == mask).all()):
                raise DataError("accuracy by position needs sequences that are all scored at the same positions")
            batch = batch.to(device)
            logits, _ = model(batch.inputs, reset=batch.reset)
            right = (logits.argmax(-1) == batch.targets).cpu()[:, mask].double()
            each += right.sum(0)
            so_far += right.cumprod(1).sum(0)
            sequences += len(right)
    finally:
        model.train(training)
    if mask is None or each is None or so_far is None:
        raise DataError("accuracy by position needs at least one batch")
    positions = mask.nonzero().flatten().tolist()
    return PositionAccuracy(positions, (each / sequences).tolist(), (so_far / sequences).tolist(), sequences)
