"""The parts of an experiment computed by several processes, over all GPUs.

Every process walks the whole experiment. It takes the parts that are on disk, computes those that nobody has taken, and
goes past those that another is computing, until it uses a value that is pending; then it waits for that part and
walks again. A part is taken by a lock on a file, which the kernel frees when its process dies: another takes it then.

Parts that are timed are left to the process that was called, which computes them while no other runs; so are those
that raised an exception in another process, which it raises then. Only it writes the report.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ostinato.cores import available_cores
from ostinato.errors import ConfigurationError
from ostinato.papers.catalogue import system
from ostinato.papers.pending import Waiting
from ostinato.papers.runner import Measured, Part, Run, load, walk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Order:
    """What a process is told."""

    number: int
    budget: str
    seed: int
    report: Path
    folder: Path | None
    """Of the experiments' modules."""
    marks: Path
    """The folder that holds a file for each part that failed."""
    end: float | None
    """No part is begun after it, in the seconds of `time.time`."""
    threads: int

    def late(self) -> bool:
        """Whether no part is to be begun."""
        return self.end is not None and time.time() >= self.end

    def mark(self, part: Part) -> Path:
        """The file that is there if the part failed."""
        return self.marks / quote(part.name, safe="")


class SideBySide:
    """`jobs` processes; `end` and `folder` as in `Order`."""

    def __init__(self, jobs: int, end: float | None, folder: Path | None) -> None:
        if fcntl is None:
            raise ConfigurationError("jobs above 1 need file locks of the kind that Unix has")
        self.jobs, self.end, self.folder = jobs, end, folder

    def walk(
        self, experiment: Callable[[Run], list[Measured]], fresh: Callable[..., Run]
    ) -> tuple[Run, list[Measured] | None]:
        """The last run, and its rows; None instead of them if time was up before the last part.

        Args:
            experiment: of the module.
            fresh: makes the runs that walk it, from the fields that are not the same in all of them.
        """
        told = fresh(processes=self.jobs)
        with tempfile.TemporaryDirectory(prefix="ostinato-") as marks:
            order = Order(
                told.system.number,
                told.budget,
                told.seed,
                told.folder,
                self.folder,
                Path(marks),
                self.end,
                max(1, available_cores() // self.jobs),
            )
            while True:
                # A timed part may stand before others that need it: then it takes more than one round.
                helped = not order.late() and _round(order, self.jobs, told)
                run = fresh(have=_after(order, alone=not helped))
                rows = walk(experiment, run)
                if rows is not None or order.late():
                    return run, rows
                told.seconds |= run.seconds
                _give_memory_back()


def _give_memory_back() -> None:
    """What PyTorch keeps of a GPU for later: the other processes need the room."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _after(order: Order, alone: bool) -> Callable[[Run, Part], Any]:
    """The way of the process that was called, while the others rest; `alone` if they can do no more."""

    def have(run: Run, part: Part) -> Any:
        found = part.kept()
        if found is not None:
            return run.take(part, found)
        if order.late() or not (alone or part.timed or order.mark(part).exists()):
            return run.leave(part)
        run.say(run.described(part.name))
        return run.compute(part)

    return have


# --------------------------------------------------------------------------------------------------
# The process that was called.


class _Worker:
    """A process and the line that it reports on."""

    def __init__(self, index: int, order: Order) -> None:
        # A fresh interpreter: a forked one would share the threads and the GPU of this one.
        context = multiprocessing.get_context("spawn")
        self.index, self.failed = index, False
        self.line, other = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(other, order), daemon=True)
        with _environment(device_of(index) | {"OMP_NUM_THREADS": str(order.threads)}):
            self.process.start()
        other.close()


def _round(order: Order, jobs: int, told: Run) -> bool:
    """Processes until none of them can do more; whether they finished a part."""
    workers = [_Worker(index, order) for index in range(jobs)]
    helped = False
    try:
        while workers:
            lines = {worker.line: worker for worker in workers}
            for ready in wait(list(lines)):
                worker = lines[ready]  # type: ignore[index]
                try:
                    event, what, more = worker.line.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    worker.line.close()
                    workers.remove(worker)
                    if worker.failed:  # a GPU may be of no use to its process after an error: the next has a new one
                        workers.append(_Worker(worker.index, order))
                    elif worker.process.exitcode:
                        told.say(f"a process ended with code {worker.process.exitcode}; what it had begun is free")
                    continue
                worker.failed |= event == "failed"
                helped |= event == "finished"
                _tell(told, event, what, more)
    finally:
        for worker in workers:  # all before the first has ended: another would take what it leaves
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.line.close()
    return helped


def _tell(told: Run, event: str, what: str, more: Any) -> None:
    if event == "said":
        told.say(what)
    elif event == "begun":
        told.say(told.described(what))
    elif event == "failed":
        told.say(f"{what} failed, and is tried again when the others are done:\n{more}")
    elif event == "finished":
        told.seconds[what] = more
    elif what not in told.seconds:
        told.say(f"{what}: kept from an earlier run")
        told.seconds[what] = more
        told.kept += more


def device_of(index: int) -> dict[str, str]:
    """The environment in which a process sees one GPU alone: the next one for each, of those that are seen here."""
    import torch

    count = torch.cuda.device_count()  # looks, and opens none
    if count == 0:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if seen is None else [name.strip() for name in seen.split(",")][:count]
    return {"CUDA_VISIBLE_DEVICES": names[index % len(names)]}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that are started meanwhile: some are read before a process runs a line of ours."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --------------------------------------------------------------------------------------------------
# The others.


def _work(line: Connection, order: Order) -> None:
    """What a process does: walks, until it can do no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    import torch

    torch.set_num_threads(order.threads)
    which = system(order.number)
    experiment = load(which, order.folder).experiment

    def say(message: str) -> None:
        line.send(("said", message, None))

    while True:
        locks: list[Path] = []
        run = Run(which, order.budget, order.seed, order.report, say, have=_take_or_leave(order, line, locks))
        try:
            experiment(run)
            return
        except Waiting as waiting:
            lock = waiting.lock
        except Exception as error:
            if not run.pending and run.failed is None:  # the caller meets it too
                say(f"a process ended: {type(error).__name__}: {error}")
            lock = locks[0] if locks and run.failed is None else None  # see `walk`
        if lock is None:
            return
        _wait_for(lock)


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


def _take_or_leave(order: Order, line: Connection, locks: list[Path]) -> Callable[[Run, Part], Any]:
    """The way of a process among others; `locks` are those that it finds taken."""

    def have(run: Run, part: Part) -> Any:
        found = part.kept()
        if found is not None:
            line.send(("kept", part.name, found["seconds"]))
            return run.take(part, found)
        if part.timed or order.mark(part).exists():
            return run.leave(part)
        path = part.path.with_name(f"{part.path.name}.lock")
        with locked(path) as mine:
            if not mine:
                locks.append(path)
                return run.leave(part, path)
            found = part.kept()  # another may have finished it since
            if found is not None:
                return run.take(part, found)
            if order.late() or order.mark(part).exists():
                return run.leave(part)
            line.send(("begun", part.name, None))
            try:
                value = run.compute(part)
            except Exception:
                order.mark(part).touch()
                line.send(("failed", part.name, traceback.format_exc()))
                raise
            line.send(("finished", part.name, run.seconds[part.name]))
            return value

    return have


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether we hold the lock on the file, which is gone afterwards; False if another does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, who held it may have ended and removed the file: then it locks nothing.
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children of ours that have the file open


def _wait_for(path: Path) -> None:
    """Return when nobody holds the lock."""
    with suppress(FileNotFoundError), open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
