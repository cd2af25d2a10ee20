"""Running a paper's experiment: measured rows beside the paper's, written so that a stranger can check them.

A paper's module, `papers/pNN_name.py`, holds two names:

    claims = (
        Claim("parity", "solves parity far beyond the trained length", theirs="1.00"),
        ...
    )

    def experiment(run: Run) -> list[Measured]:
        accuracy = run.part("parity", train_parity, run.choose(smoke=20, cpu=2000, gpu=20000), seed=run.seed)
        return [Measured("parity", ours=f"{accuracy:.2f}", holds=accuracy > 0.95)]

`Run.part` is what makes a run resumable: the value of a finished part is kept on disk, and is not computed
again. It is also what processes share among them (see `side_by_side`): gather the values of parts before one is used,
and take those that are times by `Run.timed_part`, which is computed while nothing else runs.

`reproduce` writes `reports/NN/`: `result.json`, `index.html`, `figure-*.svg`. The time left is told from an
earlier run of the same budget: the one that `reports/NN/` has, or the committed one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ostinato.errors import ConfigurationError, OstinatoError
from ostinato.papers.catalogue import System, module_path, result, smaller_result, system
from ostinato.papers.pending import Pending, Waiting
from ostinato.report import Figure, Page, Series, provenance, save_svg

BUDGETS = {"smoke": "seconds", "cpu": "minutes on two cores", "gpu": "minutes on one H100"}


@dataclass(frozen=True)
class Claim:
    """What the paper says: a key, the claim in words, and its number."""

    key: str
    text: str
    theirs: str


@dataclass(frozen=True)
class Measured:
    """What we found for the claim `key`; `holds=None` says that this budget cannot tell."""

    key: str
    ours: str
    holds: bool | None
    note: str = ""


class TimeIsUp(OstinatoError, TimeoutError):
    """The minutes that were given are over, and parts are left; the finished ones are kept."""


@dataclass(frozen=True)
class Part:
    """A part that an experiment asks for: where its value is kept, and how it is computed."""

    name: str
    path: Path
    fingerprint: str
    """Of the arguments."""
    timed: bool
    work: Callable[[], Any]

    def kept(self) -> dict[str, Any] | None:
        """What is on disk of it: `value`, `seconds`; None if nothing, or it was computed from other arguments."""
        from ostinato.files import read_json

        if not self.path.is_file():
            return None
        found: dict[str, Any] = read_json(self.path)
        return found if found.get("arguments", self.fingerprint) == self.fingerprint else None


Way = Callable[["Run", Part], Any]
"""How a run has the value of a part: from the disk, by computing it, or as `Pending`."""


def alone(late: Callable[[], bool] = lambda: False) -> Way:
    """The way of one process: what is on disk is taken, the rest is computed in turn, unless it is late."""

    def have(run: Run, part: Part) -> Any:
        found = part.kept()
        if found is not None:
            run.say(f"{part.name}: kept from an earlier run")
            return run.take(part, found)
        if late():
            return run.leave(part)
        run.say(run.described(part.name))
        return run.compute(part)

    return have


@dataclass
class Run:
    """One run of an experiment: its budget and seed, and the folder that its finished parts are kept in."""

    system: System
    budget: str
    seed: int
    folder: Path
    say: Callable[[str], None] = lambda message: None
    """Reports progress in a line."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """The widths, depths, lengths and steps that were used; they stand in the result."""
    figures: list[Figure] = field(default_factory=list)
    expected: Mapping[str, float] = field(default_factory=dict)
    """What each part took in an earlier run of this budget, in seconds; here or on another machine."""
    expected_whole: float | None = None
    """What that run took in all."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each finished part took, kept ones too."""
    kept: float = 0.0
    """Seconds of the parts that an earlier run finished."""
    started: float = field(default_factory=time.perf_counter)
    processes: int = 1
    """That work on the parts."""
    have: Way = field(default_factory=alone)
    pending: list[str] = field(default_factory=list)
    """Parts whose values are not there: used, they raise `Waiting`."""
    failed: str | None = None
    """The part that raised an exception."""

    def choose(self, *, smoke: Any, cpu: Any, gpu: Any) -> Any:
        """The value for this run's budget."""
        return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[self.budget]

    def part(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, computed once per budget and seed; its value must be JSON.

        A run that was interrupted and is started again takes the finished parts from the disk; not one that was
        computed from other arguments, by an earlier version of the experiment.
        """
        return self._have(name, False, partial(function, *args, **kwargs), _fingerprint(args, kwargs))

    def timed_part(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A `part` whose value is a time or a speed: no other part is computed meanwhile."""
        return self._have(name, True, partial(function, *args, **kwargs), _fingerprint(args, kwargs))

    def _have(self, name: str, timed: bool, work: Callable[[], Any], fingerprint: str) -> Any:
        path = self.folder / "parts" / f"{self.budget}-{self.seed}-{name}.json"
        return self.have(self, Part(name, path, fingerprint, timed, work))

    def take(self, part: Part, found: dict[str, Any]) -> Any:
        """The value of a part that was found on disk."""
        self.seconds[part.name] = found["seconds"]
        self.kept += found["seconds"]
        return found["value"]

    def compute(self, part: Part) -> Any:
        """Compute a part, and keep its value."""
        from ostinato.files import write_json

        started = time.perf_counter()
        try:
            value = part.work()
        except Exception:
            self.failed = part.name
            raise
        self.seconds[part.name] = seconds = round(time.perf_counter() - started, 3)
        write_json(part.path, {"value": value, "seconds": seconds, "arguments": part.fingerprint})
        return value

    def leave(self, part: Part, lock: Path | None = None) -> Any:
        """Walk on without the value, which who holds the lock computes."""
        self.pending.append(part.name)
        return Pending(part.name, lock)

    def described(self, name: str) -> str:
        """A part that begins, with the time left."""
        left = self.left()
        return name if left is None else f"{name} ({_duration(left)} left)"

    def left(self) -> float | None:
        """Seconds to the end, at the pace of this run so far; None if no earlier run tells."""
        done = sum(self.expected.get(name, 0.0) for name in self.seconds)
        spent = sum(seconds for name, seconds in self.seconds.items() if name in self.expected)
        pace = spent / done if done > 0 else 1.0
        if self.expected:
            ahead = sum(seconds for name, seconds in self.expected.items() if name not in self.seconds)
            return pace * ahead / self.processes
        if self.expected_whole is None:
            return None
        ahead = self.expected_whole - self.kept
        return max(0.0, ahead / self.processes - (time.perf_counter() - self.started))

    def figure(self, title: str, series: Sequence[Series], **options: Any) -> None:
        """Add a figure to the report."""
        self.figures.append(Figure(title, list(series), **options))


def walk(experiment: Callable[[Run], list[Measured]], run: Run) -> list[Measured] | None:
    """The experiment's rows; None if the values of parts are pending, see `run.pending`."""
    try:
        rows = experiment(run)
    except Waiting:
        return None
    except Exception:
        # What is written in C may look at an object's type and ask it nothing: `", ".join([pending])`.
        if run.pending and run.failed is None:
            return None
        raise
    return None if run.pending else rows


def _fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Of the numbers and texts among the arguments; other objects count by their type, a device not at all.

    So a run that began on one machine goes on on another.
    """

    def named(value: object) -> str:
        return str(value) if isinstance(value, range) else type(value).__name__

    kept = [value for value in args if not (isinstance(value, str) and value in ("cpu", "cuda"))]
    text = json.dumps([kept, kwargs], default=named, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _duration(seconds: float) -> str:
    """Words for a time that is known roughly."""
    if seconds < 60:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min"


def _earlier(which: System, budget: str, folder: Path) -> dict[str, Any]:
    """A finished run of this budget: the report's own, or the committed one; empty if there is none."""
    from ostinato.files import read_json

    own = folder / "result.json"
    for found in (read_json(own) if own.is_file() else None, result(which), smaller_result(which)):
        if found is not None and found.get("budget") == budget:
            return found
    return {}


def load(which: System, folder: Path | None = None) -> ModuleType:
    """Import the paper's module; raises `ConfigurationError` while the system is planned, or for a bad module."""
    path = module_path(which, folder)
    if path is None:
        there = f"; of it, the library has the mixers {', '.join(which.mixers)}" if which.mixers else ""
        raise ConfigurationError(
            f"{which.label} {which.system} is planned: nobody has written its experiment yet{there}. "
            "`ostinato papers` lists the state of each system"
        )
    spec = importlib.util.spec_from_file_location(f"ostinato.papers.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    for name in ("claims", "experiment"):
        if not hasattr(module, name):
            raise ConfigurationError(f"{path} does not define {name!r}")
    return module


def reproduce(
    number: int | str,
    budget: str = "smoke",
    *,
    seed: int = 0,
    out: str | Path = "reports",
    say: Callable[[str], None] = lambda message: None,
    folder: Path | None = None,
    jobs: int = 1,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Run the experiment of one system, write `out/NN/`, and return the result.

    Args:
        number: of the system.
        budget: "smoke", "cpu" or "gpu".
        seed: of every random draw.
        out: the folder of reports. Parts that an interrupted run finished there are not computed again.
        say: called with a line for each part.
        folder: where the modules stand (the package, unless a test says otherwise).
        jobs: processes that compute parts side by side, over all GPUs. One is this process.
        minutes: begin no part after so many; those that run then are finished.

    Raises:
        ConfigurationError: no such number or budget, the system is planned, or jobs below 1.
        TimeIsUp: the minutes are over, and parts are left; the same call goes on with them.
        KeyboardInterrupt: Ctrl-C; finished parts are kept.
    """
    from ostinato.files import write_json
    from ostinato.papers.side_by_side import SideBySide

    end = None if minutes is None else time.time() + 60 * minutes
    which = system(number)
    if budget not in BUDGETS:
        raise ConfigurationError(f"there is no budget {budget!r}; choose one of {', '.join(BUDGETS)}")
    if jobs < 1:
        raise ConfigurationError(f"jobs must be at least 1, got {jobs}")
    module = load(which, folder)
    report = Path(out) / which.label
    earlier = _earlier(which, budget, report)
    fresh = partial(
        Run, which, budget, seed, report, say, expected=earlier.get("parts", {}), expected_whole=earlier.get("seconds")
    )
    if jobs == 1:
        run = fresh(have=alone(lambda: end is not None and time.time() >= end))
        rows = walk(module.experiment, run)
    else:
        run, rows = SideBySide(jobs, end, folder).walk(module.experiment, fresh)
    if rows is None:
        raise TimeIsUp(f"time is up before {', '.join(run.pending)}, and what needs them")
    measured = {row.key: row for row in rows}
    unknown = set(measured) - {claim.key for claim in module.claims}
    if unknown:
        raise ConfigurationError(f"{module.__name__} measured what it does not claim: {', '.join(sorted(unknown))}")
    missing = Measured("", "not measured", None, "this budget does not test it")
    claims = []
    for claim in module.claims:
        row = measured.get(claim.key, missing)
        claims.append(
            {"key": claim.key, "claim": claim.text, "theirs": claim.theirs}
            | {"ours": row.ours, "holds": row.holds, "note": row.note}
        )
    outcome = {
        "number": which.number,
        "system": which.system,
        "title": which.title,
        "arxiv": which.arxiv,
        "budget": budget,
        "seed": seed,
        **({"jobs": jobs} if jobs > 1 else {}),
        "sizes": run.sizes,
        "claims": claims,
        "seconds": round(time.perf_counter() - run.started + run.kept, 1),
        "parts": run.seconds,
        "machine": provenance(),
    }
    write_json(run.folder / "result.json", outcome)
    for index, figure in enumerate(run.figures, start=1):
        save_svg(figure, run.folder / f"figure-{index}.svg")
    _page(outcome, run.figures).save(run.folder / "index.html")
    return outcome


def verdict(holds: bool | None) -> str:
    """The word for a claim's outcome."""
    return {True: "holds", False: "does not hold", None: "not tested"}[holds]


def _page(outcome: dict[str, Any], figures: Sequence[Figure]) -> Page:
    page = Page(f"{outcome['number']:02d} {outcome['system']}", f"{outcome['title']} (arXiv {outcome['arxiv']})")
    rows = [[c["claim"], c["theirs"], c["ours"], verdict(c["holds"]), c["note"]] for c in outcome["claims"]]
    page.table(["claim", "theirs", "ours", "verdict", "note"], rows)
    for figure in figures:
        page.figure(figure)
    page.heading("How it was had")
    facts = {"budget": outcome["budget"], "seed": outcome["seed"], "seconds": outcome["seconds"]}
    if "jobs" in outcome:
        facts["processes side by side"] = outcome["jobs"]
    page.table(["what", "value"], [[k, v] for k, v in {**facts, **outcome["sizes"], **outcome["machine"]}.items()])
    return page
