"""Hydra: its matrix is quasiseparable, is what the two scans compute, and the joins are what they say."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.mixers.centred_convolution import CentredConvolution
from ostinato.mixers.hydra import JOINS, Hydra
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.quasiseparable import Direction, quasiseparable, quasiseparable_matrix, two_scans
from ostinato.testing.whole import check_whole_mixer


def _direction(time: int, state: int) -> Direction:
    q, k = (torch.randn(2, time, 3, state, dtype=torch.float64) for _ in range(2))
    return Direction(q, k, -torch.rand(2, time, 3, dtype=torch.float64), torch.rand(2, time, 3, dtype=torch.float64))


@pytest.mark.parametrize("time", [1, 2, 17])
def test_two_scans_are_the_matrix(time: int) -> None:
    past, future = _direction(time, 4), _direction(time, 4)
    values = torch.randn(2, time, 3, 5, dtype=torch.float64)
    diagonal = torch.randn(2, time, 3, dtype=torch.float64)
    wanted = torch.einsum("bhij,bjhd->bihd", quasiseparable_matrix(past, future, diagonal), values)
    assert torch.allclose(quasiseparable(values, past, future, diagonal), wanted, atol=1e-11)


def test_entries_are_the_definition() -> None:
    past, future = _direction(6, 2), _direction(6, 2)
    diagonal = torch.randn(2, 6, 3, dtype=torch.float64)
    matrix = quasiseparable_matrix(past, future, diagonal)
    assert past.log_decay is not None and past.steps is not None
    assert future.log_decay is not None and future.steps is not None
    # Row 4, column 1: read by step 3, which lies behind row 4; written at step 1; decays of steps 2 and 3.
    low = (past.queries[0, 3, 1] @ past.keys[0, 1, 1]) * past.steps[0, 1, 1]
    assert torch.allclose(matrix[0, 1, 4, 1], low * past.log_decay[0, 2:4, 1].sum().exp())
    high = (future.queries[0, 2, 1] @ future.keys[0, 4, 1]) * future.steps[0, 4, 1]
    assert torch.allclose(matrix[0, 1, 1, 4], high * future.log_decay[0, 2:4, 1].sum().exp())
    assert torch.equal(matrix[0, 1].diagonal(), diagonal[0, :, 1])


def test_off_diagonal_blocks_have_the_rank_of_the_state_and_the_diagonal_is_free() -> None:
    torch.manual_seed(0)
    mixer = Hydra(16, heads=2, state_dim=3).double()
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    matrix = mixer.matrix(x)[0]
    for head in matrix:
        for cut in (5, 12, 19):
            assert torch.linalg.matrix_rank(head[cut:, :cut], rtol=1e-10) <= 3
            assert torch.linalg.matrix_rank(head[:cut, cut:], rtol=1e-10) <= 3
        assert torch.linalg.matrix_rank(head[4:20, 4:20], rtol=1e-10) > 6
    # Another diagonal moves nothing else.
    with torch.no_grad():
        mixer.skip.add_(1.0)
    moved = mixer.matrix(x)[0] - matrix
    assert torch.allclose(moved, torch.eye(24, dtype=torch.float64).expand_as(moved), atol=1e-12)


def test_unit_vectors_through_the_scans_give_the_matrix() -> None:
    mixer = Hydra(8, heads=2, state_dim=4).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    _, _, past, future, diagonal = mixer.parameters_of_matrix(x)
    columns = torch.eye(9, dtype=torch.float64).view(1, 9, 1, 9).expand(1, 9, 2, 9)
    found = quasiseparable(columns, past, future, diagonal).transpose(1, 2)
    assert torch.allclose(found, mixer.matrix(x), atol=1e-12)


@pytest.mark.parametrize("join", JOINS)
def test_every_join_keeps_what_it_states(join: str) -> None:
    assert check_whole_mixer(Hydra(16, heads=2, state_dim=4, join=join), length=9, compile=False).ok


@pytest.mark.parametrize("seed", [0, 10, 11])
def test_half_precision_keeps_the_gradient_of_the_diagonal(seed: int) -> None:
    # With one head the norm makes that gradient a sum that nearly cancels; rounded before the norm it is lost.
    torch.manual_seed(seed)
    report = check_whole_mixer(Hydra(16), dtypes=(torch.bfloat16,), seed=seed, compile=False)
    worst = max(row.error for row in report.rows)
    assert worst < 0.05, report.table(report.worst())


def test_learned_starts_stand_before_every_sequence() -> None:
    mixer = Hydra(16, heads=2, state_dim=4, learned_starts=True).double()
    assert mixer.starts is not None
    torch.nn.init.normal_(mixer.starts)
    assert check_whole_mixer(mixer, length=9).ok
    past = _direction(5, 4)._replace(start=torch.randn(3, 4, 2, dtype=torch.float64))
    values = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    assert past.log_decay is not None and past.steps is not None and past.start is not None
    written = values * past.steps.unsqueeze(-1)
    start = past.start.expand(2, -1, -1, -1)
    wanted, _ = linear_attention(past.queries, past.keys, written, past.log_decay, start)
    turned = Direction(past.queries.flip(1), past.keys.flip(1), past.log_decay.flip(1), past.steps.flip(1), past.start)
    forward, _ = two_scans(values, past, turned)
    _, backward = two_scans(values.flip(1), turned, turned)
    assert torch.allclose(forward, wanted, atol=1e-12) and torch.allclose(backward.flip(1), wanted, atol=1e-12)


def test_add_counts_the_diagonal_in_both_scans() -> None:
    """Add is a quasiseparable matrix too, whose diagonal is what the two scans leave there."""
    past, future = _direction(7, 2), _direction(7, 2)
    values = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    forward, backward = two_scans(values, past, future)
    assert past.steps is not None and future.steps is not None
    own = [(past.queries * past.keys).sum(-1) * past.steps, (future.queries * future.keys).sum(-1) * future.steps]
    columns = torch.eye(7, dtype=torch.float64).view(1, 7, 1, 7).expand(2, 7, 3, 7)
    matrix = sum(two_scans(columns, past, future), torch.zeros(())).transpose(1, 2)
    assert torch.allclose(matrix.diagonal(dim1=-2, dim2=-1), (own[0] + own[1]).mT)
    assert torch.allclose(torch.einsum("bhij,bjhd->bihd", matrix, values), forward + backward)
    for cut in (2, 5):
        assert torch.linalg.matrix_rank(matrix[..., cut:, :cut], rtol=1e-10).max() <= 2


def test_bad_options_are_said() -> None:
    with pytest.raises(ConfigurationError, match="join is one of"):
        Hydra(16, join="sum")
    with pytest.raises(ConfigurationError, match="groups=3"):
        Hydra(16, heads=4, groups=3)
    with pytest.raises(ConfigurationError, match="odd number of taps"):
        CentredConvolution(4, 6)


@pytest.mark.parametrize("time", [1, 2, 9])
def test_the_centred_convolution_is_torchs(time: int) -> None:
    layer = CentredConvolution(5, 7).double()
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, time, 5, dtype=torch.float64)
    weight = layer.weight.flip(0).T.unsqueeze(1)
    wanted = torch.nn.functional.conv1d(x.mT, weight, layer.bias, padding=3, groups=5).mT
    assert torch.allclose(layer(x), wanted)
    none = torch.zeros(2, time, dtype=torch.bool)
    assert torch.allclose(layer(x, none), wanted)
