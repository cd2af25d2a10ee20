"""Hulls and triangulations against slower or independent ways to find them."""

from __future__ import annotations

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
    delaunay_targets,
    is_simple,
    neighbour_triangles,
    same_polygon,
    sorting,
    triangle_coverage,
    triangles,
)

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.4, 0.5]])


@pytest.mark.parametrize("n", [3, 5, 10, 60])
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


def test_triangulation() -> None:
    spatial = pytest.importorskip("scipy.spatial")
    data = delaunay(np.random.default_rng(2), 6, 9)
    for points, row in zip(data.points, data.targets, strict=True):
        expected = {frozenset(t) for t in spatial.Delaunay(points).simplices.tolist()}
        flat = answer(row)
        assert triangles(flat) == expected and len(flat) == 3 * len(expected) and row[len(flat)] == END
        found = np.array(flat).reshape(-1, 3)
        assert (np.diff(found, axis=1) > 0).all()
        corners = points[found]
        sides = np.linalg.norm(corners[:, [1, 2, 0]] - corners[:, [2, 0, 1]], axis=-1)  # each opposite its corner
        incentres = (sides[..., None] * corners).sum(1) / sides.sum(1, keepdims=True)
        assert (np.diff(incentres[:, 0]) > 0).all()
        assert triangle_coverage(flat, flat) == 1
        assert triangle_coverage(flat[:3], flat) == pytest.approx(1 / len(expected))
    alone = delaunay_targets(data.points[:1])[0]
    assert alone.tolist() == data.targets[0, : len(alone)].tolist()


def test_triangles_of_neighbours() -> None:
    points = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.2], [5.0, 5.0]])
    assert triangles(neighbour_triangles(points)) == {frozenset({0, 1, 2}), frozenset({1, 2, 3})}


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
