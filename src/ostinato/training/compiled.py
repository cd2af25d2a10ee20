"""The blocks of a model compiled while it trains: `torch.compile` of each, in place.

Blocks of one kind share one compiled function, so that what is paid at the start does not grow with depth. Names of
parameters, and so checkpoints, stay as they are: the modules themselves are not replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ostinato.errors import ConfigurationError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of every part of a model that keeps them in a list named `blocks`, as a `Backbone` does."""
    lists = [found for module in model.modules() if isinstance(found := getattr(module, "blocks", None), nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


@contextmanager
def compiled_blocks(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
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
    before = [block._compiled_call_impl for block in blocks]
    # Each kind of block is compiled for training and for evaluation, with and without a state to go on from.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    try:
        for block in blocks:
            block.compile(backend=backend)
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        for block, call in zip(blocks, before, strict=True):
            block._compiled_call_impl = call
