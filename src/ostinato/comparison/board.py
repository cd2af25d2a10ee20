"""The leaderboard: cells read back as a table of mixers against tasks, and the page that shows it.

A number is the mean over seeds, ± the standard deviation where there are two or more. The best of a column stands out,
with those that its own deviation cannot tell from it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ostinato.comparison.cells import Cell, build_task
from ostinato.report import Figure, Page, Series, Strong, number, save_svg

FAILED = "failed"


@dataclass
class Score:
    """One number of the table: a value for each seed that was finished."""

    values: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Messages of the seeds that failed."""

    @property
    def mean(self) -> float:
        """Of the values; NaN if there are none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation; NaN for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not self.values:
            return FAILED if self.failures else "–"
        text = number(float(self.mean))
        if len(self.values) > 1:
            text += f" ± {number(float(self.spread))}"
        return text + (f" ({len(self.failures)} {FAILED})" if self.failures else "")


@dataclass
class Board:
    """What a set of cells says: `scores[plan][column]`, and the costs of each plan."""

    columns: dict[str, bool]
    """Column names, and whether more is better there."""
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """`width`, `parameters`, `state bytes`, `ms per step`, `seconds` of each plan, means over its cells."""

    def best(self, column: str) -> list[str]:
        """The plan with the best mean of a column, and those within its standard deviation of it; none if all are."""
        found = {plan: row[column] for plan, row in self.scores.items() if column in row and row[column].values}
        if not found:
            return []
        sign = 1 if self.columns[column] else -1
        first = max(found, key=lambda plan: sign * found[plan].mean)
        spread = found[first].spread
        margin = 0.0 if math.isnan(spread) else spread
        best = [plan for plan, score in found.items() if sign * (found[first].mean - score.mean) <= margin]
        return best if len(best) < len(found) or len(found) == 1 else []


def read_board(found: Mapping[Cell, dict[str, Any]], columns: Mapping[str, tuple[str, str, bool]]) -> Board:
    """Gather results.

    Args:
        found: cells and their records, as `run_cells` returns them.
        columns: by name: the task of the cells, the key in their `metrics`, and whether more is better.
    """
    board = Board({name: higher for name, (_, _, higher) in columns.items()})
    costs: dict[str, dict[str, list[float]]] = {}
    for cell, record in found.items():
        row = board.scores.setdefault(cell.plan, {})
        for name, (task, key, _) in columns.items():
            if task != cell.task:
                continue
            score = row.setdefault(name, Score())
            if "failed" in record:
                score.failures.append(record["failed"])
            elif key in record["metrics"]:
                score.values.append(record["metrics"][key])
        if "failed" not in record:
            cost = costs.setdefault(cell.plan, {})
            for name, value in (
                ("width", cell.d_model),
                ("parameters", record["parameters"]),
                ("state bytes", record["state_bytes"]),
                ("ms per step", record["milliseconds_per_step"]),
                ("seconds", record["seconds"]),
            ):
                cost.setdefault(name, []).append(float(value))
    for plan, cost in costs.items():
        board.costs[plan] = {name: statistics.fmean(values) for name, values in cost.items()}
    return board


def main_columns(tasks: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """A column for each task: its own metric. It has the task's name, or the whole text where two have the same."""
    built = {spec: build_task(spec) for spec in tasks}
    names = [task.name for task in built.values()]
    return {
        task.name if names.count(task.name) == 1 else spec: (spec, task.metric, task.higher_is_better)
        for spec, task in built.items()
    }


