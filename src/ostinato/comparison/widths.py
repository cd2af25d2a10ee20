"""Equal parameters: the width at which a mixer's model comes nearest to a number of parameters."""

from __future__ import annotations

from functools import lru_cache

from ostinato.comparison.cells import build_model, build_task
from ostinato.errors import ConfigurationError

_STEP = 4
"""Widths are multiples of this, so that four heads divide them."""


@lru_cache(maxsize=4096)
def count_parameters(plan: str, task: str, d_model: int, depth: int) -> int:
    """Parameters of the model that a cell of these would train."""
    import torch

    with torch.random.fork_rng(devices=[]):
        model = build_model(plan, build_task(task), d_model, depth)
    return sum(parameter.numel() for parameter in model.parameters())


def width_for(plan: str, task: str, depth: int, parameters: int, *, largest: int = 1024) -> int:
    """The width, a multiple of four, whose model has the number of parameters nearest to the one asked.

    Widths that a mixer refuses are passed over. The count grows with the width: a search by halves, then a look at
    the neighbours.

    Raises `ConfigurationError` if not even the smallest width is small enough to come within a half.
    """
    low, high = 1, largest // _STEP
    while low < high:
        middle = (low + high) // 2
        count = _count(plan, task, middle * _STEP, depth)
        if count is not None and count < parameters:
            low = middle + 1
        elif count is None:  # no model of this width: look at the next one
            following = _count(plan, task, (middle + 1) * _STEP, depth)
            low, high = (middle + 1, high) if following is not None and following < parameters else (low, middle)
        else:
            high = middle
    near = {}
    for index in range(max(1, low - 4), low + 4):
        count = _count(plan, task, index * _STEP, depth)
        if count is not None:
            near[index * _STEP] = abs(count - parameters)
    if not near or min(near.values()) > parameters / 2:
        raise ConfigurationError(f"no width of {plan} up to {largest} has about {parameters} parameters on {task}")
    return min(near, key=lambda width: near[width])


def _count(plan: str, task: str, d_model: int, depth: int) -> int | None:
    try:
        return count_parameters(plan, task, d_model, depth)
    except ConfigurationError:
        return None
