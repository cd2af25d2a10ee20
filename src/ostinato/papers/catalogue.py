"""The records of the 82 systems, and the state of each, computed from what is really there.

A system is

- `planned` while no module `papers/pNN_*.py` states its claims and runs its experiment;
- `built` once there is one;
- `reproduced` once a real run, committed as `results/NN.json`, held every claim that it tested;
- `did not hold` if such a run found a claim that does not hold.

Mixers that already belong to a planned system are named in its record; they do not change its state.
Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ostinato.errors import ConfigurationError

PLANNED, BUILT, REPRODUCED, DID_NOT_HOLD = "planned", "built", "reproduced", "did not hold"
STATES = (PLANNED, BUILT, REPRODUCED, DID_NOT_HOLD)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class System:
    """One system of the catalogue."""

    number: int
    system: str
    """Its short name."""
    title: str
    """The paper's title."""
    year: int
    arxiv: str
    """The paper's number on arXiv."""
    rooms: tuple[str, ...]
    """The rooms of the package that it lives in, apart from `papers`."""
    engines: tuple[str, ...]
    """The functions of `ostinato.ops` that compute it."""
    built_of: str
    """What it is made of, in a line."""
    mixers: tuple[str, ...]
    """The mixers of the package that already belong to it."""

    @property
    def label(self) -> str:
        """The number in two digits: what files and folders are named by."""
        return f"{self.number:02d}"

    def as_dict(self, results: Path | None = None) -> dict[str, Any]:
        """The record and its state, JSON-ready."""
        record = asdict(self)
        return {"number": record.pop("number"), "system": record.pop("system"), "state": state(self, results), **record}


@lru_cache(maxsize=1)
def systems() -> tuple[System, ...]:
    """Every record, by number."""
    records: list[dict[str, Any]] = json.loads((_HERE / "systems.json").read_text(encoding="utf-8"))
    for record in records:
        record.update({key: tuple(value) for key, value in record.items() if isinstance(value, list)})
    return tuple(System(**record) for record in records)


def system(number: int | str) -> System:
    """The record of one number: 1, "1" or "01". Raises `ConfigurationError` for any other text."""
    records = systems()
    try:
        index = int(number)
    except ValueError:
        index = -1
    if not 0 <= index < len(records):
        raise ConfigurationError(f"there is no system {number!r}: give a number from 00 to {len(records) - 1}")
    return records[index]


def module_path(which: System, folder: Path | None = None) -> Path | None:
    """The file `papers/pNN_*.py` of a system, or None while it is planned."""
    found = sorted((folder or _HERE).glob(f"p{which.label}_*.py"))
    return found[0] if found else None


def results_folder() -> Path:
    """Where committed results stand: `results/` of the source checkout, else of the working directory."""
    checkout = _HERE.parents[2] / "results"
    return checkout if checkout.is_dir() else Path("results")


def result(which: System, results: Path | None = None) -> dict[str, Any] | None:
    """The committed result of a system, at the largest budget that was run, or None."""
    return _read(which, results or results_folder())


def smaller_result(which: System, results: Path | None = None) -> dict[str, Any] | None:
    """The committed result at the cpu budget of a system whose verdict comes from a larger one, or None."""
    return _read(which, (results or results_folder()) / "cpu")


def _read(which: System, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{which.label}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def state(which: System, results: Path | None = None, folder: Path | None = None) -> str:
    """`planned`, `built`, `reproduced` or `did not hold`: from the files that are there."""
    if module_path(which, folder) is None:
        return PLANNED
    found = result(which, results)
    verdicts = [claim.get("holds") for claim in found["claims"]] if found else []
    if False in verdicts:
        return DID_NOT_HOLD
    return REPRODUCED if True in verdicts else BUILT
