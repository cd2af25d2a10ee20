"""Tuning keeps what is faster and right, and the file is read back; a foreign file changes nothing and is not lost."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ostinato.errors import CheckpointError
from ostinato.ops.kernels.triton import tuned


class Plan(NamedTuple):
    rows: int
    walk_warps: int
    stages: int


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("OSTINATO_TUNED", str(path))
    tuned.table.cache_clear()
    yield path
    tuned.table.cache_clear()


def call_with(used):
    def call():
        plan = tuned.tuned("walk", Plan(64, 4, 2), torch.bfloat16, 128)
        used.append(plan)
        if plan.walk_warps == 2:
            raise RuntimeError("no room")
        return [torch.full((3,), 5.0 if plan.stages == 3 else 1.0)]

    return call


def seconds(call, repeats):
    plan = call.__closure__[0].cell_contents and call.__closure__[0].cell_contents[-1]
    return {4: 1.0, 8: 0.5}[plan.walk_warps] * {1: 2.0, 2: 1.0, 3: 0.1, 4: 0.9}[plan.stages]


def test_what_is_faster_and_right_is_kept_and_read_back(file):
    used, said = [], []
    (choice,) = tuned.tune(call_with(used), seconds=seconds, say=said.append)
    # Two warps fail and three stages compute something else, though they would be fastest.
    assert choice.fields == {"walk_warps": 8, "stages": 4}
    assert choice.before == 1.0
    assert choice.after == pytest.approx(0.45)
    assert any("RuntimeError" in line for line in said)
    assert tuned.save([choice]) == file
    assert tuned.tuned("walk", Plan(64, 4, 2), torch.bfloat16, 128) == Plan(64, 8, 4)
    assert tuned.tuned("walk", Plan(64, 4, 2), torch.float32, 128) == Plan(64, 4, 2)
    assert not tuned._trial


def test_a_foreign_file_changes_nothing_and_is_not_overwritten(file):
    file.write_text('{"weights": [1, 2]}')
    assert tuned.tuned("walk", Plan(64, 4, 2)) == Plan(64, 4, 2)
    with pytest.raises(CheckpointError, match="not a file of"):
        tuned.save([tuned.Choice("walk", {"stages": 1}, 1.0, 0.5)])
    assert file.read_text() == '{"weights": [1, 2]}'
    file.write_text("{ broken")
    tuned.table.cache_clear()
    assert tuned.tuned("walk", Plan(64, 4, 2)) == Plan(64, 4, 2)