def table(board: Board, *, strong: bool = False) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows: plans by their scores, then what they cost. With `strong`, the best are marked for a page."""
    names = ["parameters", "state bytes", "ms per step", "seconds"]
    if len({cost.get("width") for cost in board.costs.values()}) > 1:
        names.insert(0, "width")
    headers = ["mixer", *board.columns, *names]
    best = {column: board.best(column) for column in board.columns}
    rows: list[list[Any]] = []
    for plan in _ranked(board):
        cells: list[Any] = [plan]
        for column in board.columns:
            text = str(board.scores[plan].get(column, Score()))
            cells.append(Strong(text) if strong and plan in best[column] else text)
        cost = board.costs.get(plan, {})
        rows.append(cells + [_plain(cost[name]) if name in cost else "–" for name in names])
    return headers, rows


def _plain(value: float) -> float | int:
    return round(value) if value >= 100 else value


def _ranked(board: Board) -> list[str]:
    """Best first: by the mean rank over the columns; plans without a value rank last in them."""
    total = dict.fromkeys(board.scores, 0.0)
    for column, higher in board.columns.items():
        means = {plan: row[column].mean if column in row else math.nan for plan, row in board.scores.items()}
        for plan, mean in means.items():
            others = [other for other in means.values() if not math.isnan(other)]
            if math.isnan(mean):
                total[plan] += len(means)
            else:
                total[plan] += sum(other > mean if higher else other < mean for other in others)
    return sorted(total, key=lambda plan: (total[plan], plan))


def length_curves(found: Mapping[Cell, dict[str, Any]], task: str) -> list[Series]:
    """For each plan the mean score at each tested length: from splits that are called "length N"."""
    points: dict[str, dict[int, list[float]]] = {}
    for cell, record in found.items():
        if cell.task != task or "failed" in record:
            continue
        for key, value in record["metrics"].items():
            name, _, length = key.partition("/length ")
            if name == record["metric"] and length.isdigit():
                points.setdefault(cell.plan, {}).setdefault(int(length), []).append(value)
    lines = []
    for plan, by_length in points.items():
        lengths = sorted(by_length)
        lines.append(Series(plan, lengths, [statistics.fmean(by_length[length]) for length in lengths]))
    return [line for line in lines if len(line.x) > 1]


def training_curves(found: Mapping[Cell, dict[str, Any]], task: str) -> list[Series]:
    """For each plan the mean score at each step at which the test set was scored."""
    points: dict[str, dict[int, list[float]]] = {}
    for cell, record in found.items():
        if cell.task == task and "failed" not in record:
            for step, value in zip(*record["curve"], strict=True):
                points.setdefault(cell.plan, {}).setdefault(step, []).append(value)
    lines = [
        Series(plan, sorted(by_step), [statistics.fmean(by_step[step]) for step in sorted(by_step)])
        for plan, by_step in points.items()
    ]
    return [line for line in lines if len(line.x) > 1]


def write_page(
    folder: Path,
    title: str,
    subtitle: str,
    board: Board,
    found: Mapping[Cell, dict[str, Any]],
    columns: Mapping[str, tuple[str, str, bool]],
    baselines: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
) -> Path:
    """Write `index.html`, and each figure as SVG; returns the page's path."""
    page = Page(title, subtitle)
    page.text(
        "Means over seeds ± standard deviation. The best of each column stands out, with those within its deviation."
    )
    page.table(*table(board, strong=True))
    failures = _failures(found)
    if failures:
        page.heading("What failed")
        page.table(["mixer", "task", "seed", "message"], failures)
    for index, (name, (task, _, _)) in enumerate(columns.items()):
        _task_part(page, folder, index, name, task, found, baselines.get(task, {}))
    _cost_part(page, folder, board)
    page.heading("How it was had")
    page.table(["what", "value"], [[key, str(value)] for key, value in facts.items()])
    return page.save(folder / "index.html")


def _failures(found: Mapping[Cell, dict[str, Any]]) -> list[list[Any]]:
    return [[cell.plan, cell.task, str(cell.seed), r["failed"]] for cell, r in found.items() if "failed" in r]


def _task_part(
    page: Page,
    folder: Path,
    index: int,
    name: str,
    task: str,
    found: Mapping[Cell, dict[str, Any]],
    baselines: Mapping[str, float],
) -> None:
    """The curves of a task, and its baselines."""
    metric = build_task(task).metric.replace("_", " ")
    page.heading(name)
    if name != task:
        page.text(task)
    if baselines:
        page.table(["baseline", metric], [[name, value] for name, value in baselines.items()])
    lengths, steps = length_curves(found, task), training_curves(found, task)
    figures = []
    if lengths:
        figures.append(("length", Figure(f"{metric} over length", lengths, "length", metric, log_x=True)))
    if steps:
        figures.append(("steps", Figure(f"{metric} on the test set", steps, "step", metric, levels=dict(baselines))))
    for kind, figure in figures:
        page.figure(figure)
        save_svg(figure, folder / f"figure-{index}-{kind}.svg")


def _cost_part(page: Page, folder: Path, board: Board) -> None:
    """The first column against the bytes of state: a point for each plan."""
    column = next(iter(board.columns))
    points = [
        Series(plan, [board.costs[plan]["state bytes"]], [row[column].mean])
        for plan, row in board.scores.items()
        if plan in board.costs and column in row and row[column].values
    ]
    if points:
        page.heading("Cost beside the score")
        figure = Figure(f"{column} against the bytes of state", points, "bytes of state", column, log_x=True)
        page.figure(figure)
        save_svg(figure, folder / "figure-cost.svg")
