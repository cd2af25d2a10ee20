"""The catalogue: 82 honest records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostinato.errors import ConfigurationError
from ostinato.mixers import registry
from ostinato.papers import catalogue

ROOMS = {"ops", "mixers", "layers", "models", "tasks", "training", "analysis", "theory", "quantum"}
ENGINES = {
    "diagonal_scan",
    "linear_attention",
    "exponential_attention",
    "delta_rule",
    "recurrent_scan",
    "newton_scan",
    "long_convolution",
    "attention",
    "memory_scan",
    "grid_scan",
}


def test_all_82_are_there_once() -> None:
    records = catalogue.systems()
    assert [record.number for record in records] == list(range(82))
    assert len({record.system for record in records}) == 82
    assert len({record.arxiv for record in records}) == 82


@pytest.mark.parametrize("record", catalogue.systems(), ids=lambda record: record.label)
def test_a_record_is_whole(record: catalogue.System) -> None:
    assert record.title and record.built_of
    assert 2014 <= record.year <= 2026
    month, _, serial = record.arxiv.partition(".")
    assert len(month) == 4 and serial.isdigit() and len(serial) in (4, 5)
    assert record.rooms and set(record.rooms) <= ROOMS
    assert set(record.engines) <= ENGINES
    missing = set(record.mixers) - {*registry.mixers(), *registry.whole_mixers(), *registry.prefix_mixers()}
    assert not missing, f"{record.label} names mixers that are not there: {missing}"


def test_the_state_follows_from_the_files(tmp_path: Path) -> None:
    which = catalogue.system(1)
    results, modules = tmp_path / "results", tmp_path / "papers"
    results.mkdir()
    modules.mkdir()

    def state() -> str:
        return catalogue.state(which, results, modules)

    def write(*verdicts: bool | None) -> None:
        claims = [{"claim": "it works", "holds": verdict} for verdict in verdicts]
        (results / "01.json").write_text(json.dumps({"claims": claims}))

    write(True)
    assert state() == "planned", "a result without an experiment proves nothing"
    (modules / "p01_deltaproduct.py").touch()
    assert state() == "reproduced"
    write(True, None)
    assert state() == "reproduced"
    write(None)
    assert state() == "built"
    write(True, False)
    assert state() == "did not hold"
    (results / "01.json").unlink()
    assert state() == "built"


def test_numbers() -> None:
    assert catalogue.system("01") is catalogue.system(1)
    assert catalogue.system(7).label == "07"
    for wrong in ("82", -1, "gla", "1.5"):
        with pytest.raises(ConfigurationError, match="no system"):
            catalogue.system(wrong)


def test_committed_results_are_well_formed() -> None:
    folder = catalogue.results_folder()
    for path in (*folder.glob("[0-9][0-9].json"), *folder.glob("cpu/[0-9][0-9].json")):
        content = json.loads(path.read_text())
        assert content["number"] == int(path.stem)
        assert all({"claim", "theirs", "ours", "holds"} <= set(claim) for claim in content["claims"])
        assert {"budget", "seed", "seconds", "machine"} <= set(content)
        assert path.parent == folder or (content["budget"] == "cpu" and (folder / path.name).is_file())
