"""What the law found: rows of errors, the table that people read, and the tolerances, in one place."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ostinato._version import __version__
from ostinato.errors import BackendError, LawError

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 16 * torch.finfo(torch.float16).eps,
}
"""The largest error allowed in outputs and states, for every mixer, route and check alike.

An error is the largest difference from the float64 truth over the largest entry of the tensor it is in (or over
a hundredth of the largest entry among all tensors of its kind, where that is more: a gradient that is zero
but for rounding has no size to be relative to).
"""

GRADIENT_TOLERANCES = {dtype: (2 if dtype.itemsize == 2 else 1) * allowed for dtype, allowed in TOLERANCES.items()}
"""The same for gradients. In half precision they lose more: rounding the inputs once moves the exact gradient through
the norm of a short vector by up to 22 eps (RetNet and Gated DeltaNet at d_model 16, measured).
"""

DERIVATIVE_TOLERANCE = 1e-6
"""The largest relative error of the gradient along a random direction against finite differences, in float64."""

NO_GRADIENT = 1e-10
"""A gradient whose largest entry is below this part of the largest of all gradients has not arrived."""


def dtype_name(dtype: torch.dtype) -> str:
    """ "float64" for torch.float64."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Row:
    """The worst that one check saw on one route in one type."""

    mixer: str
    check: str
    route: str
    dtype: str
    error: float
    tolerance: float
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else str(self.error), "ok": self.ok}


def environment() -> dict[str, str]:
    """The versions and the machine: what a bug report must name."""
    return {
        "ostinato": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
    }


@dataclass
class LawReport:
    """All rows of one or more mixers."""

    rows: list[Row] = field(default_factory=list)
    device: str = "cpu"

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(row.ok for row in self.rows)

    @property
    def broken(self) -> list[Row]:
        """The rows beyond their tolerance."""
        return [row for row in self.rows if not row.ok]

    def record(self, row: Row) -> None:
        """Keep the row, or the worse of it and the row there is for the same check, route and type."""
        for index, old in enumerate(self.rows):
            if (old.mixer, old.check, old.route, old.dtype) == (row.mixer, row.check, row.route, row.dtype):
                # NaN is worse than any number, and compares as false with all.
                worse = not math.isnan(old.error) and not row.error <= old.error
                self.rows[index] = row if worse else old
                return
        self.rows.append(row)

    def worst(self) -> list[Row]:
        """For each mixer, route and type the row that is nearest to its tolerance, or furthest beyond."""
        found: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            key = (row.mixer, row.route, row.dtype)
            if key not in found or _distance(row) > _distance(found[key]):
                found[key] = row
        return list(found.values())

    def table(self, rows: list[Row] | None = None) -> str:
        """The rows (all, if None) as text."""
        rows = self.rows if rows is None else rows
        head = ("mixer", "route", "type", "check", "error", "tolerance", "", "where")
        body = [
            (
                row.mixer,
                row.route,
                row.dtype,
                row.check,
                f"{row.error:.1e}",
                f"{row.tolerance:.1e}",
                "ok" if row.ok else "BROKEN",
                row.where,
            )
            for row in rows
        ]
        widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]
        ]
        return "\n".join(line.rstrip() for line in lines)

    def summary(self) -> str:
        """The table of the largest errors, under the versions and the device."""
        known = "  ".join(f"{name} {value}" for name, value in environment().items())
        verdict = "the law holds" if self.ok else f"THE LAW IS BROKEN in {len(self.broken)} places"
        text = f"{known}  device {self.device}\n\n{self.table(self.worst())}\n\n{verdict}"
        return text if self.ok else f"{text}:\n\n{self.table(self.broken)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "environment": environment(),
            "device": self.device,
            "ok": self.ok,
            "rows": [row.as_dict() for row in self.rows],
        }

    def raise_if_broken(self) -> LawReport:
        """This report; raises `LawError` with the table of the broken rows."""
        if not self.ok:
            raise LawError("the law is broken:\n" + self.table(self.broken))
        return self


def _distance(row: Row) -> float:
    """How far a row is on the way to its tolerance; a tolerance of 0 asks for the same bits."""
    if math.isnan(row.error):
        return math.inf
    return row.error / row.tolerance if row.tolerance else (math.inf if row.error else 0.0)


@dataclass
class Recorder:
    """Writes rows for one mixer on one route in one type."""

    report: LawReport
    mixer: str
    route: str
    dtype: torch.dtype

    def add(self, check: str, error: float, where: str = "", tolerance: float | None = None) -> None:
        """Record an error against the tolerance of the type, or one of the check's own."""
        known = GRADIENT_TOLERANCES if "gradient" in check else TOLERANCES
        limit = known[self.dtype] if tolerance is None else tolerance
        self.report.record(Row(self.mixer, check, self.route, dtype_name(self.dtype), error, limit, where))

    @contextmanager
    def attempt(self, check: str, where: str = "") -> Iterator[None]:
        """An exception inside is a broken row of `check`, not the end of the walk.

        A forced route that cannot serve passes through: whoever forced it must know.
        """
        try:
            yield
        except BackendError:
            raise
        except Exception as error:  # whatever a mixer raises is a finding
            text = (str(error).strip().splitlines() or [""])[0]
            self.add(check, math.inf, f"{where + ': ' if where else ''}{type(error).__name__}: {text}"[:300])
