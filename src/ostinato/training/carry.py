"""The state between two windows of the same text."""

from __future__ import annotations

from typing import Any

import torch

import ostinato.state


class CarriedState:
    """Hands the state at the end of one window to the next, without its gradient.

    A recurrent state keeps its size. Full attention's does not: a state that is still growing after `limit` windows
    is dropped, and the rows begin again, so that memory stays bounded.
    """

    def __init__(self, carries: bool, limit: int = 8) -> None:
        self.carries = carries
        self.limit = limit
        self.value: Any = None
        self.windows = 0
        self.bytes = 0

    def update(self, state: Any) -> None:
        """Keep the state that a window ended with."""
        if not self.carries:
            return
        self.value = ostinato.state.detach(state)
        size = ostinato.state.num_bytes(self.value)
        self.windows += 1
        grows = size > self.bytes
        self.bytes = size
        if grows and self.windows >= self.limit:
            self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.value, self.windows, self.bytes = None, 0, 0

    def clear_unless_finite(self) -> None:
        """Begin anew if the state holds NaN or infinity."""
        if not all(bool(torch.isfinite(leaf).all()) for _, leaf in ostinato.state.leaves(self.value)):
            self.clear()

    def rows(self, start: int, stop: int) -> Any:
        """The state of some of the rows."""
        return ostinato.state.map(lambda leaf: leaf[start:stop], self.value)
