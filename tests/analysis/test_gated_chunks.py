"""The costs of chunks against sums by hand, and the gates' gains where they can be told beforehand."""

from __future__ import annotations

import pytest
import torch

from ostinato.analysis.gated_chunks import (
    chunk_bytes,
    chunk_operations,
    fastest_chunk,
    fewest_operations,
    gate_transfer_map,
    stored_states,
)
from ostinato.errors import ConfigurationError


def test_the_papers_number() -> None:
    assert fewest_operations(256, 512) == pytest.approx(13.0344, abs=1e-4)


@pytest.mark.parametrize(("key_dim", "value_dim", "causal"), [(256, 512, 1.0), (64, 64, 0.5), (3, 7, 0.75)])
def test_no_other_chunk_has_fewer_operations(key_dim: int, value_dim: int, causal: float) -> None:
    best = fewest_operations(key_dim, value_dim, causal)
    least = chunk_operations(100, best, key_dim, value_dim, causal)
    assert all(chunk_operations(100, best * factor, key_dim, value_dim, causal) > least for factor in (0.9, 1.1))


def test_operations_by_hand() -> None:
    # L = 2, K = 3, V = 4, F = 1: inside 14 + 7, across 48 + 4 + 6 + 11, states (24 + 5) / 2; ten tokens
    assert chunk_operations(10, 2, 3, 4) == pytest.approx(10 * (2 * 21 + 69 + 14.5))


def test_bytes_by_hand() -> None:
    # L = 2, K = 3, V = 4: two kernels, five chunks of ten tokens; numbers of 2, gates of 4, states of 8 bytes
    walk = 2 * (3 + 4) * 2 + 2 * 2 * 4 + 12 * 8
    inside = 2 * (2 * 3 + 4) * 2 + 2 * 2 * 4 + 12 * 8 + 2 * 4 * 2
    assert chunk_bytes(10, 2, 3, 4, number_bytes=2, gate_bytes=4, state_bytes=8) == 5 * (walk + inside)


@pytest.mark.parametrize(("key_dim", "value_dim", "intensity"), [(256, 512, 295.0), (64, 64, 10.0)])
def test_no_other_chunk_is_faster(key_dim: int, value_dim: int, intensity: float) -> None:
    def seconds(chunk: float) -> float:
        moved = chunk_bytes(100, chunk, key_dim, value_dim)
        return chunk_operations(100, chunk, key_dim, value_dim) / intensity + moved

    best = fastest_chunk(key_dim, value_dim, intensity)
    assert all(seconds(best * factor) > seconds(best) for factor in (0.9, 1.1))
    assert fastest_chunk(key_dim, value_dim, 1e-9) == pytest.approx(fewest_operations(key_dim, value_dim))
    assert fastest_chunk(key_dim, value_dim, 4e6) == pytest.approx(2 * fastest_chunk(key_dim, value_dim, 1e6), rel=1e-3)
    with pytest.raises(ConfigurationError, match="intensity must be positive"):
        fastest_chunk(key_dim, value_dim, 0.0)


def test_states_are_stored_once_a_chunk() -> None:
    assert stored_states(100, 32, 3, 4) == 4 * 12
    assert stored_states(8192, 256, 256, 512) * 4 == stored_states(8192, 64, 256, 512)


def test_a_closed_input_gate_scales_the_sigmoid_cell_alone() -> None:
    inputs, forgets = torch.tensor([-12.0, -11.0], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)
    before, after = gate_transfer_map(inputs, forgets, exponential=False, time=32, dim=8, norm_eps=0.0)
    ratio = torch.sigmoid(inputs[1]) / torch.sigmoid(inputs[0])
    torch.testing.assert_close(before[1], before[0] * ratio)
    torch.testing.assert_close(after[1], after[0])


def test_without_an_epsilon_the_norm_hides_which_cell_it_is() -> None:
    inputs, forgets = torch.linspace(-8, 4, 3, dtype=torch.float64), torch.linspace(-2, 5, 3, dtype=torch.float64)
    maps = [gate_transfer_map(inputs, forgets, exponential=e, time=32, dim=8, norm_eps=0.0) for e in (True, False)]
    torch.testing.assert_close(maps[0][1], maps[1][1])
    assert not torch.allclose(maps[0][0], maps[1][0], rtol=0.1)


def test_refuses_sizes_that_are_not_positive() -> None:
    with pytest.raises(ConfigurationError, match="chunk must be positive, got 0"):
        chunk_operations(10, 0, 3, 4)
