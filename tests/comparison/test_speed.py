from __future__ import annotations

import pytest
import torch

from ostinato.comparison.speed import Load, measure_speed


@pytest.mark.parametrize("plan", ["min_gru", "attention"])
def test_speed_of_a_mixer_beside_attention(plan: str) -> None:
    found = measure_speed(plan, Load(16, 1, 1, 16), threads=1, rounds=3)
    assert all(value > 0 for value in found.values())
    assert found["times attention"] == pytest.approx(found["training"] / found["attention training"], rel=2e-3)
    assert torch.get_num_threads() == 1


def test_half_precision() -> None:
    assert measure_speed("gla", Load(16, 1, 1, 16, half=True), threads=1, rounds=3)["training"] > 0
