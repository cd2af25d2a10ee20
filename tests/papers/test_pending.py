"""A value that is not there: it may be kept and handed on, and nothing else."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch

from ostinato.papers.pending import Pending, Waiting
from ostinato.papers.runner import Run, _fingerprint, walk

USES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda value: value.mean,
    "hasattr": lambda value: hasattr(value, "mean"),
    "isinstance": lambda value: isinstance(value, dict),
    "setting an attribute": lambda value: setattr(value, "a", 1),
    "an item": lambda value: value["loss"],
    "setting an item": lambda value: operator.setitem(value, 0, 1),
    "a slice": lambda value: value[:2],
    "an index": lambda value: [1, 2][value],
    "a key": lambda value: {value: 1},
    "iter": list,
    "unpacking": lambda value: (lambda *args: args)(*value),
    "keywords": lambda value: dict(**value),
    "zip": lambda value: zip(*value, strict=True),
    "in": lambda value: 1 in value,
    "len": len,
    "float": float,
    "int": int,
    "str": str,
    "repr": repr,
    "format": lambda value: f"{value:.2f}",
    "a percent sign": lambda value: "%s" % value,  # noqa: UP031 (it is what is tested)
    "bool": lambda value: 1 if value else 0,
    "not": operator.not_,
    "equal": lambda value: value == 1,
    "not equal": lambda value: value != 1,
    "less": lambda value: value < 1,
    "less, from the right": lambda value: 1 < value,  # noqa: SIM300
    "max": lambda value: max(1.0, value),
    "sorted": lambda value: sorted([1.0, value]),
    "plus": lambda value: value + 1,
    "plus, from the right": lambda value: 1 + value,
    "a list and": lambda value: [*value],
    "sum": lambda value: sum([value]),
    "mean": lambda value: mean([value]),
    "power": lambda value: 2**value,
    "minus": operator.neg,
    "abs": abs,
    "round": round,
    "math": math.log,
    "union": lambda value: {"a": 1} | value,
    "a call": lambda value: value(),
    "with": lambda value: value.__enter__(),
    "a path": Path,
    "a copy": copy.deepcopy,
    "numpy": np.asarray,
    "torch": torch.tensor,
    "an argument": lambda value: _fingerprint((value,), {}),
    "an argument's item": lambda value: _fingerprint(([1, {"a": value}],), {}),
    "a keyword": lambda value: _fingerprint((), {"kept": value}),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_waits(use: str) -> None:
    lock = Path("lock")
    with pytest.raises(Waiting) as waiting:
        USES[use](Pending("the part", lock))
    assert waiting.value.name == "the part" and waiting.value.lock == lock


def test_gathering_is_no_use() -> None:
    one = Pending("a")
    gathered = {"a": [one, 1], "b": (one,)}
    assert type(gathered["a"][0]) is Pending and gathered["b"][0] is one and one is not None


def test_no_handler_takes_it_for_a_failure() -> None:
    assert not issubclass(Waiting, Exception)


def test_a_walk_that_python_itself_ends_at_a_pending_value_is_no_failure(tmp_path: Path) -> None:
    """`str.join` looks at the type of an item, and asks the item nothing."""
    from ostinato.papers.catalogue import system

    def joined(run: Run) -> list[Any]:
        return [", ".join([run.part("word", str)])]

    run = Run(system(1), "smoke", 0, tmp_path, have=lambda run, part: run.leave(part))
    assert walk(joined, run) is None and run.pending == ["word"]

    def broken(run: Run) -> list[Any]:
        return [", ".join([run.part("number", int)])]  # type: ignore[list-item]

    with pytest.raises(TypeError):
        walk(broken, Run(system(1), "smoke", 0, tmp_path))
