"""How the learning rate moves over a run: factors between 0 and 1, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""From the number of steps done to the factor on every group's learning rate."""


def warmup_cosine(steps: int, warmup: int, final: float = 0.1) -> Schedule:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `final` at the last step.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
