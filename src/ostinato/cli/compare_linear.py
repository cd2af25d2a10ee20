"""`ostinato compare --preset linear`: the table of what each linear recurrence can do."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from ostinato.cli.console import err, out, print_json, print_table


def linear(
    budget: str,
    mixers: str,
    jobs: int,
    minutes: float | None,
    retry: bool,
    out_folder: Path | None,
    save: Path | None,
    json: bool,
) -> None:
    """Run what is missing of the table, and write what there is: page, JSON, and the table itself."""
    import torch

    from ostinato.cli.compare import run_with_bar
    from ostinato.cli.runs import split_names
    from ostinato.comparison.linear import budget_of, cells_of, content_of, plans_of, rows_of
    from ostinato.comparison.speed import CPU_LOAD, CUDA_LOAD, Load
    from ostinato.files import write_json

    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    wanted = budget_of(budget)
    plans = plans_of(wanted, split_names(mixers))
    cells, without = cells_of(wanted, plans)
    folder = out_folder or Path("reports") / f"linear-{budget}"
    # Speed is measured while nothing else runs: on the CPU before the cells, on a GPU, where kernels are compiled
    # first, after them.
    speeds: dict[str, dict[str, Any]] = {plan: {} for plan in plans}
    _add_speeds(speeds, "cpu", CPU_LOAD if budget != "smoke" else Load(16, 1, 1, 16), folder, retry, end)
    left = None if minutes is None else max(0.0, (end - time.monotonic()) / 60)
    found = run_with_bar(cells, folder, jobs, left, retry)
    if torch.cuda.is_available() and budget == "gpu":
        _add_speeds(speeds, "cuda", CUDA_LOAD, folder, retry, end)
    content = content_of(budget, plans, cells, found, speeds, without)
    write_json(folder / "result.json", content)
    if save is not None:
        write_json(save, content)
    _page(folder, content, found, wanted)
    if json:
        return print_json(content)
    headers, rows, _ = rows_of(content)
    print_table(headers, rows, f"What each linear recurrence can do, budget {budget}")
    done, total = content["finished"]
    out.print(f"\n{done} of {total} runs; {folder / 'index.html'}")


def _add_speeds(
    speeds: dict[str, dict[str, Any]], device: str, load: Any, folder: Path, retry: bool, end: float
) -> None:
    """Tokens a second of every plan on a device, kept in a file; begins no measurement after the time `end`."""
    from ostinato.comparison.speed import measure_speed
    from ostinato.files import read_json, write_json

    path = folder / f"speed-{device}.json"
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    for plan, found in speeds.items():
        if (plan not in known or (retry and "failed" in known[plan])) and time.monotonic() < end:
            err.print(f"[dim]speed of {plan}, {device}[/]", highlight=False)
            try:
                known[plan] = measure_speed(plan, load, device)
            except Exception as error:  # one mixer's failure is its own
                text = str(error).strip().splitlines()
                known[plan] = {"failed": f"{type(error).__name__}: {text[0] if text else ''}"}
            write_json(path, known)
        if plan in known:
            found[device] = known[plan]


def _page(folder: Path, content: dict[str, Any], found: dict[Any, dict[str, Any]], budget: Any) -> None:
    from ostinato.comparison.board import length_curves
    from ostinato.comparison.linear import rows_of
    from ostinato.report import Figure, Page, Strong

    headers, rows, best = rows_of(content)
    shown = [[Strong(cell) if (i, j) in best else cell for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    sizes = content["sizes"]
    page = Page(
        "What each linear recurrence can do",
        f"{sizes['layers']} layers of width {sizes['d_model']}, {sizes['seeds']} seeds, all else equal",
    )
    page.text("Accuracies, means over seeds ± standard deviation; bits per byte at equal parameters: less is better.")
    page.table(headers, shown)
    page.heading("The tasks")
    page.table(
        ["columns", "task", "steps", "batch", "baselines"],
        [
            [
                ", ".join(part["columns"]),
                part["task"],
                part["steps"],
                part["batch_size"],
                ", ".join(f"{name} {value:.3f}" for name, value in part["baselines"].items()),
            ]
            for part in content["trainings"]
        ],
    )
    for training in budget.trainings:
        lines = length_curves(found, training.task)
        if lines:
            page.heading(training.task)
            page.figure(Figure("over length", lines, "length", "score", log_x=True))
    failures = [[c.plan, c.task, str(c.seed), r["failed"]] for c, r in found.items() if "failed" in r]
    if failures:
        page.heading("What failed")
        page.table(["mixer", "task", "seed", "message"], failures)
    page.heading("How it was had")
    page.table(["what", "value"], [[key, str(value)] for key, value in {**sizes, **content["machine"]}.items()])
    page.save(folder / "index.html")
