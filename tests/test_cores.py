"""The cores that this process may use."""

from __future__ import annotations

import multiprocessing

from ostinato.cores import available_cores


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= available_cores() <= (multiprocessing.cpu_count() or 1)
