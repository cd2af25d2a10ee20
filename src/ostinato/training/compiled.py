"""The blocks of a model compiled while it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from ostinato.errors import ConfigurationError
from ostinato.models.compiled import compiled


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of every part of a model that keeps them in a list named `blocks`, as a `Backbone` does."""
    lists = [found for module in model.modules() if isinstance(found := getattr(module, "blocks", None), nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def compiled_blocks(model: nn.Module, backend: str = "inductor") -> AbstractContextManager[None]:
    """Compile every block of `model` as long as the context lasts, by a backend of `torch.compile`.

    Raises `ConfigurationError` where there are no blocks, and for a backend that there is not.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigurationError(
            f"{type(model).__name__} has no list of `blocks` to compile; leave compile=False, or compile the model "
            "yourself before training"
        )
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigurationError(f"torch.compile has no backend {backend!r}; known: {', '.join(known)}")
    return compiled(blocks, backend=backend)
