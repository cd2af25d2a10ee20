"""How many processor cores there are for us: what processes side by side are dealt out over."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores() -> int:
    """The cores that this process may use: of those it is bound to, no more than its container is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return cores
