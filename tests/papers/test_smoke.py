"""Every paper's smoke budget: it runs, measures each of its claims once, and resumes from its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostinato.papers.catalogue import module_path, systems
from ostinato.papers.runner import reproduce

BUILT = [system.number for system in systems() if module_path(system) is not None]


@pytest.mark.parametrize("number", BUILT)
def test_smoke(number: int, tmp_path: Path) -> None:
    outcome = reproduce(number, "smoke", out=tmp_path)
    measured = [claim for claim in outcome["claims"] if claim["ours"] != "not measured"]
    assert measured and outcome["sizes"]
    assert all(claim["ours"] and "nan" not in claim["ours"] for claim in measured)
    said: list[str] = []
    again = reproduce(number, "smoke", out=tmp_path, say=said.append)
    assert again["claims"] == outcome["claims"]
    assert all("kept" in line for line in said)
