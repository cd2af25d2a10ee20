"""A promise about calls that follow one another, by which a device may begin each before the one before it is done.

    with chained():
        x = linear_step(...)

Within the block, no call reads a weight or a state that an earlier call of the block has changed: only the other inputs
come from there. What is started early reads weights and states at once, and waits for the rest. Between two such blocks
over the same state stands a launch of another kind (the embedding of the next token), which waits for everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# A plain list, as the forced routes are: torch.compile can guard on it.
_open: list[bool] = []


def in_chain() -> bool:
    """Whether the caller has promised it."""
    return bool(_open)


@contextmanager
def chained() -> Iterator[None]:
    """Promise it for the calls in the block."""
    _open.append(True)
    try:
        yield
    finally:
        _open.pop()
