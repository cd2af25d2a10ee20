"""`ostinato compare`: any set of mixers over any set of tasks and seeds, all else equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import INTERRUPTED, err, out, print_json, print_table, progress_bar
from ostinato.errors import ConfigurationError


def compare(
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks, by commas; options in brackets. `ostinato tasks` lists them.")
    ] = None,
    mixers: Annotated[str, typer.Option(help="Mixers or plans, by commas; options in brackets.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the task, NAME=VALUE, if it is one; may be repeated.")
    ] = None,
    d_model: Annotated[int, typer.Option(help="Width, the same for all.")] = 64,
    equal_parameters: Annotated[
        bool, typer.Option("--equal-parameters", help="Widths so that all have as many parameters as the first.")
    ] = False,
    depth: Annotated[int, typer.Option(help="Layers, the same for all.")] = 2,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    batch: Annotated[int, typer.Option(help="Sequences in one update.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its peak, the same for all.")] = 2e-3,
    seeds: Annotated[int, typer.Option(help="Runs of each mixer on each task.")] = 1,
    evaluations: Annotated[int, typer.Option(help="How often each is scored, the end included.")] = 5,
    jobs: Annotated[int | None, typer.Option(help="Processes, one thread each; one for each core by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so many; the same call goes on.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run those again that have failed.")] = False,
    preset: Annotated[str | None, typer.Option(help="linear: what each linear recurrence can do.")] = None,
    budget: Annotated[str, typer.Option(help="Of a preset: smoke, cpu or gpu.")] = "cpu",
    save: Annotated[Path | None, typer.Option(help="Of a preset: also write its table to this JSON file.")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder; reports/compare-TASK by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda to train on a GPU; the CPU by default.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train several mixers on several tasks: the same width, depth, batches, steps and learning rate.

    Each run is kept in a file: an interrupted comparison goes on where it was when it is started again. One that
    fails is shown as failed, and the others go on. Prints the scores beside the tasks' baselines, and writes a page
    with the table, the curves over length and what each mixer costs.

    [bold]Examples[/]

      ostinato compare --task parity --mixers lstm,gla,"delta_net(negative_eigenvalues=True)"

      ostinato compare --task "mqar(pairs=8, length=64), word_problem(group=S3)" --mixers mamba2,attention --seeds 3

      ostinato compare --task text --mixers "delta_product, gru" --equal-parameters --out text --jobs 2

      ostinato compare --preset linear --budget gpu --minutes 8
    """
    from ostinato.cores import available_cores

    jobs = jobs if jobs is not None else 1 if device not in (None, "cpu") else available_cores()
    if preset is not None:
        from ostinato.cli.compare_linear import linear

        if preset != "linear" or task or option:
            raise ConfigurationError(f"the preset is 'linear', and it brings its own tasks; got {preset!r}")
        return linear(budget, mixers, jobs, minutes, retry, out_folder, save, json)
    specs = _specs(task, option)
    plans = _plans(mixers)
    if seeds < 1:
        raise ConfigurationError(f"a comparison needs at least one seed, got {seeds}")
    from ostinato.comparison.cells import Cell
    from ostinato.comparison.widths import count_parameters, width_for

    cells = []
    for spec in specs:
        wanted = count_parameters(plans[0], spec, d_model, depth) if equal_parameters else 0
        widths = {plan: width_for(plan, spec, depth, wanted) if equal_parameters else d_model for plan in plans}
        cells += [
            Cell(plan, spec, seed, widths[plan], depth, steps, batch, learning_rate, (), evaluations, device)
            for seed in range(seeds)
            for plan in plans
        ]
    cells.sort(key=lambda cell: cell.seed)  # all seeds 0 first: a comparison that is stopped says something
    folder = out_folder or Path("reports") / (
        "compare-" + ("tasks" if len(specs) > 1 else cells[0].name().split("-")[0])
    )
    found = run_with_bar(cells, folder, jobs, minutes, retry)
    _show(found, cells, specs, plans, folder, json)


