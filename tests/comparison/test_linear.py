from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostinato.comparison.cells import build_task
from ostinato.comparison.grid import run_cells
from ostinato.comparison.linear import BUDGETS, YARDSTICKS, budget_of, cells_of, columns_of, content_of, linear_plans

from ostinato.comparison.linear import plans_of, rows_of  # isort: skip
from ostinato.errors import UnknownNameError
from ostinato.mixers.registry import mixer_class, mixers


def test_all_linear_mixers_and_no_others_but_the_yardsticks() -> None:
    plans = linear_plans()
    bases = {plan.partition("(")[0] for plan in plans}
    linear = {name for name in mixers() if mixer_class(name).traits.linear}
    assert bases == linear | set(YARDSTICKS) and len(set(plans)) == len(plans)
    assert "delta_net(negative_eigenvalues=True)" in plans


@pytest.mark.parametrize("name", BUDGETS)
def test_tasks_of_a_budget_can_be_built_and_have_the_columns(name: str) -> None:
    for training in budget_of(name).trainings:
        task = build_task(training.task)
        assert task.higher_is_better == training.higher_is_better
        names = {f"length {length}" for length in getattr(task, "test_lengths", ())}
        for key in training.columns.values():
            spec, found, rest = key.rpartition(": ")
            if found:
                assert spec in training.also and rest.removeprefix("accuracy/") in {
                    batch.split for batch in build_task(spec).test_batches()
                }
            else:
                measure, _, split = key.partition("/")
                assert measure in ("accuracy", "bits_per_byte") and (not split or split in names)


def test_the_columns_that_were_promised() -> None:
    columns = list(columns_of(budget_of("gpu")))
    for name in ("parity", "mod-3", "S3", "S5", "MQAR 2", "MQAR 4", "MQAR 8", "selective copying", "passkey, 4×",
                 "passkey, 16×", "T1", "T2", "T3", "T4", "bits per byte"):  # fmt: skip
        assert name in columns


def test_first_seeds_come_first_and_text_has_equal_parameters() -> None:
    budget = budget_of("gpu")
    cells, without = cells_of(budget, ["gla", "mamba2"])
    assert len(cells) == 2 * 11 * 3 and not without
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    widths = {cell.plan: cell.d_model for cell in cells if cell.task.startswith("text")}
    assert widths["gla"] > widths["mamba2"]
    assert {cell.d_model for cell in cells if not cell.task.startswith("text")} == {64}


def test_the_table_from_its_cells(tmp_path: Path) -> None:
    budget = budget_of("smoke")
    plans = plans_of(budget, ["min_gru", "delta_net(heads=3)"])
    cells, without = cells_of(budget, plans)
    found = run_cells(cells, tmp_path)
    speeds = {"min_gru": {"cpu": {"training": 1234.0}}, "delta_net(heads=3)": {"cpu": {"failed": "x"}}}
    content = json.loads(json.dumps(content_of("smoke", plans, cells, found, speeds, without)))
    assert content["finished"] == [8, 8] and content["trainings"][0]["baselines"]
    headers, rows, best = rows_of(content)
    assert headers == ["mixer", "parity", "parity, 4×", "T2", "T4", "state, bytes", "tokens/s, two threads"]
    assert rows[1] == ["delta_net(heads=3)", *["failed"] * 4, "–", "failed"]
    values = [
        found[cell]["metrics"]["accuracy/length 16"]
        for cell in cells
        if cell.plan == "min_gru" and "parity" in cell.task
    ]
    assert rows[0][1].startswith(f"{sum(values) / 2:.2f} ± ") and rows[0][-1] == "1,234"
    assert best == {(0, column) for column in range(1, 5)}


def test_baselines_are_in_the_measure_of_the_columns() -> None:
    content = content_of("smoke", ["gla"], [], {}, {}, {})
    parity = content["trainings"][0]
    # Scaled accuracy, the task's own metric, would be near zero.
    assert parity["chance"] == 0.5 and 0.5 <= parity["baselines"]["most frequent answer"] < 0.8
    assert build_task(parity["task"]).metric == "scaled_accuracy"


def test_rows_without_results() -> None:
    content = content_of("smoke", ["gla"], cells_of(budget_of("smoke"), ["gla"])[0], {}, {}, {})
    assert rows_of(content)[1] == [["gla", "–", "–", "–", "–", "–"]]


def test_unknown_budget() -> None:
    with pytest.raises(UnknownNameError, match="smoke"):
        budget_of("smokes")


def test_the_page_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    generate = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))
    catalogue = generate["catalogue"]
    monkeypatch.setattr(catalogue, "results_folder", lambda: tmp_path)
    assert "has been committed yet" in generate["linear_family"]()
    budget = budget_of("smoke")
    plans = ["delta_net(negative_eigenvalues=True)", "gla(heads=3)"]
    cells, without = cells_of(budget, plans)
    found = run_cells(cells, tmp_path)
    content = content_of("smoke", plans, cells, found, {}, without)
    (tmp_path / "linear_family.json").write_text(json.dumps(content))
    page = generate["linear_family"]()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `delta_net(")]
    assert len(rows) == 1 and rows[0][1:4] == ["rank-1", "input", "yes"] and rows[0][4].startswith("**")
    assert "| `gla(heads=3)` | parity | ConfigurationError: " in page
    assert "8 of 8 runs" in page and "most frequent answer" in page
