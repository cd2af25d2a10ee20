"""The memory probe, on states whose memory is known."""

from __future__ import annotations

import pytest
import torch

from ostinato.analysis.memory import low_passed_noise, memory_of_delays
from ostinato.errors import ConfigurationError
from ostinato.ops.hippo import discretize, hippo_matrix


def test_noise_has_its_band_and_variance() -> None:
    signal = low_passed_noise(2000, cutoff=0.05, seed=1)
    spectrum = torch.fft.rfft(signal).abs()
    assert float(spectrum[101:].max()) < 1e-9 * float(spectrum.max())
    assert abs(float(signal.std()) - 1) < 1e-12


def test_a_shift_register_remembers_its_length_and_no_more() -> None:
    shift = torch.diag(torch.ones(7, dtype=torch.float64), -1)
    first = torch.eye(8, dtype=torch.float64)[0]
    inside, outside = memory_of_delays(shift, first, delays=(7, 60), steps=3000)
    assert inside > 0.999 and outside < 0.5


def test_legs_remembers_more_than_a_ladder_of_decays() -> None:
    (legs,) = memory_of_delays(*discretize(*hippo_matrix("legs", 32), 1 / 64), delays=(64,), steps=2000)
    decays = -torch.diag(torch.arange(1, 33, dtype=torch.float64))
    (ladder,) = memory_of_delays(
        *discretize(decays, torch.ones(32, dtype=torch.float64), 1 / 64), delays=(64,), steps=2000
    )
    assert legs > 0.98 and ladder < 0.6


def test_what_cannot_be_probed() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert memory_of_delays(1e3 * one, one[0], delays=(3,), steps=600) == [-float("inf")]
    with pytest.raises(ConfigurationError, match="delays must lie in"):
        memory_of_delays(one, one[0], delays=(61,), steps=600)
    with pytest.raises(ConfigurationError, match="cutoff"):
        low_passed_noise(10, cutoff=0.6)
