"""Everything that Ostinato raises on purpose.

Each error says what was wrong, with what value, and what to do about it. All derive from
`OstinatoError`, and each also from the built-in exception that it refines, so `except ValueError`
keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OstinatoError(Exception):
    """The base of every error raised on purpose by this package."""


class ShapeError(OstinatoError, ValueError):
    """A tensor has the wrong number of axes, a wrong size, or a sequence is empty."""


class DtypeError(OstinatoError, TypeError):
    """A tensor has a type that the function cannot work with."""


class NonFiniteError(OstinatoError, ValueError):
    """An input holds NaN or infinity (looked for only when validation is asked for)."""


class StateError(OstinatoError, ValueError):
    """A state does not belong to this mixer, model or batch size."""


class BackendError(OstinatoError, RuntimeError):
    """A route was forced that does not exist or cannot serve the call."""


class DivergenceError(OstinatoError, ArithmeticError):
    """An iterative solver did not reach its tolerance."""


class ConfigurationError(OstinatoError, ValueError):
    """An argument of a constructor or a command is out of its range."""


class PlanError(ConfigurationError):
    """A plan string does not parse; the message points at the place."""


class UnknownNameError(OstinatoError, LookupError, ValueError):
    """A name is not in a registry; the message names the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"there is no {kind} named {name!r}; {hint}")


class CheckpointError(OstinatoError, ValueError):
    """A file is not a checkpoint of ours, is damaged, or was written by a newer version."""


class DataError(OstinatoError, ValueError):
    """An input file or data set cannot be used: empty, too short, unreadable."""


class LawError(OstinatoError, AssertionError):
    """A mixer breaks the law; the message holds the table of errors."""
