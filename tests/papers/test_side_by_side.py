"""The parts of an experiment in several processes: the same result, each part once, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.papers import side_by_side
from ostinato.papers.catalogue import system
from ostinato.papers.pending import Pending, Waiting
from ostinato.papers.runner import Run, TimeIsUp, reproduce
from ostinato.papers.side_by_side import Order, device_of, locked

MODULE = '''
"""A paper of our own: four parts, one of their sum, a timed one, and one that needs it."""
import os
import signal
import time

from ostinato.papers.runner import Claim, Measured
from ostinato.report import Series

claims = (Claim("sum", "addition works", theirs="10"),)


def experiment(run):
    gathered = {name: run.part(name, work, run, name, index) for index, name in enumerate("abcd", start=1)}
    run.sizes["names"] = "".join(gathered)
    total = run.part("total", work, run, "total", sum(gathered.values()))
    clock = run.timed_part("clock", work, run, "clock", 7)
    run.figure("Sums", [Series("sum", [1, 2], [total, clock])])
    after = run.part("after", work, run, "after", clock + 1)
    return [Measured("sum", ours=f"{total}, {after}", holds=total == 10)]


def work(run, name, value):
    folder = run.folder.parent
    with open(folder / "calls", "a") as file:
        file.write(f"{name} {os.getpid()}\\n")
    if (folder / f"{name} fails").exists():
        raise RuntimeError(f"{name} is broken")
    if (folder / f"{name} dies").exists():
        (folder / f"{name} dies").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (folder / f"{name} hangs").exists():
        time.sleep(100)
    run.say(f"{name} says something")
    return value
'''
PARTS = ["a", "b", "c", "d", "total", "clock", "after"]


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "p01_ours.py").write_text(MODULE)
    (tmp_path / "out").mkdir()
    return folder


def _calls(out: Path) -> list[tuple[str, int]]:
    if not (out / "calls").exists():
        return []
    return [(name, int(pid)) for name, pid in (line.split() for line in (out / "calls").read_text().splitlines())]


def _lives(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty when it ended and nobody asked how
    except OSError:
        return False


def _until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_give_what_one_gives(papers: Path, tmp_path: Path) -> None:
    """One of the two is killed in the middle of a part, which the other takes."""
    out = tmp_path / "out"
    (out / "c dies").touch()
    said: list[str] = []
    outcome = reproduce(1, out=out, folder=papers, jobs=2, say=said.append)
    (tmp_path / "alone").mkdir()
    alone = reproduce(1, out=tmp_path / "alone", folder=papers)
    assert outcome["claims"] == alone["claims"] and outcome["claims"][0]["ours"] == "10, 8"
    assert outcome["sizes"] == alone["sizes"] and set(outcome["parts"]) == set(PARTS)
    assert outcome["jobs"] == 2 and "jobs" not in alone
    assert [path.name for path in (out / "01").glob("figure-*")] == ["figure-1.svg"]

    calls = _calls(out)
    assert sorted(name for name, _ in calls) == sorted([*PARTS, "c"])
    assert [name for name, pid in calls if pid == os.getpid()] == ["clock"]
    assert calls.index(("clock", os.getpid())) == len(calls) - 2
    assert any("ended with code -9" in line for line in said)
    assert {"a", "total", "clock", "after", "a says something"} <= set(said)
    assert not multiprocessing.active_children()

    parts = {path.name: path for path in (out / "01" / "parts").iterdir()}
    assert set(parts) == {f"smoke-0-{name}.json" for name in PARTS}, "no locks are left"
    for name, path in parts.items():  # the run among the arguments counts as the same kind of thing in both
        same = tmp_path / "alone" / "01" / "parts" / name
        assert json.loads(path.read_text())["arguments"] == json.loads(same.read_text())["arguments"]


def test_a_part_that_fails_stops_no_other(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "b fails").touch()
    said: list[str] = []
    with pytest.raises(RuntimeError, match="b is broken"):
        reproduce(1, out=out, folder=papers, jobs=2, say=said.append)
    calls = _calls(out)
    failed = [pid for name, pid in calls if name == "b"]
    assert len(failed) == 2 and failed[0] != failed[1] == os.getpid(), "once elsewhere, then here"
    assert {path.stem.rpartition("-")[2] for path in (out / "01" / "parts").iterdir()} == {"a", "c", "d"}
    assert any("b failed" in line and "Traceback" in line and "b is broken" in line for line in said)
    (out / "b fails").unlink()
    assert reproduce(1, out=out, folder=papers)["claims"][0]["holds"]
    assert sorted(name for name, _ in _calls(out)) == sorted([*PARTS, "b", "b"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_caller_ends_all_and_keeps_what_is_finished(papers: Path, tmp_path: Path, how: int) -> None:
    """Ctrl-C goes to all processes; a kill to the caller alone."""
    out = tmp_path / "out"
    (out / "b hangs").touch()
    program = (
        "import sys\nfrom pathlib import Path\nfrom ostinato.papers.runner import reproduce\n"
        "if __name__ == '__main__':\n    reproduce(1, out=sys.argv[1], folder=Path(sys.argv[2]), jobs=2)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(out), str(papers)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    finished = [out / "01" / "parts" / f"smoke-0-{name}.json" for name in "acd"]
    _until(lambda: all(path.exists() for path in finished) and "b" in dict(_calls(out)))
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -how, errors
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    pids = {pid for _, pid in _calls(out)}
    _until(lambda: not any(_lives(pid) for pid in pids))
    (out / "b hangs").unlink()
    before = len(_calls(out))
    assert reproduce(1, out=out, folder=papers)["claims"][0]["holds"]
    assert [name for name, _ in _calls(out)[before:]] == ["b", "total", "clock", "after"]


def test_no_part_is_begun_when_time_is_up(papers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for jobs in (1, 2):
        with pytest.raises(TimeIsUp, match=r"^time is up before a, b, c, d, and what needs them$"):
            reproduce(1, out=out, folder=papers, jobs=jobs, minutes=0)
    assert not _calls(out) and not (out / "01" / "result.json").exists()
    reproduce(1, out=out, folder=papers, minutes=1)
    assert [name for name, _ in _calls(out)] == PARTS
    for jobs in (1, 2):  # nothing is left to begin
        assert reproduce(1, out=out, folder=papers, jobs=jobs, minutes=0)["claims"][0]["holds"]


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_below_one_are_refused(papers: Path, tmp_path: Path, jobs: int) -> None:
    with pytest.raises(ConfigurationError, match=f"jobs must be at least 1, got {jobs}"):
        reproduce(1, out=tmp_path, folder=papers, jobs=jobs)


# --------------------------------------------------------------------------------------------------
# The pieces, in this process.


class _Line:
    """Keeps what a process would report."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Any]] = []

    def send(self, message: tuple[str, str, Any]) -> None:
        self.sent.append(message)


