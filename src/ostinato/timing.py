"""Timing things against each other, and counting the memory that they take.

Speed is a ratio, and both of its sides are measured in one run: the candidates take turns, so that a machine
that slows down slows them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ostinato.errors import ConfigurationError


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    def ratio_to(self, other: Timing) -> float:
        """How many times longer `other` takes: above 1 means that this one is faster."""
        return other.median / self.median


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def time_together(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warm_up: int = 2,
    budget: float | None = None,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Call the candidates in turn, `rounds` times each, and return their timings.

    Args:
        candidates: what to time, by name; each is called without arguments.
        rounds: how often each is called, after `warm_up` calls that do not count.
        budget: stop after the round that passes this many seconds (at least three rounds are taken).
        device: a CUDA device to wait for after each call.
    """
    if rounds < 1:
        raise ConfigurationError(f"rounds must be at least 1, got {rounds}")
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for round_number in range(rounds):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            taken[name].append(time.perf_counter() - start)
        if budget is not None and round_number >= 2 and time.perf_counter() - begin > budget:
            break
    result = {}
    for name, seconds in taken.items():
        ordered = sorted(seconds)
        quarter = len(ordered) // 4
        result[name] = Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter], len(ordered))
    return result


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most memory that PyTorch held at once during `call`, beyond what it held before, in bytes."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        call()
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, str]:
    """What a figure must be told with: processor, threads, device, versions."""
    import platform

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next((line.split(":", 1)[1].strip() for line in file if "model name" in line), processor)
    except OSError:
        pass
    found = {
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found
