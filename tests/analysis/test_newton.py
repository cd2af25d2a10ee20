"""Error by iteration, and solves that may fail."""

from __future__ import annotations

import pytest
import torch

from ostinato.analysis.newton import CELLS, attempt, errors_by_iteration, random_problem
from ostinato.errors import ConfigurationError
from ostinato.ops.newton_scan import newton_scan


@pytest.mark.parametrize("name", CELLS)
def test_problems_are_their_seed(name: str) -> None:
    first, again, other = (random_problem(name, 5, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.weights[0], again.weights[0])
    assert not torch.equal(first.inputs, other.inputs)
    outputs, _ = newton_scan(*first)
    assert outputs.shape[:2] == (1, 5)


def test_bound_and_scale() -> None:
    bounded = random_problem("para_lstm", 4, 64, weight_scale=2.0)
    free = random_problem("para_lstm", 4, 64, weight_scale=2.0, bound=None)
    assert all(float(weight.abs().max()) == 0.5 for weight in bounded.weights)
    assert float(free.weights[0].abs().max()) > 2
    with pytest.raises(ConfigurationError, match="no cell 'lstm'"):
        random_problem("lstm", 4, 4)


def test_errors_fall_quadratically_and_end_exactly() -> None:
    problem = random_problem("para_gru", 32, 4)
    errors = errors_by_iteration(problem, range(7))
    assert errors[0] > 1e-2 and errors[3] < 1e-4 and errors[6] < 1e-14
    single = errors_by_iteration(problem, [6], dtype=torch.float32)[0]
    assert 1e-10 < single < 1e-5
    # A method that knows no Jacobian is exact after T iterations all the same.
    assert errors_by_iteration(problem, [32], method="jacobi")[0] < 1e-15


def test_an_attempt_tells_of_its_failure() -> None:
    problem = random_problem("tanh", 100, 8, weight_scale=3.0)
    failed = attempt(problem, method="jacobi", max_iterations=3)
    assert failed.iterations == 3 and not failed.converged and failed.residual > 1e-3
    found = attempt(problem, method="quasi")
    assert found.converged and found.iterations <= 100 and found.residual < 1e-10


def test_peaks_are_seen_before_they_are_clipped() -> None:
    peaks = [
        attempt(random_problem("para_gru", 512, 16, weight_scale=4.0, bound=None, seed=seed), max_iterations=20).peak
        for seed in range(8)
    ]
    assert max(peaks) > 1e9  # iterates are clipped to 1e8