@pytest.fixture
def order(tmp_path: Path) -> Order:
    (tmp_path / "marks").mkdir()
    return Order(1, "smoke", 0, tmp_path / "01", None, tmp_path / "marks", None, 1)


def _run(order: Order, line: Any) -> Run:
    way = side_by_side._take_or_leave(order, line, [])
    return Run(system(1), order.budget, order.seed, order.report, have=way)


def test_a_process_takes_what_nobody_has_taken(order: Order) -> None:
    line = _Line()
    run = _run(order, line)
    assert run.part("one", lambda: 1) == 1
    assert [message[:2] for message in line.sent] == [("begun", "one"), ("finished", "one")]
    assert run.part("one", lambda: 2) == 1 and line.sent[-1][:2] == ("kept", "one")
    assert type(run.timed_part("clock", lambda: 1)) is Pending
    lock = order.report / "parts" / "smoke-0-two.json.lock"
    with locked(lock) as mine:
        assert mine
        taken = run.part("two", lambda: 2)
    with pytest.raises(Waiting) as waiting:
        taken + 1
    assert waiting.value.lock == lock and run.pending == ["clock", "two"]
    assert run.part("two", lambda: 2) == 2


def test_a_part_that_failed_is_not_taken_again(order: Order) -> None:
    line = _Line()
    with pytest.raises(ZeroDivisionError):
        _run(order, line).part("a/b", lambda: 1 // 0)
    assert [message[:2] for message in line.sent] == [("begun", "a/b"), ("failed", "a/b")]
    run = _run(order, line)
    assert type(run.part("a/b", lambda: 1)) is Pending and len(line.sent) == 2


def test_a_lock_is_one_process_alone_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "parts" / "one.lock"
    with locked(path) as mine, locked(path) as other:
        assert mine and not other
    assert not path.exists()
    path.touch()  # of a process that was killed
    with locked(path) as mine:
        assert mine


def test_who_needs_a_part_waits_until_its_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    side_by_side._wait_for(path)  # nobody has it
    waiter = threading.Thread(target=side_by_side._wait_for, args=(path,))
    with locked(path):
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
    waiter.join(5)
    assert not waiter.is_alive()


def test_processes_go_round_the_devices_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(count: int, seen: str | None) -> list[str | None]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        return [device_of(index).get("CUDA_VISIBLE_DEVICES") for index in range(3)]

    assert devices(2, None) == ["0", "1", "0"]
    assert devices(2, "5, 3") == ["5", "3", "5"]
    assert devices(1, "GPU-8932f937,-1,2") == ["GPU-8932f937"] * 3
    assert devices(0, None) == [None] * 3
