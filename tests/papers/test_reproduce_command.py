"""`ostinato reproduce`: several systems, processes, and an end by the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ostinato.cli.app import app
from ostinato.papers import runner

OUTCOME = {"system": "a system", "claims": [{"claim": "it works", "theirs": "1", "ours": "2", "holds": True}]}


def ostinato(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["reproduce", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Of the runner, instead of running."""
    calls: list[tuple[int, dict[str, Any]]] = []

    def fake(number: int, budget: str, **options: Any) -> dict[str, Any]:
        calls.append((number, options))
        options["say"]("words [bold] in brackets")
        if options["minutes"] is not None and len(calls) == 2:
            raise runner.TimeIsUp("time is up before a, b, and what needs them")
        return OUTCOME

    monkeypatch.setattr(runner, "reproduce", fake)
    return calls


def test_several_systems_follow_each_other(asked: list[tuple[int, dict[str, Any]]]) -> None:
    result = ostinato("41", "7", "41", "--jobs", 3)
    assert [number for number, _ in asked] == [41, 7]
    assert all(options["jobs"] == 3 and options["minutes"] is None for _, options in asked)
    assert "41  words [bold] in brackets" in result.stderr and result.stdout.count("it works") == 2


def test_the_minutes_are_those_of_all_systems(asked: list[tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    result = ostinato("41", "7", "8", "--stop-after", 5, "--jobs", 2, "--out", tmp_path, code=130)
    assert [number for number, _ in asked] == [41, 7]
    assert asked[1][1]["minutes"] < asked[0][1]["minutes"] <= 5
    assert "07  time is up before a, b, and what needs them" in result.stderr
    assert f"`ostinato reproduce 41 7 8 --budget smoke --seed 0 --out {tmp_path} --jobs 2` goes on" in result.stderr


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    assert "jobs must be at least 1, got 0" in ostinato("41", "--jobs", 0, "--out", tmp_path, code=2).stderr
