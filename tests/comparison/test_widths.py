from __future__ import annotations

import pytest

from ostinato.comparison.widths import count_parameters, width_for
from ostinato.errors import ConfigurationError

TASK = "parity(test_size=8)"


@pytest.mark.parametrize("plan", ["min_gru", "delta_net", "retnet", "mamba2", "min_gru, delta_net(heads=8)"])
def test_no_width_comes_nearer(plan: str) -> None:
    wanted = 20_000
    width = width_for(plan, TASK, 2, wanted)
    counts = {}
    for other in range(4, 120, 4):
        try:
            counts[other] = abs(count_parameters(plan, TASK, other, 2) - wanted)
        except ConfigurationError:  # a width that the mixer refuses
            continue
    assert counts[width] == min(counts.values())


def test_the_width_of_a_count_is_found_again() -> None:
    assert width_for("gla", TASK, 1, count_parameters("gla", TASK, 48, 1)) == 48


def test_no_such_width() -> None:
    with pytest.raises(ConfigurationError, match="no width"):
        width_for("mamba2", TASK, 2, 100)
