"""A value that is not there yet: it may be gathered and handed on, and whoever uses it waits.

    gathered = {name: run.part(name, train, name) for name in names}     # walks over parts that others compute
    best = max(gathered.values())                                        # raises `Waiting`, if one is still pending

`Waiting` is no `Exception`, so that no handler in an experiment takes it for a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Waiting(BaseException):
    """The value of the part `name` was used, and is not there; `lock` is held by who computes it, None if nobody."""

    def __init__(self, name: str, lock: Path | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.lock = lock


class Pending:
    """Stands for the value of a part. Every use raises `Waiting`; `is` and `type` are none."""

    def __init__(self, name: str, lock: Path | None = None) -> None:
        object.__setattr__(self, "_waiting", (name, lock))


_USES = """
    getattribute setattr delattr repr str bytes format hash bool int float complex index round trunc floor ceil
    len length_hint iter next reversed contains getitem setitem delitem call enter exit array await aiter fspath
    lt le eq ne gt ge neg pos abs invert copy deepcopy reduce reduce_ex
    add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or
    radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror
"""
"""What Python asks of an object by a method of its type."""


def _raising(use: str) -> Callable[..., Any]:
    def raises(self: Pending, *args: Any, **kwargs: Any) -> Any:
        raise Waiting(*object.__getattribute__(self, "_waiting"))

    raises.__name__ = use
    return raises


for _use in _USES.split():
    setattr(Pending, f"__{_use}__", _raising(f"__{_use}__"))
