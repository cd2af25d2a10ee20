"""Hulls, triangulations and tours against slower or independent ways to find them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.geometry import (
    END,
    answer,
    area,
    area_coverage,
    convex_hull,
    convex_hulls,
    delaunay,
    is_simple,
    nearest_neighbour_tours,
    same_polygon,
    shortest_tours,
    sorting,
    tour_lengths,
    tours,
    triangle_coverage,
    triangulation,
)

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.4, 0.5]])


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_hulls_by_edges_and_by_the_chain_agree(n: int) -> None:
    data = convex_hulls(np.random.default_rng(n), 30, n)
    for points, row in zip(data.points, data.targets, strict=True):
        hull = answer(row)
        assert hull == convex_hull(points) and row[len(hull)] == END and hull[0] == min(hull)
        corners, after = points[hull], np.roll(points[hull], -1, axis=0)
        for i in range(n):
            offset = points[i] - corners
            assert ((after - corners)[:, 0] * offset[:, 1] - (after - corners)[:, 1] * offset[:, 0] > -1e-12).all()


def test_hull_of_a_square() -> None:
    assert convex_hull(SQUARE) == [0, 1, 2, 3]
    with pytest.raises(ConfigurationError):
        convex_hulls(np.random.default_rng(0), 1, 2)


def test_tours_are_the_shortest() -> None:
    points = np.random.default_rng(0).random((5, 6, 2))
    found = shortest_tours(points)
    assert (np.sort(found, axis=1) == np.arange(6)).all() and (found[:, 0] == 0).all()
    assert (found[:, 1] < found[:, -1]).all()
    best = np.full(5, np.inf)
    for order in permutations(range(1, 6)):
        best = np.minimum(best, tour_lengths(points, np.tile([0, *order], (5, 1))))
    np.testing.assert_allclose(tour_lengths(points, found), best)
    nearest = nearest_neighbour_tours(points)
    assert (np.sort(nearest, axis=1) == np.arange(6)).all()
    assert (tour_lengths(points, nearest) >= best - 1e-12).all()
    line = np.array([[[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]])
    assert nearest_neighbour_tours(line).tolist() == [[0, 2, 1]]
    assert (tours(np.random.default_rng(1), 4, 5).targets.min(axis=1) == 1).all()


def test_triangulation() -> None:
    spatial = pytest.importorskip("scipy.spatial")
    data = delaunay(np.random.default_rng(2), 6, 9)
    for points, row in zip(data.points, data.targets, strict=True):
        expected = {frozenset(t) for t in spatial.Delaunay(points).simplices.tolist()}
        found = triangulation(points)
        assert {frozenset(t) for t in found} == expected and len(found) == len(expected)
        flat = answer(row)
        assert flat == [corner for triangle in found for corner in triangle]
        assert triangle_coverage(flat, flat) == 1
        assert triangle_coverage(flat[:3], flat) == pytest.approx(1 / len(found))


def test_sorting() -> None:
    data = sorting(np.random.default_rng(0), 3, 6)
    numbers = np.take_along_axis(data.points[..., 0], data.targets - 1, axis=1)
    assert (np.diff(numbers, axis=1) > 0).all()


def test_polygons() -> None:
    assert same_polygon([2, 3, 0, 1], [0, 1, 2, 3])
    assert not same_polygon([3, 2, 1, 0], [0, 1, 2, 3]) and not same_polygon([], [1])
    assert is_simple(SQUARE) and is_simple(SQUARE[:4]) and not is_simple(SQUARE[[0, 2, 1, 3]])
    assert not is_simple(SQUARE[:2]) and not is_simple(SQUARE[[0, 1, 2, 1]])
    assert area(SQUARE[:4]) == pytest.approx(1)
    hull = [0, 1, 2, 3]
    assert area_coverage(SQUARE, [0, 1, 2], hull) == pytest.approx(0.5)
    assert area_coverage(SQUARE, [0, 1, 2, 3, 4], hull) == pytest.approx(0.8)
    assert area_coverage(SQUARE, [0, 2, 1, 3], hull) is None and area_coverage(SQUARE, [], hull) is None
