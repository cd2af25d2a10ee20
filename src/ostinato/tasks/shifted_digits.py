"""Digits that are moved about while they are learned: every training image by up to a pixel each way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ostinato.tasks.base import _TRAIN, Batch, require
from ostinato.tasks.digits import Digits

_SIDE = 8


@dataclass(kw_only=True)
class ShiftedDigits(Digits):
    """`Digits`, each training image moved by up to `shift` pixels down and across, at random; test images stay.

    What comes in at an edge is background (−1).
    """

    name: ClassVar[str] = "shifted_digits"

    shift: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.shift < _SIDE, f"shift lies in 0 … {_SIDE - 1}, got {self.shift}")
        require(self.order == "rows", "an image can be moved when its pixels come in rows")

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The next images, moved."""
        batch = super().train_batch(step, batch_size, seed)
        rng = np.random.default_rng([_TRAIN, seed, step, 78])
        moves = torch.from_numpy(rng.integers(-self.shift, self.shift + 1, (2, batch_size, 1)))
        images = batch.inputs.view(batch_size, _SIDE, _SIDE)
        rows, columns = (torch.arange(_SIDE) - move for move in moves)
        inside = [(index >= 0) & (index < _SIDE) for index in (rows, columns)]
        picked = images.gather(1, rows.clamp(0, _SIDE - 1).unsqueeze(2).expand(-1, -1, _SIDE))
        picked = picked.gather(2, columns.clamp(0, _SIDE - 1).unsqueeze(1).expand(-1, _SIDE, -1))
        seen = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
        return batch._replace(inputs=torch.where(seen, picked, -1.0).view_as(batch.inputs))
