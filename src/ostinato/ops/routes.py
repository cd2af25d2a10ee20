"""Routes: the ways in which an engine can be computed, and the choice between them.

An engine (`diagonal_scan`, `delta_rule`, …) is one mathematical function with several
implementations, called routes:

- `reference`: a loop over the one-step definition;
- `parallel`: plain PyTorch, on any device;
- `triton`, `native`, …: compiled kernels, in `ostinato/ops/kernels/<backend>/`, which register
  themselves with `Engine.route`; an engine never names them.

The choice is automatic: the route of highest priority that does not refuse the call. It can be forced,
for every engine or for one:

    with ostinato.backend("reference"): ...
    with ostinato.backend(delta_rule="parallel"): ...

or, for a whole process, by the environment variable `OSTINATO_BACKEND`, read when the package is
imported. A forced route that does not exist or refuses raises `BackendError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ostinato.errors import BackendError, UnknownNameError

ENGINES: dict[str, Engine] = {}

# A plain dictionary, not a context variable: torch.compile can guard on it, and cannot trace the other.
# The key "" holds what is forced for every engine.
_forced: dict[str, str] = {"": os.environ["OSTINATO_BACKEND"]} if os.environ.get("OSTINATO_BACKEND") else {}


@dataclass(frozen=True)
class Route:
    """One implementation of an engine.

    `refuses(*args, **kwargs)` receives the call and returns why the route cannot serve it, or None.
    `declines` is the same question asked only when the choice is free: the route could, but another
    is better (a chunked form asked for one step, say).
    """

    name: str
    function: Callable[..., Any]
    priority: int
    refuses: Callable[..., str | None] | None = None
    declines: Callable[..., str | None] | None = None


class Engine:
    """A recurrence with several routes; calling it picks one of them.

    All routes of an engine take the same positional and keyword arguments and return the same values.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.routes: dict[str, Route] = {}
        ENGINES[name] = self

    def route(
        self,
        name: str,
        *,
        priority: int = 0,
        refuses: Callable[..., str | None] | None = None,
        declines: Callable[..., str | None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as this engine's route `name`.

        Priorities in use: 0 `reference`, 10 `parallel`, 20 compiled kernels.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.routes[name] = Route(name, function, priority, refuses, declines)
            ranked = sorted(self.routes.values(), key=lambda route: -route.priority)
            self.routes = {route.name: route for route in ranked}
            return function

        return register

    def choose(self, *args: Any, **kwargs: Any) -> Route:
        """The route that a call with these arguments would take."""
        forced = _forced.get(self.name, _forced.get(""))
        if forced is not None:
            route = self.routes.get(forced)
            if route is None:
                raise BackendError(
                    f"{self.name} has no route {forced!r} (it has {', '.join(self.routes)}); "
                    "choose one of them, or leave the choice free"
                )
            reason = route.refuses(*args, **kwargs) if route.refuses else None
            if reason is not None:
                raise BackendError(f"the forced route {forced!r} of {self.name} cannot serve this call: {reason}")
            return route
        fallback = None
        for route in self.routes.values():
            if route.refuses is not None and route.refuses(*args, **kwargs) is not None:
                continue
            if route.declines is None or route.declines(*args, **kwargs) is None:
                return route
            fallback = fallback or route
        if fallback is None:
            raise BackendError(f"no route of {self.name} can serve this call")
        return fallback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute by the chosen route."""
        return self.choose(*args, **kwargs).function(*args, **kwargs)


@contextmanager
def backend(name: str | None = None, /, **per_engine: str) -> Iterator[None]:
    """Force a route while the block runs: `backend("reference")`, or `backend(delta_rule="parallel")`.

    The setting is the process's, not the thread's. Raises `BackendError` where no engine has the route
    and `UnknownNameError` where there is no such engine.
    """
    for engine in per_engine:
        if engine not in ENGINES:
            raise UnknownNameError("engine", engine, ENGINES)
    if name is not None and not any(name in engine.routes for engine in ENGINES.values()):
        known = sorted({route for engine in ENGINES.values() for route in engine.routes})
        raise BackendError(f"no engine has a route {name!r}; known: {', '.join(known)}")
    before = dict(_forced)
    if name is not None:
        _forced[""] = name
    _forced.update(per_engine)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
