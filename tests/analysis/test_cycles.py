"""Fixed points and cycles of maps of which all are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ostinato.analysis.cycles import (
    enumerate_cycles,
    find_cycles,
    fixed_point,
    necklaces,
    regions_of_codes,
    solve_cycle,
)
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.cells.piecewise_linear import ALRNN, ShallowPLRNN

BOTH = torch.tensor([[False], [True]])


def one_unit(left: float, right: float) -> tuple[ALRNN, tuple[Tensor, ...]]:
    """z' = left·z + 1 for z ≤ 0 and right·z + 1 for z > 0."""
    values = ([left], [[right - left]], [1.0], [0.0])
    return ALRNN(1), tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def test_all_cycles_of_the_tent_map() -> None:
    """On [−1, 1] the map of slope ±2 has one cycle for each primitive necklace of two symbols."""
    cell, weights = one_unit(2.0, -2.0)
    found = enumerate_cycles(cell, weights, BOTH, 6)
    assert [sum(cycle.period == k for cycle in found) for k in range(1, 7)] == [2, 1, 2, 3, 6, 9]
    assert not any(cycle.stable or cycle.singular for cycle in found)
    for cycle in found:
        assert abs(float(cycle.eigenvalues[0].real)) == pytest.approx(2**cycle.period)
        onward = cell.advance(weights, cycle.points)
        torch.testing.assert_close(onward, cycle.points.roll(-1, 0))
    ends = sorted(float(cycle.points[0]) for cycle in found if cycle.period == 1)
    assert ends == pytest.approx([-1, 1 / 3])
    (two,) = [cycle for cycle in found if cycle.period == 2]
    assert sorted(two.points.flatten().tolist()) == pytest.approx([-0.2, 0.6])
    assert two.kind == "unstable"


def test_a_stable_cycle_and_a_virtual_fixed_point() -> None:
    cell, weights = one_unit(0.5, -3.6)
    stable = [cycle for cycle in enumerate_cycles(cell, weights, BOTH, 4) if cycle.stable]
    assert [cycle.period for cycle in stable] == [3]
    assert float(stable[0].eigenvalues[0].real) == pytest.approx(-0.9)
    # in z ≤ 0 the affine map rests at 2, which is not in z ≤ 0
    virtual = fixed_point(cell, weights, BOTH[0])
    assert not virtual.real and virtual.stable and float(virtual.points) == pytest.approx(2)
    listed = enumerate_cycles(cell, weights, BOTH, 1, virtual=True)
    assert [cycle.real for cycle in listed] == [False, True]


def test_the_search_finds_what_enumeration_finds() -> None:
    cell, weights = one_unit(2.0, -2.0)
    starts = torch.linspace(-0.97, 0.95, 30, dtype=torch.float64)[:, None]
    for period in (1, 2, 3, 4):
        wanted = [c for c in enumerate_cycles(cell, weights, BOTH, period) if c.period == period]
        found = find_cycles(cell, weights, period, starts)
        assert len(found) == len(wanted)
        smallest = [sorted(float(c.points.min()) for c in cycles) for cycles in (found, wanted)]
        assert smallest[0] == pytest.approx(smallest[1])


def test_a_known_fixed_point_of_a_shallow_model() -> None:
    """h1 is set so that a chosen point is fixed: the search must return it, with the Jacobian's eigenvalues."""
    cell = ShallowPLRNN(hidden=9)
    drawn = cell.draw(3, 0, torch.Generator().manual_seed(1))
    point = torch.tensor([0.4, -1.1, 0.7], dtype=torch.float64)
    weights = [drawn[name] for name in cell.names]
    weights[3] = point - cell.advance(tuple(weights), point)
    found = find_cycles(cell, tuple(weights), 1, torch.randn(20, 3, dtype=torch.float64))
    (here,) = [cycle for cycle in found if torch.allclose(cycle.points[0], point)]
    jacobian = cell.affine(tuple(weights), cell.regions(tuple(weights), point))[0]
    sizes = torch.linalg.eigvals(jacobian).abs().sort().values
    torch.testing.assert_close(here.eigenvalues.abs().sort().values, sizes)
    assert here.stable == bool(sizes[-1] < 1)


def test_spirals_and_saddles_are_told_apart() -> None:
    def kind(matrix: list[list[float]]) -> str:
        two = torch.zeros(2, dtype=torch.float64)
        weights = (two, torch.tensor(matrix, dtype=torch.float64), two, torch.ones(2, dtype=torch.float64))
        return fixed_point(ALRNN(0), weights, torch.ones(2, dtype=torch.bool)).kind

    assert kind([[0.5, 0.0], [0.0, 2.0]]) == "saddle"
    assert kind([[0.0, -0.5], [0.5, 0.0]]) == "stable spiral"
    assert kind([[0.0, -2.0], [2.0, 0.0]]) == "unstable spiral"


def test_a_line_of_fixed_points_is_flagged() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    weights = (zero, torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)), zero + 0.0, zero + 1)
    cycle = fixed_point(ALRNN(0), weights, torch.ones(2, dtype=torch.bool))
    assert cycle.singular and cycle.points.isfinite().all()


def test_necklaces() -> None:
    assert list(necklaces(2, 3)) == [(0, 0, 1), (0, 1, 1)]
    assert [len(list(necklaces(3, k))) for k in (1, 2, 3, 4)] == [3, 3, 8, 18]


def test_regions_of_codes() -> None:
    regions = regions_of_codes([0, 1, 2, 3], 2, 4)
    assert regions.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]]


def test_refusals() -> None:
    cell, weights = one_unit(2.0, -2.0)
    with pytest.raises(ConfigurationError, match="use find_cycles"):
        enumerate_cycles(cell, weights, BOTH, 20)
    with pytest.raises(ConfigurationError, match="at least 1"):
        find_cycles(cell, weights, 0, torch.zeros(1, 1))
    with pytest.raises(ShapeError, match=r"\(k, bits\)"):
        solve_cycle(cell, weights, BOTH[0])
