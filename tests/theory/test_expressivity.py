from __future__ import annotations

from itertools import permutations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.tasks.groups import group_table
from ostinato.theory.expressivity import (
    add_modulo,
    count_modulo,
    delta_parity,
    delta_states,
    diagonal_parity,
    diagonal_states,
    follow_words,
    state_change,
)
from ostinato.theory.householder import padded, permutation_factors, product, rotation_factors
from ostinato.theory.interleaved import interleaved_delta_rule
from ostinato.theory.rotation_groups import rotation_group


def test_delta_states_are_the_affine_recurrence() -> None:
    keys = torch.nn.functional.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1)
    values, betas = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    state = torch.randn(2, 4, 5, dtype=torch.float64)
    found = delta_states(keys, values, betas, 6, state)
    for t in range(6):
        for j in range(3):
            key, value, beta = keys[:, j], values[:, j], betas[:, j, None, None]
            erased = torch.einsum("bk,bkv->bv", key, state)
            state = state + beta * key.unsqueeze(-1) * (value - erased).unsqueeze(1)
        torch.testing.assert_close(found[:, t], state)


def test_with_unit_range_a_constant_input_brings_the_state_to_rest() -> None:
    gates = torch.sigmoid(torch.randn(100, 8, dtype=torch.float64))
    trace = diagonal_states(gates, torch.randn(100, 8, dtype=torch.float64), 1024)
    assert float(state_change(trace)[:, 0].max()) > 0.1 and float(state_change(trace)[:, -1].max()) < 1e-6
    keys = torch.nn.functional.normalize(torch.randn(100, 2, 4, dtype=torch.float64), dim=-1)
    betas = torch.sigmoid(torch.randn(100, 2, dtype=torch.float64))
    for n in (1, 2):
        trace = delta_states(keys[:, :n], torch.randn(100, n, 2, dtype=torch.float64), betas[:, :n], 1024)
        assert float(state_change(trace)[:, 0].max()) > 0.1 and float(state_change(trace)[:, -1].max()) < 1e-6


@torch.no_grad()
def test_so_it_does_in_a_whole_network_of_such_layers() -> None:
    from ostinato.models.token_classifier import TokenClassifier

    # Mamba's slowest channels would need tens of thousands of steps; the theorem is the same.
    logits, _ = TokenClassifier(3, 16, "delta_net(conv=None)*3").double()(torch.full((1, 600), 2))
    change = state_change(logits)
    assert float(change[0, 0]) > 1e-3 and float(change[0, -1]) < 1e-6


def test_with_minus_one_it_does_not() -> None:
    one = torch.ones(1, 1)
    trace = diagonal_states(-one, 0 * one, 100, one)
    assert torch.equal(state_change(trace), torch.full((1, 99), 2.0))
    assert torch.equal(state_change(trace, lag=2), torch.zeros(1, 98))


def test_with_real_symmetric_range_it_alternates_at_most() -> None:
    gates = 2 * torch.sigmoid(torch.randn(50, 8, dtype=torch.float64)) - 1
    gates[:, 0] = -1
    trace = diagonal_states(gates, torch.randn(50, 8, dtype=torch.float64), 2048)
    assert float(state_change(trace)[:, -1].min()) > 1e-3
    assert float(state_change(trace, lag=2)[:, -1].max()) < 1e-6


@pytest.mark.parametrize("solve", [diagonal_parity, delta_parity])
def test_parity_by_construction(solve) -> None:
    bits = torch.randint(0, 2, (3, 700))
    assert torch.equal(solve(bits), bits.cumsum(1) % 2)


@pytest.mark.parametrize("modulus", [2, 3, 5, 12])
def test_counting_and_adding_modulo(modulus: int) -> None:
    bits, numbers = torch.randint(0, 2, (2, 300)), torch.randint(0, modulus, (2, 300))
    assert torch.equal(count_modulo(bits, modulus), bits.cumsum(1) % modulus)
    assert torch.equal(add_modulo(numbers, modulus), numbers.cumsum(1) % modulus)


@pytest.mark.parametrize("modulus", [3, 7])
def test_two_reflections_make_a_rotation_of_that_order(modulus: int) -> None:
    angle = torch.tensor(torch.pi / modulus, dtype=torch.float64)
    keys = torch.stack([torch.tensor([1.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])])
    turn = product(keys)
    assert float(torch.linalg.eigvals(turn).imag.abs().min()) > 0.1
    powers = [torch.linalg.matrix_power(turn, k) for k in range(1, modulus + 1)]
    away = [float((power - torch.eye(2).double()).abs().max()) for power in powers]
    assert away[-1] < 1e-12 and min(away[:-1]) > 0.1


@pytest.mark.parametrize("group", ["S3", "S4", "S5"])
def test_words_of_permutations(group: str) -> None:
    n = int(group[1])
    keys, betas = padded([permutation_factors(p) for p in permutations(range(n))])
    assert keys.shape[1] == n - 1
    words = torch.randint(0, len(keys), (2, 200))
    answer, right = torch.zeros(2, dtype=torch.long), []
    table = torch.tensor(group_table(group))
    for t in range(200):
        answer = table[answer, words[:, t]]
        right.append(answer)
    assert torch.equal(follow_words(keys, betas, words), torch.stack(right, 1))


@pytest.mark.parametrize("group", ["S4", "A5"])
def test_words_of_rotations_by_two_writes(group: str) -> None:
    matrices, carried = rotation_group(group)
    keys, betas = padded([rotation_factors(matrix) for matrix in matrices], 2)
    words = torch.randint(0, len(keys), (2, 300))
    place = torch.arange(carried.shape[1]).expand(2, -1)
    found = carried[follow_words(keys.float(), betas.float(), words)]
    for t in range(300):
        place = place.gather(1, carried[words[:, t]])  # (a ∘ b)(i) = a(b(i))
        assert torch.equal(found[:, t], place)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="modulus is at least 2"):
        count_modulo(torch.zeros(1, 3, dtype=torch.long), 1)
    keys, betas = padded([permutation_factors(p) for p in permutations(range(3))])
    with pytest.raises(ConfigurationError, match="every beta is 2"):
        follow_words(keys, betas / 2, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="same matrix"):
        follow_words(keys[[0, 0]], betas[[0, 0]], torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("decays", [False, True])
def test_interleaved_form_is_the_delta_rule(writes: int, decays: bool) -> None:
    from ostinato.ops.delta_rule import delta_rule

    queries, values = torch.randn(2, 70, 2, 4).double(), torch.randn(2, 70 * writes, 2, 5).double()
    keys = torch.nn.functional.normalize(torch.randn(2, 70 * writes, 2, 4).double(), dim=-1)
    betas, decay = 2 * torch.rand(2, 70 * writes, 2).double(), -torch.rand(2, 70, 2).double() if decays else None
    state = torch.randn(2, 2, 4, 5).double()
    arguments = (queries, keys, values, betas, decay, state)
    for ours, wanted in zip(interleaved_delta_rule(*arguments), delta_rule(*arguments), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-11)
