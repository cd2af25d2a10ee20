"""A promise about calls that follow one another, by which a device may begin each before the one before it is done.

    with chained():
        x = linear_step(...)

Within the block, no call changes a weight or a state that the next call reads: only its other inputs may come from
the call before. What is started early reads weights and states at once, and waits for the rest.
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
