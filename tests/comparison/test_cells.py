from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ostinato
from ostinato.comparison.cells import Cell, build_model, build_task, parse_task, read_result, result_path, run_cell
from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.mixers.minimal import MinGRU

PARITY = "parity(max_length=6, tested_lengths=(6, 9), test_size=8)"
TINY = Cell("min_gru", PARITY, steps=4, d_model=8, depth=1, batch_size=2, evaluations=2)


class Explosive(MinGRU):
    """Its outputs are not numbers."""

    def mix(self, x: torch.Tensor, state: object, reset: torch.Tensor | None) -> tuple[torch.Tensor, object]:
        y, state = super().mix(x, state, reset)
        return y * float("nan"), state


@pytest.fixture
def explosive() -> Iterator[str]:
    ostinato.register("explosive", Explosive, check=False)
    yield "explosive"
    ostinato.unregister("explosive")


def test_tasks_as_text() -> None:
    assert parse_task("mqar") == ("mqar", {})
    assert parse_task(" mqar(pairs=8, tested_lengths=(64, 128)) ") == (
        "mqar",
        {"pairs": 8, "tested_lengths": (64, 128)},
    )
    assert (
        parse_task("word_problem(group=S3)")
        == parse_task("word_problem(group='S3')")
        == ("word_problem", {"group": "S3"})
    )
    assert parse_task("text(carry=False)") == ("text", {"carry": False})
    assert build_task("word_problem(group=Z3)").vocab_size == 4
    for text in ("", "mqar(", "mqar(8)", "mqar(**x)", "a.b(c=1)", "mqar(pairs=1+x)", "3"):
        with pytest.raises(ConfigurationError, match="is written"):
            parse_task(text)
    with pytest.raises(UnknownNameError, match="parity"):
        build_task("pairity")


def test_a_cell_is_trained_scored_and_kept(tmp_path: Path) -> None:
    record = run_cell(TINY, tmp_path)
    assert record["metric"] == "scaled_accuracy" and record["cell"] == {**dataclasses.asdict(TINY), "also": []}
    assert {"accuracy", "accuracy/length 6", "accuracy/length 9", "loss"} <= set(record["metrics"])
    assert record["curve"][0] == [2, 4] and record["curve"][1][-1] == record["metrics"]["scaled_accuracy"]
    model = build_model("min_gru", build_task(PARITY), 8, 1)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["state_bytes"] == ostinato.state.num_bytes(model.initial_state(1)) > 0
    assert record["seconds"] > 0 and record["milliseconds_per_step"] > 0
    assert json.loads(json.dumps(record)) == read_result(TINY, tmp_path)
    again = run_cell(TINY, tmp_path)
    assert again["metrics"] == record["metrics"], "a cell is decided by what it names"
    assert not (tmp_path / "runs").exists()


def test_names_tell_cells_apart() -> None:
    changes = [{"seed": 1}, {"steps": 5}, {"d_model": 12}, {"learning_rate": 1e-3}, {"also": ("parity",)},
               {"plan": "gru"}, {"task": PARITY.replace("9", "10")}]  # fmt: skip
    names = {TINY.name(), *(dataclasses.replace(TINY, **change).name() for change in changes)}
    assert len(names) == 1 + len(changes)
    # Where it runs does not decide what it is; nor does the way in which its task is written.
    assert dataclasses.replace(TINY, device="cpu").name() == TINY.name()
    long = dataclasses.replace(TINY, plan=", ".join(["delta_net(negative_eigenvalues=True)"] * 20)).name()
    assert len(long) < 200 and "/" not in long and " " not in long


def test_other_tasks_are_scored_too(tmp_path: Path) -> None:
    other = "parity(tested_lengths=(20,), test_size=4)"
    record = run_cell(dataclasses.replace(TINY, also=(other,)), tmp_path)
    assert f"{other}: accuracy/length 20" in record["metrics"]


def test_vectors_are_read(tmp_path: Path) -> None:
    spec = "selectivbench(letters=3, length=5, test_size=4)"
    record = run_cell(dataclasses.replace(TINY, task=spec), tmp_path)
    assert 0 <= record["metrics"]["accuracy"] <= 1


def test_a_cell_that_diverges_is_kept_as_failed(tmp_path: Path, explosive: str) -> None:
    for steps, message in ((4, "not finite"), (30, "lower the learning rate")):
        cell = dataclasses.replace(TINY, plan=explosive, steps=steps)
        record = run_cell(cell, tmp_path)
        assert message in record["failed"] and "metrics" not in record
        assert read_result(cell, tmp_path) == record


def test_a_cell_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    record = run_cell(dataclasses.replace(TINY, plan="delta_net(heads=3)"), tmp_path)
    assert record["failed"].startswith("ConfigurationError") and "heads=3" in record["failed"]


def test_damaged_results_count_as_none(tmp_path: Path) -> None:
    assert read_result(TINY, tmp_path) is None
    path = result_path(TINY, tmp_path)
    path.parent.mkdir()
    for text in ("", "{", "[]", "{}"):
        path.write_text(text)
        assert read_result(TINY, tmp_path) is None
