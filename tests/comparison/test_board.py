from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ostinato.comparison.board import (
    Board,
    Score,
    length_curves,
    main_columns,
    read_board,
    table,
    training_curves,
    write_page,
)
from ostinato.comparison.cells import Cell
from ostinato.report import Strong

PARITY = "parity(tested_lengths=(40, 80))"
TEXT = "text(max_bytes=5000)"


def record(metric: str, value: float, **more: float) -> dict[str, Any]:
    return {
        "metric": metric,
        "metrics": {metric: value, **more},
        "curve": [[1, 2], [0.0, value]],
        "parameters": 100,
        "state_bytes": 8,
        "milliseconds_per_step": 1.5,
        "seconds": 2.0,
    }


def results() -> dict[Cell, dict[str, Any]]:
    found = {}
    for plan, parity, text in (
        ("gla", (0.2, 0.4), (2.0, 2.2)),
        ("gru", (0.9, 1.0), (2.5, 2.5)),
        ("lru", (0.93, 0.95), ()),
    ):
        for seed, value in enumerate(parity):
            lengths = {"scaled_accuracy/length 40": value, "scaled_accuracy/length 80": value / 2}
            found[Cell(plan, PARITY, seed)] = record("scaled_accuracy", value, **lengths)
        for seed, value in enumerate(text):
            found[Cell(plan, TEXT, seed)] = record("bits_per_byte", value)
    found[Cell("lru", TEXT, 0)] = {"failed": "DivergenceError: <too> high", "seconds": 1.0}
    return found


def test_means_spreads_and_the_best() -> None:
    board = read_board(results(), main_columns([PARITY, TEXT]))
    gru = board.scores["gru"]["parity"]
    assert gru.mean == pytest.approx(0.95) and gru.spread == pytest.approx(math.sqrt(0.005))
    # lru is 0.01 below, within gru's own deviation of 0.07; gla is far off. Of bits, fewer are better.
    assert board.best("parity") == ["gru", "lru"] and board.best("text") == ["gla"]
    assert board.costs["gla"] == {"width": 64, "parameters": 100, "state bytes": 8, "ms per step": 1.5, "seconds": 2}
    assert Board({"x": True}).best("x") == []


def test_scores_as_text() -> None:
    assert str(Score([0.5])) == "0.5000" and str(Score([1.0, 2.0])) == "1.500 ± 0.7071"
    assert str(Score([], ["x"])) == "failed" and str(Score()) == "–" and str(Score([0.5], ["x"])) == "0.5000 (1 failed)"


def test_the_table_ranks_and_marks() -> None:
    board = read_board(results(), main_columns([PARITY, TEXT]))
    headers, rows = table(board, strong=True)
    assert headers == ["mixer", "parity", "text", "parameters", "state bytes", "ms per step", "seconds"]
    cells = {row[0]: row for row in rows}
    assert next(iter(cells)) == "gru" and cells["lru"][2] == "failed"
    assert isinstance(cells["gla"][2], Strong) and not isinstance(cells["gla"][1], Strong)
    assert isinstance(cells["gru"][1], Strong) and not isinstance(table(board)[1][0][1], Strong)


def test_widths_are_shown_where_they_differ() -> None:
    found = {Cell("gla", PARITY, d_model=64): record("scaled_accuracy", 1), Cell("gru", PARITY, d_model=60): record("scaled_accuracy", 1)}  # fmt: skip # noqa: E501
    assert "width" in table(read_board(found, main_columns([PARITY])))[0]


def test_curves() -> None:
    lines = {line.label: line for line in length_curves(results(), PARITY)}
    assert list(lines["gla"].x) == [40, 80] and list(lines["gla"].y) == pytest.approx([0.3, 0.15])
    assert length_curves(results(), TEXT) == []
    steps = {line.label: line for line in training_curves(results(), TEXT)}
    assert list(steps) == ["gla", "gru"] and list(steps["gla"].y) == pytest.approx([0, 2.1])


def test_the_page(tmp_path: Path) -> None:
    found, columns = results(), main_columns([PARITY, TEXT])
    board = read_board(found, columns)
    path = write_page(
        tmp_path, "A & B", "all else equal", board, found, columns, {PARITY: {"floor": 0.5}}, {"depth": 2}
    )
    page = path.read_text()
    assert "<strong>0.9500 ± 0.0707</strong>" in page and "A &amp; B" in page
    assert "DivergenceError: &lt;too&gt; high" in page and "floor" in page
    assert page.count("<svg") == 4  # parity over length and steps, text over steps, cost
    assert (tmp_path / "figure-0-length.svg").read_text().startswith("<svg")


def test_tasks_of_the_same_name_are_told_apart() -> None:
    assert list(main_columns([PARITY, TEXT])) == ["parity", "text"]
    assert list(main_columns([PARITY, "parity"])) == [PARITY, "parity"]
