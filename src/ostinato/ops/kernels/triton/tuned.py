"""What `ostinato tune` found for this card, in place of what a kernel's plan would choose.

A plan is a NamedTuple that a small function of the shapes makes, with no trials; it serves without any of this. `tuned`
replaces its warps and stages by those of the file that `ostinato tune` wrote, if it wrote one: OSTINATO_TUNED, or
`ostinato/tuned.json` in the user's cache folder. Does not import Triton.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ostinato.errors import CheckpointError
from ostinato.files import read_json, write_json

FORMAT, VERSION = "ostinato tuned kernels", 1
CHOICES = {"warps": (2, 4, 8), "stages": (1, 2, 3, 4)}
"""What is tried for every field of a plan whose name ends so."""

P = TypeVar("P", bound=Any)

_seen: dict[str, Any] | None = None
_trial: dict[str, dict[str, int]] = {}


def tuned_file() -> Path:
    """Where the choices are kept."""
    if found := os.environ.get("OSTINATO_TUNED"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ostinato" / "tuned.json"


@cache
def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"


@cache
def table() -> dict[str, dict[str, int]]:
    """The choices for this card, by kernel and key; empty without a file, or with one that is not ours."""
    path = tuned_file()
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (CheckpointError, ValueError, OSError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        return {}
    return content.get("cards", {}).get(_card(), {})


def tuned(kernel: str, plan: P, *key: Any) -> P:
    """`plan`, its warps and stages as tuned for this kernel and key (dtype, dims, …) on this card."""
    name = " ".join(map(str, (kernel, *key)))
    if _seen is not None:
        _seen.setdefault(name, plan)
    found = _trial.get(name) or table().get(name)
    if not found:
        return plan
    return plan._replace(**{field: value for field, value in found.items() if field in plan._fields})


class Choice(NamedTuple):
    """What tuning found for one kernel and key: the fields, and how long the whole call took before and after."""

    name: str
    fields: dict[str, int]
    before: float
    after: float


@contextmanager
def _watching() -> Iterator[dict[str, Any]]:
    global _seen
    _seen = {}
    try:
        yield _seen
    finally:
        _seen = None
        _trial.clear()


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(2):
        call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def tune(
    call: Callable[[], list[torch.Tensor]],
    *,
    repeats: int = 9,
    seconds: Callable[[Callable[[], Any], int], float] = _seconds,
    say: Callable[[str], None] = lambda _: None,
) -> list[Choice]:
    """Try warps and stages for every plan that `call` uses, one field after the other; keep what is faster and right.

    Args:
        call: computes something with kernels, forward and backward, and returns tensors: with another plan they
            must agree with the first ones to 2 % (a plan that the compiler gets wrong is not taken).
        repeats: how often each is timed.
        seconds: how a call is timed.
        say: is told of every trial.
    """
    found = []
    with _watching() as seen:
        exact = [tensor.float() for tensor in call()]
        for name, plan in list(seen.items()):
            start = best = seconds(call, repeats)
            chosen: dict[str, int] = {}
            for field in plan._fields:
                kind = field.rsplit("_", 1)[-1]
                for value in CHOICES.get(kind, ()):
                    if value == getattr(plan, field):
                        continue
                    _trial[name] = {**chosen, field: value}
                    try:
                        right = all(
                            (new.float() - old).norm() <= 0.02 * old.norm()
                            for new, old in zip(call(), exact, strict=True)
                        )
                        taken = seconds(call, repeats) if right else float("inf")
                    except Exception as error:  # the card has no room for it, or the compiler fails
                        say(f"{name}: {field}={value}: {type(error).__name__}")
                        continue
                    say(f"{name}: {field}={value}: {taken / start:.3f} of the time" if right else f"{name}: wrong")
                    if taken < 0.98 * best:
                        best, chosen = taken, dict(_trial[name])
            _trial[name] = chosen
            if chosen:
                found.append(Choice(name, chosen, start, best))
    return found


def save(choices: list[Choice], path: Path | None = None) -> Path:
    """Add the choices to the file, under this card's name; those of other kernels and cards stay."""
    path = path or tuned_file()
    cards: dict[str, Any] = {}
    if path.is_file():
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a file of `ostinato tune`; name another one with --out")
        cards = content.get("cards", {})
    cards.setdefault(_card(), {}).update({choice.name: choice.fields for choice in choices})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "version": VERSION, "cards": cards})
    table.cache_clear()
    return path
