"""Running cells side by side: as many processes as asked, one thread each, and nothing lost when it is stopped.

Results are files (see `cells`): whatever ends a run, Ctrl-C, `minutes`, a killed machine, the same call goes on with
the cells that are missing. A cell that fails, even one that takes its process with it, is kept as failed with its
message, and the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ostinato.comparison.cells import Cell, Interrupted, failed, read_result, run_cell
from ostinato.errors import ConfigurationError

Told = Callable[[Cell, dict[str, Any]], None]


def run_cells(
    cells: Sequence[Cell],
    folder: str | Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    minutes: float | None = None,
    retry: bool = False,
    told: Told = lambda cell, record: None,
) -> dict[Cell, dict[str, Any]]:
    """Run those cells that have no result yet, in their order; return the results of all that have one then.

    Args:
        cells: what to run.
        folder: where results are kept; those that are there are not run again.
        jobs: processes. One job runs in this process.
        threads: of PyTorch, in each.
        minutes: begin no cell after so many; those that run then are finished.
        retry: run cells again that have failed.
        told: called with each cell that was just run, and its record.

    Raises:
        ConfigurationError: jobs or threads below 1.
        KeyboardInterrupt: Ctrl-C; what was finished is kept.
    """
    if jobs < 1 or threads < 1:
        raise ConfigurationError(f"jobs and threads must be at least 1, got {jobs} and {threads}")
    folder = Path(folder)
    found: dict[Cell, dict[str, Any]] = {}
    missing: list[Cell] = []
    for cell in dict.fromkeys(cells):
        record = read_result(cell, folder)
        if record is None or (retry and "failed" in record):
            missing.append(cell)
        else:
            found[cell] = record
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def late() -> bool:
        return end is not None and time.monotonic() >= end

    def note(cell: Cell, record: dict[str, Any]) -> None:
        found[cell] = record
        told(cell, record)

    if jobs == 1:
        _in_turn(missing, folder, threads, late, note)
    elif missing and not late():
        _side_by_side(missing, folder, min(jobs, len(missing)), threads, late, note)
    return {cell: found[cell] for cell in dict.fromkeys(cells) if cell in found}


def _in_turn(cells: list[Cell], folder: Path, threads: int, late: Callable[[], bool], note: Told) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for cell in cells:
            if late():
                return
            note(cell, run_cell(cell, folder))
    finally:
        torch.set_num_threads(before)


class _Worker:
    """A process and the line to it; `cell` is what it works on."""

    def __init__(self, folder: Path, threads: int) -> None:
        # A fresh interpreter: a forked one would share the threads and the GPU of this one.
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, str(folder), threads), daemon=True)
        self.process.start()
        other.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell) -> None:
        self.cell = cell
        with suppress(OSError):  # a process that is gone: waiting for its answer tells
            self.line.send(cell)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.line.close()


def _work(line: Connection, folder: str, threads: int) -> None:
    """What a process does: cells, until it is told that there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            cell = line.recv()
        except EOFError:
            return
        if cell is None:
            return
        try:
            line.send(run_cell(cell, Path(folder)))
        except Interrupted:
            return


def _side_by_side(
    cells: list[Cell], folder: Path, jobs: int, threads: int, late: Callable[[], bool], note: Told
) -> None:
    waiting = list(reversed(cells))
    workers = [_Worker(folder, threads) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while True:
            busy = {worker.line: worker for worker in workers if worker.cell is not None}
            if not busy:
                return
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                cell = worker.cell
                assert cell is not None
                worker.cell = None
                try:
                    record = worker.line.recv()
                except (EOFError, OSError):  # the process is gone, and took the cell with it
                    worker.process.join()
                    record = failed(cell, folder, f"the process ended with code {worker.process.exitcode}")
                    workers.remove(worker)
                    if waiting and not late():
                        workers.append(worker := _Worker(folder, threads))
                note(cell, record)
                if waiting and not late() and worker in workers:
                    worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.end()
