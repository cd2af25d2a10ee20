"""A very small model and a very small text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ostinato.mixers.registry import mixer
from ostinato.tasks.text import Text


class Small(nn.Module):
    """Embedding, one mixer, head; with dropout, so that random states matter."""

    def __init__(self, vocab_size: int, width: int = 8, name: str = "min_gru", dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.mixer = mixer(name, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.embedding(tokens), state, reset=reset)
        return self.head(self.dropout(y)), state


@pytest.fixture
def small() -> Callable[..., Small]:
    """Builds the same small model each time."""

    def build(vocab_size: int = 256, seed: int = 0, **options: Any) -> Small:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Small(vocab_size, **options)

    return build


@pytest.fixture
def text(tmp_path: Path) -> Text:
    """A thousand characters in windows of 16."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 1000).tolist()))
    return Text(files=(str(path),), window=16, test_rows=4)
