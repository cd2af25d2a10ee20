"""Tours against every permutation, and heuristics against their definitions and bounds."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.tours import (
    HEURISTICS,
    christofides_tours,
    farthest_insertion_tours,
    nearest_neighbour_tours,
    shortest_tours,
    tour_lengths,
    tours,
)


def test_tours_are_the_shortest() -> None:
    points = np.random.default_rng(0).random((5, 6, 2))
    found = shortest_tours(points)
    assert (np.sort(found, axis=1) == np.arange(6)).all() and (found[:, 0] == 0).all()
    assert (found[:, 1] < found[:, -1]).all()
    best = np.full(5, np.inf)
    for order in permutations(range(1, 6)):
        best = np.minimum(best, tour_lengths(points, np.tile([0, *order], (5, 1))))
    np.testing.assert_allclose(tour_lengths(points, found), best)
    assert (tours(np.random.default_rng(1), 4, 5).targets.min(axis=1) == 1).all()
    with pytest.raises(ConfigurationError, match="3 to 14"):
        tours(np.random.default_rng(1), 1, 15)


@pytest.mark.parametrize("name", list(HEURISTICS))
def test_heuristics_visit_every_city_once(name: str) -> None:
    points = np.random.default_rng(1).random((30, 9, 2))
    found = HEURISTICS[name](points)
    assert (np.sort(found, axis=1) == np.arange(9)).all() and (found[:, 0] == 0).all()
    ratio = tour_lengths(points, found) / tour_lengths(points, shortest_tours(points))
    assert ratio.min() >= 1 - 1e-12 and ratio.max() < (1.5 if name == "Christofides" else 2)
    # None of the three is blind: a random tour is about 1.8 times the optimum here.
    assert ratio.mean() < 1.15


def test_heuristics_by_hand() -> None:
    line = np.array([[[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]])
    assert nearest_neighbour_tours(line).tolist() == [[0, 2, 1]]
    # Insertion: the far corner first, then each other where it costs least; a square is found whatever the order.
    square = np.array([[[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    for heuristic in (farthest_insertion_tours, christofides_tours):
        assert tour_lengths(square, heuristic(square))[0] == pytest.approx(4)


def test_christofides_by_an_independent_matching() -> None:
    """The tree and the matching, both by trying everything, bound the tour from above."""
    points = np.random.default_rng(3).random((1, 5, 2))
    distance = np.linalg.norm(points[0, :, None] - points[0], axis=-1)
    edges = [(i, j) for i in range(5) for j in range(i)]
    best = np.inf
    for chosen in range(1 << len(edges)):
        tree = [edge for place, edge in enumerate(edges) if chosen >> place & 1]
        if len(tree) != 4:
            continue
        group = list(range(5))
        for i, j in tree:
            group = [group[i] if each == group[j] else each for each in group]
        cost = sum(distance[edge] for edge in tree)
        if len(set(group)) == 1 and cost < best:
            best, degrees = cost, np.bincount(np.ravel(tree), minlength=5)
    odd = np.flatnonzero(degrees % 2).tolist()
    matching = min(sum(distance[p[i], p[i + 1]] for i in range(0, len(p), 2)) for p in permutations(odd))
    assert tour_lengths(points, christofides_tours(points))[0] <= best + matching + 1e-12