def _specs(task: list[str] | None, option: list[str] | None) -> list[str]:
    """The tasks, each with its options as it will be built; raises what building them raises."""
    from ostinato.cli.runs import parse_options, split_names
    from ostinato.comparison.cells import build_task, parse_task

    specs = [name for text in task or [] for name in split_names(text)]
    if not specs:
        raise ConfigurationError("a comparison needs at least one task: --task NAME")
    given = parse_options(option)
    if given and len(specs) > 1:
        raise ConfigurationError("--option is for one task; write the options of several in brackets: mqar(pairs=8)")
    found = []
    for spec in specs:
        name, options = parse_task(spec)
        options |= given
        text = ", ".join(f"{key}={value!r}" for key, value in options.items())
        found.append(f"{name}({text})" if text else name)
        build_task(found[-1])
    if len(set(found)) < len(found):
        raise ConfigurationError(f"a task is named twice in {', '.join(specs)}")
    return found


def _plans(mixers: str) -> list[str]:
    from ostinato.cli.runs import split_names
    from ostinato.models.plan import parse_plan

    plans = [str(parse_plan(name)) for name in split_names(mixers)]
    if not plans:
        raise ConfigurationError(f"a comparison needs at least one mixer, got {mixers!r}")
    if len(set(plans)) < len(plans):
        raise ConfigurationError(f"a mixer is named twice in {mixers!r}")
    return plans


def run_with_bar(
    cells: list[Any], folder: Path, jobs: int, minutes: float | None, retry: bool
) -> dict[Any, dict[str, Any]]:
    """Run cells with a progress bar; Ctrl-C says what is kept and exits."""
    from ostinato.comparison.grid import run_cells

    with progress_bar() as bar:
        total = bar.add_task("", total=len(cells), note="")
        known = len(run_cells(cells, folder, minutes=0))
        bar.update(total, completed=known)

        def told(cell: Any, record: dict[str, Any]) -> None:
            if "failed" in record:
                err.print(
                    f"[red]failed[/] {cell.plan} on {cell.task}, seed {cell.seed}: {record['failed']}", markup=True
                )
            bar.update(total, advance=1, note=f"{cell.plan}, {cell.task}, seed {cell.seed}")

        try:
            found = run_cells(cells, folder, jobs=jobs, minutes=minutes, retry=retry, told=told)
        except KeyboardInterrupt:
            err.print(f"stopped; finished parts are kept in {folder}: the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    if len(found) < len(cells):
        err.print(f"{len(cells) - len(found)} of {len(cells)} runs are left: the same command goes on")
    return found


def _show(
    found: dict[Any, dict[str, Any]], cells: list[Any], specs: list[str], plans: list[str], folder: Path, json: bool
) -> None:
    from ostinato.comparison.board import main_columns, read_board, table, write_page
    from ostinato.comparison.cells import build_task
    from ostinato.files import write_json
    from ostinato.report import provenance

    columns = main_columns(specs)
    board = read_board(found, columns)
    baselines = {spec: build_task(spec).baselines() for spec in specs}
    first = cells[0]
    facts: dict[str, Any] = {
        name: getattr(first, name) for name in ("depth", "steps", "batch_size", "learning_rate", "device")
    }
    facts |= {"seeds": max(cell.seed for cell in cells) + 1, **provenance()}
    content = {
        "tasks": {spec: {"options": build_task(spec).options(), "baselines": baselines[spec]} for spec in specs},
        "facts": facts,
        "results": [
            {
                "plan": plan,
                "scores": {
                    name: {"mean": score.mean, "values": score.values, "failed": score.failures}
                    for name, score in board.scores.get(plan, {}).items()
                },
                **board.costs.get(plan, {}),
            }
            for plan in plans
        ],
        "cells": [
            {**dataclasses.asdict(cell), **{k: v for k, v in r.items() if k != "cell"}} for cell, r in found.items()
        ],
    }
    write_json(folder / "result.json", content)
    subtitle = "the same depth, batches, steps and learning rate for all"
    title = (
        f"{', '.join(columns)}: {len(plans)} mixers" if len(specs) < 4 else f"{len(plans)} mixers on {len(specs)} tasks"
    )
    write_page(folder, title, subtitle, board, found, columns, baselines, facts)
    if json:
        return print_json(content)
    headers, rows = table(board)
    for index, spec in enumerate(specs):
        for name, value in baselines[spec].items():
            row = [""] * len(headers)
            row[0], row[1 + index] = f"baseline: {name}", value  # type: ignore[call-overload]
            rows.append(row)
    print_table(headers, rows, f"{first.steps} steps, {first.depth} layers")
    out.print(f"\n{folder / 'index.html'}")
