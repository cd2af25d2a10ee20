"""The runner, on a paper that does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostinato.errors import ConfigurationError
from ostinato.papers.runner import reproduce, verdict

MODULE = '''
"""A paper of our own."""
from ostinato.papers.runner import Claim, Measured
from ostinato.report import Series

claims = (
    Claim("sum", "addition works", theirs="4"),
    Claim("size", "it is big", theirs="over 9000"),
    Claim("gpu", "it is fast", theirs="1 ms"),
)


def experiment(run):
    count = run.choose(smoke=2, cpu=20, gpu=200)
    run.sizes["count"] = count
    with open(run.folder.parent / "calls", "a") as file:
        first = run.part("first", lambda: (file.write("first "), count + 2)[1])
        second = run.part("second", second_part, file, seed=run.seed)
    run.figure("Sums", [Series("sum", [1, 2, 3], [first, second, first])], x_label="step")
    return [
        Measured("sum", ours=str(first), holds=first == 4),
        Measured("size", ours=str(second), holds=second > 9000, note="a small one"),
    ]


def second_part(file, seed):
    file.write("second ")
    if (__import__("pathlib").Path(file.name).parent / "interrupt").exists():
        raise KeyboardInterrupt
    return seed
'''


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "p01_ours.py").write_text(MODULE)
    return folder


def test_a_report_holds_everything(papers: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "out").mkdir()
    outcome = reproduce("01", "smoke", seed=3, out=tmp_path / "out", say=said.append, folder=papers)
    folder = tmp_path / "out" / "01"
    assert json.loads((folder / "result.json").read_text()) == outcome
    assert [claim["holds"] for claim in outcome["claims"]] == [True, False, None]
    assert outcome["claims"][2]["ours"] == "not measured"
    assert outcome["seed"] == 3 and outcome["sizes"] == {"count": 2} and outcome["seconds"] >= 0
    assert {"torch", "processor", "ostinato", "python"} <= set(outcome["machine"])
    assert said == ["first", "second"]
    page = (folder / "index.html").read_text()
    for text in ("addition works", "over 9000", "does not hold", "not tested", "a small one", "<svg", "DeltaProduct"):
        assert text in page
    assert (folder / "figure-1.svg").read_text().startswith("<svg")


def test_an_interrupted_run_goes_on(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "interrupt").touch()
    with pytest.raises(KeyboardInterrupt):
        reproduce(1, out=out, folder=papers)
    (out / "interrupt").unlink()
    said: list[str] = []
    outcome = reproduce(1, out=out, folder=papers, say=said.append)
    assert outcome["claims"][0]["holds"]
    assert (out / "calls").read_text().split() == ["first", "second", "second"]
    assert said == ["first: kept from an earlier run", "second"]


def test_a_part_of_other_arguments_is_computed_again(papers: Path, tmp_path: Path) -> None:
    from ostinato.papers.catalogue import system
    from ostinato.papers.runner import Run

    calls: list[tuple[object, ...]] = []

    def double(number: int, *rest: object, **options: object) -> int:
        calls.append((number, *rest))
        return 2 * number

    def run() -> Run:
        return Run(system(1), "smoke", 0, tmp_path / "report")

    assert run().part("twice", double, 2, range(3), "cpu") == 4
    assert run().part("twice", double, 2, range(3), "cuda") == 4, "a run may go on on another machine"
    assert len(calls) == 1
    assert run().part("twice", double, 3, range(3), "cpu") == 6
    assert run().part("twice", double, 3, range(4), "cpu") == 6
    assert len(calls) == 3


def test_a_second_run_knows_the_time_left(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcome = reproduce(1, out=out, folder=papers)
    assert set(outcome["parts"]) == {"first", "second"}
    path = out / "01" / "result.json"
    path.write_text(json.dumps({**outcome, "parts": {"first": 100.0, "second": 200.0}}))
    said: list[str] = []
    reproduce(1, seed=1, out=out, folder=papers, say=said.append)
    assert said[0] == "first (about 5 min left)"
    # The first part took next to nothing, so the second will too.
    assert said[1] == "second (about 1 s left)"


def test_the_time_left_without_parts_is_that_of_the_whole(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcome = reproduce(1, out=out, folder=papers)
    path = out / "01" / "result.json"
    del outcome["parts"]
    path.write_text(json.dumps({**outcome, "seconds": 240.0}))
    said: list[str] = []
    reproduce(1, seed=1, out=out, folder=papers, say=said.append)
    assert said == ["first (about 4 min left)", "second (about 4 min left)"]


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    reproduce(1, out=out, folder=papers)
    part = out / "01" / "parts" / "smoke-0-first.json"
    part.write_text(json.dumps({**json.loads(part.read_text()), "seconds": 1000.0}))
    assert reproduce(1, out=out, folder=papers)["seconds"] >= 1000


def test_another_budget_or_seed_is_another_run(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert reproduce(1, "smoke", out=out, folder=papers)["claims"][0]["ours"] == "4"
    assert reproduce(1, "cpu", out=out, folder=papers)["claims"][0]["ours"] == "22"
    assert reproduce(1, "smoke", seed=9001, out=out, folder=papers)["claims"][1]["holds"]


def test_planned_systems_and_bad_budgets_are_errors(papers: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"73 S4 is planned.*the mixers s4"):
        reproduce(73, out=tmp_path, folder=papers)
    with pytest.raises(ConfigurationError, match="no budget 'huge'; choose one of smoke, cpu, gpu"):
        reproduce(1, "huge", out=tmp_path, folder=papers)


def test_a_module_must_be_whole(papers: Path, tmp_path: Path) -> None:
    (papers / "p02_empty.py").write_text("claims = ()\n")
    with pytest.raises(ConfigurationError, match="does not define 'experiment'"):
        reproduce(2, out=tmp_path, folder=papers)
    (papers / "p03_odd.py").write_text(MODULE.replace('Claim("sum"', 'Claim("total"'))
    (tmp_path / "03").mkdir()
    with pytest.raises(ConfigurationError, match="measured what it does not claim: sum"):
        reproduce(3, out=tmp_path, folder=papers)


def test_verdicts() -> None:
    assert [verdict(v) for v in (True, False, None)] == ["holds", "does not hold", "not tested"]
