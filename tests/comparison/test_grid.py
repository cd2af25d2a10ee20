from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato.comparison import grid
from ostinato.comparison.cells import Cell, result_path
from ostinato.errors import ConfigurationError

PARITY = "parity(max_length=6, tested_lengths=(6, 9), test_size=8)"
TINY = Cell("min_gru", PARITY, steps=2, d_model=8, depth=1, batch_size=2)
CELLS = [dataclasses.replace(TINY, seed=seed) for seed in range(3)]


def test_results_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    told: list[Cell] = []
    first = grid.run_cells(CELLS[:2], tmp_path, told=lambda cell, record: told.append(cell))
    again = grid.run_cells(CELLS, tmp_path, told=lambda cell, record: told.append(cell))
    assert told == CELLS and list(again) == CELLS
    assert all(again[cell] == first[cell] for cell in CELLS[:2])
    assert torch.get_num_threads() == 1


def test_failures_stay_until_they_are_tried_again(tmp_path: Path) -> None:
    bad = dataclasses.replace(TINY, plan="delta_net(heads=3)")
    runs: list[Cell] = []

    def told(cell: Cell, record: dict[str, Any]) -> None:
        runs.append(cell)

    found = grid.run_cells([bad, TINY], tmp_path, told=told)
    assert "failed" in found[bad] and "metrics" in found[TINY]
    grid.run_cells([bad, TINY], tmp_path, told=told)
    assert runs == [bad, TINY]
    grid.run_cells([bad, TINY], tmp_path, retry=True, told=told)
    assert runs == [bad, TINY, bad]


def test_no_time_left_begins_nothing(tmp_path: Path) -> None:
    for jobs in (1, 2):
        assert grid.run_cells(CELLS, tmp_path, jobs=jobs, minutes=0) == {}
    grid.run_cells(CELLS[:1], tmp_path)
    assert list(grid.run_cells(CELLS, tmp_path, minutes=0)) == CELLS[:1]


def test_processes_give_what_one_gives_and_survive_a_death(tmp_path: Path) -> None:
    """Two processes; the first that is seen is killed, and takes one cell with it."""
    killed: list[int | None] = []

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        killed.append(children[0].pid)
        children[0].kill()

    bad = dataclasses.replace(TINY, plan="delta_net(heads=3)")
    killer = threading.Thread(target=kill_one)
    killer.start()
    found = grid.run_cells([*CELLS, bad], tmp_path / "many", jobs=2)
    killer.join()
    died = [cell for cell in CELLS if "failed" in found[cell]]
    assert len(killed) == len(died) == 1 and found[died[0]]["failed"] == "the process ended with code -9"
    assert "heads=3" in found[bad]["failed"]
    alone = grid.run_cells(CELLS, tmp_path / "one")
    again = grid.run_cells([*CELLS, bad], tmp_path / "many", retry=True)
    assert all(again[cell]["metrics"] == alone[cell]["metrics"] for cell in CELLS)
    assert not multiprocessing.active_children()


def test_an_interrupt_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = grid.run_cell

    def interrupted(cell: Cell, folder: Path) -> dict[str, Any]:
        if cell is CELLS[1]:
            raise KeyboardInterrupt
        return real(cell, folder)

    monkeypatch.setattr(grid, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.run_cells(CELLS, tmp_path)
    assert [result_path(cell, tmp_path).exists() for cell in CELLS] == [True, False, False]


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"threads": 0}])
def test_bad_numbers(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        grid.run_cells(CELLS, tmp_path, **wrong)
