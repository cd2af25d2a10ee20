from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ostinato.errors import CheckpointError
from ostinato.files import write_json
from ostinato.tasks.text import Text
from ostinato.training import checkpoints
from ostinato.training.fit import fit

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def run(small: Callable[..., Any], text: Text, tmp_path: Path) -> Path:
    fit(small(), text, steps=4, checkpoint_every=2, directory=tmp_path / "run", **QUIET)
    return tmp_path / "run"


def _resume(small: Callable[..., Any], text: Text, run: Path) -> None:
    fit(small(), text, steps=6, directory=run, resume=True, **QUIET)


@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "optimizer.safetensors", "random.safetensors", "state.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_found(small: Callable[..., Any], text: Text, run: Path, file: str, damage: str) -> None:
    path = run / "checkpoints" / "step-00000004" / file
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    else:
        path.unlink()
    complaint = "incomplete" if damage == "remove" else "damaged"
    with pytest.raises(CheckpointError, match=f"{complaint}"):
        _resume(small, text, run)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a checkpoint of a run"),
        ('{"kind": "training checkpoint"}', "not written by Ostinato"),
        ('{"kind": "training checkpoint", "format": "ostinato", "version": 99}', "update ostinato"),
        ('{"kind": "training checkpoint", "format": "ostinato", "version": 1}', "names no files"),
    ],
)
def test_foreign_notes(small: Callable[..., Any], text: Text, run: Path, content: str, complaint: str) -> None:
    (run / "checkpoints" / "step-00000004" / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        _resume(small, text, run)


def test_nothing_is_pickled(run: Path) -> None:
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_last_checkpoint(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints"
    assert checkpoints.last_checkpoint(run) == folder / "step-00000004"
    assert checkpoints.last_checkpoint(tmp_path / "nowhere") is None
    # Killed before the pointer was written: the folder that it names counts; without it, the newest.
    shutil.copytree(folder / "step-00000004", folder / "step-00000009")
    assert checkpoints.last_checkpoint(run) == folder / "step-00000004"
    (folder / "last.json").unlink()
    assert checkpoints.last_checkpoint(run) == folder / "step-00000009"
    shutil.rmtree(folder / "step-00000009")
    write_json(folder / "last.json", {"directory": "../../elsewhere"})
    assert checkpoints.last_checkpoint(run) == folder / "step-00000004"


def test_a_failed_save_leaves_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"

    def write(folder: Path) -> None:
        (folder / "file").write_text("content")

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device; there is no checkpoint before it"):
        checkpoints.save_checkpoint(directory, 1, {}, fail, keep=2)
    checkpoints.save_checkpoint(directory, 2, {"note": 5}, write, keep=2)
    with pytest.raises(CheckpointError, match=r"step-00000002, is whole"):
        checkpoints.save_checkpoint(directory, 3, {}, fail, keep=2)
    notes = checkpoints.read_checkpoint(directory / "step-00000002")
    assert notes["step"] == 2 and notes["note"] == 5
    assert sorted(path.name for path in directory.iterdir()) == ["last.json", "step-00000002"]


def test_left_overs_and_old_ones_go(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    (directory / ".step-00000001.part").mkdir(parents=True)
    (directory / ".last.json.abcdefgh.part").touch()
    for step in (1, 2, 3, 4):
        checkpoints.save_checkpoint(directory, step, {}, lambda folder: None, keep=2)
    assert sorted(path.name for path in directory.iterdir()) == ["last.json", "step-00000003", "step-00000004"]
    assert json.loads((directory / "last.json").read_text())["directory"] == "step-00000004"


def test_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    model, other = Tied(), Tied()
    checkpoints.write_model(tmp_path, model, model.state_dict())
    checkpoints.read_model(tmp_path, other)
    assert torch.equal(model.head.weight, other.head.weight) and other.head.weight is other.embedding.weight


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        momentum = {"momentum": 0.9} if make is torch.optim.SGD else {}
        group = {"params": list(model.parameters()), "names": ["weight", "bias"]}
        return model, make([group], lr=0.1, **momentum)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    checkpoints.write_optimizer(tmp_path / "o.safetensors", optimizer)
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    checkpoints.read_optimizer(tmp_path / "o.safetensors", fresh)
    step(model, optimizer)
    step(other, fresh)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    fresh.param_groups[0]["names"] = ["weight", "other"]
    with pytest.raises(CheckpointError, match="no parameter 'bias'"):
        checkpoints.read_optimizer(tmp_path / "o.safetensors", fresh)
