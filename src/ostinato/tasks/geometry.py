"""Planar problems whose answer is a sequence of positions of the input: hulls and triangulations; and sorting.

    data = convex_hulls(np.random.default_rng(0), rows=128, n=10)
    data.points                   # (128, 10, 2), uniform in the unit square
    data.targets                  # (128, steps): positions from 1 to n, then 0 for the end; −1 fills up

Labels are exact, and those of many instances are computed at once, in NumPy. Conventions (arXiv 1506.03134, section 4;
orders partly ours): a hull runs counter-clockwise from its lowest index; triangles are index triples in rising order,
ordered by their incentres. Tours are in `tasks/tours.py`.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ostinato.tasks.base import require

Array = np.ndarray
END, FILL = 0, -1


class Pointing(NamedTuple):
    """Inputs, and the positions that are to be pointed at, counted from 1; `END` ends an answer, `FILL` is ignored."""

    points: Float[Array, "rows n dimensions"]
    targets: Int[Array, "rows steps"]


def convex_hulls(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """Convex hulls of `n` uniform points; END after the last vertex."""
    require(n >= 3, f"a hull needs at least 3 points, got {n}")
    points = rng.random((rows, n, 2))
    return Pointing(points, hull_targets(points))


def sorting(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """`n` uniform numbers, to be pointed at from the lowest to the highest; there is no END."""
    numbers = rng.random((rows, n, 1))
    return Pointing(numbers, np.argsort(numbers[..., 0], axis=1) + 1)


def delaunay(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """Delaunay triangulations of `n` uniform points, three pointers a triangle; END after the last."""
    require(n >= 3, f"a triangulation needs at least 3 points, got {n}")
    points = rng.random((rows, n, 2))
    return Pointing(points, delaunay_targets(points))


def _cross(first: Array, second: Array) -> Array:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def convex_hull(points: Float[Array, "n 2"]) -> list[int]:
    """Indices of the hull, counter-clockwise from the lowest: the monotone chain, O(n log n) (Andrew 1979)."""
    order = np.lexsort((points[:, 1], points[:, 0])).tolist()

    def chain(indices: list[int]) -> list[int]:
        kept: list[int] = []
        for index in indices:
            while len(kept) > 1 and _cross(points[kept[-1]] - points[kept[-2]], points[index] - points[kept[-2]]) <= 0:
                kept.pop()
            kept.append(index)
        return kept[:-1]

    return canonical_cycle(chain(order) + chain(order[::-1]))


def hull_targets(points: Float[Array, "rows n 2"]) -> Int[Array, "rows steps"]:
    """The hulls of many sets of points at once, as targets: Jarvis's march, O(n) a vertex, without a loop over rows.

    From the lowest point to the right at first, then always on to the point for which the way turns left the least.
    For points in general position: no three on one line.
    """
    rows, n, _ = points.shape
    every = np.arange(rows)
    start = points[..., 1].argmin(axis=1)
    here, heading = start.copy(), np.zeros(rows)
    marched = []
    open_ = np.ones(rows, dtype=bool)
    while open_.any():
        marched.append(np.where(open_, here, n))
        offset = points - points[every, here][:, None]
        angles = np.arctan2(offset[..., 1], offset[..., 0])
        turns = (angles - heading[:, None]) % (2 * np.pi)
        turns[every, here] = np.inf
        here = turns.argmin(axis=1)
        heading = angles[every, here]
        open_ &= here != start
    hulls = np.stack(marched, axis=1)  # counter-clockwise, filled up with n
    counts = (hulls < n).sum(axis=1)
    steps = np.arange(hulls.shape[1] + 1)
    turned = (steps + hulls.argmin(axis=1)[:, None]) % counts[:, None]
    targets = np.take_along_axis(hulls, turned, axis=1) + 1
    targets[steps > counts[:, None]] = FILL
    targets[every, counts] = END
    return targets


def delaunay_targets(points: Float[Array, "rows n 2"]) -> Int[Array, "rows steps"]:
    """The Delaunay triangulations of many sets of points at once, as targets: O(n⁴) each, for small sets.

    A triangle is one of Delaunay's if its circumcircle holds no other point: with a, b, c counter-clockwise and
    relative to p, p is inside if |a|² b×c + |b|² c×a + |c|² a×b > 0.
    """
    size = max(1, 2_000_000 // points.shape[1] ** 4)  # so that a piece stays near the processor
    pieces = [_delaunay_piece(points[i : i + size]) for i in range(0, len(points), size)]
    steps = max(piece.shape[1] for piece in pieces)
    return np.concatenate([np.pad(p, ((0, 0), (0, steps - p.shape[1])), constant_values=FILL) for p in pieces])


def _delaunay_piece(points: Float[Array, "rows n 2"]) -> Int[Array, "rows steps"]:
    rows, n, _ = points.shape
    triples = np.array(list(combinations(range(n), 3)))
    a, b, c = (points[:, triples[:, corner]] for corner in range(3))
    turn = np.sign(_cross(b - a, c - a))
    offsets = [corner[:, :, None] - points[:, None] for corner in (a, b, c)]
    squares = [(offset**2).sum(-1) for offset in offsets]
    inside = sum(squares[i] * _cross(offsets[(i + 1) % 3], offsets[(i + 2) % 3]) for i in range(3)) * turn[..., None]
    np.put_along_axis(inside, np.broadcast_to(triples, (rows, *triples.shape)), -1.0, axis=2)
    chosen = (inside <= 0).all(axis=2) & (turn != 0)
    sides = [np.linalg.norm(q - p, axis=-1) for p, q in ((b, c), (c, a), (a, b))]
    weighted = sum(side[..., None] * corner for side, corner in zip(sides, (a, b, c), strict=True))
    incentres = weighted / sum(sides)[..., None]
    incentres[~chosen] = np.inf
    most, counts = int(chosen.sum(axis=1).max()), chosen.sum(axis=1)
    order = np.lexsort((incentres[..., 1], incentres[..., 0]), axis=1)[:, :most]
    targets = np.full((rows, 3 * most + 1), FILL)
    targets[:, : 3 * most] = triples[order].reshape(rows, -1) + 1
    steps = np.arange(3 * most + 1)
    targets[steps > 3 * counts[:, None]] = FILL
    targets[np.arange(rows), 3 * counts] = END
    return targets


def neighbour_triangles(points: Float[Array, "n 2"]) -> list[int]:
    """Each point with its two nearest, without repetition, laid out as an answer: the baseline for triangulations."""
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    triangles = {tuple(sorted(row)) for row in np.argsort(distance, axis=1)[:, :3].tolist()}
    return [corner for triangle in sorted(triangles) for corner in triangle]


def answer(targets: Int[Array, " steps"]) -> list[int]:
    """One row of targets as indices from 0, up to END."""
    indices = []
    for target in targets.tolist():
        if target in (END, FILL):
            break
        indices.append(target - 1)
    return indices


def canonical_cycle(cycle: list[int]) -> list[int]:
    """The same cycle, begun at its lowest index; the direction is kept."""
    if not cycle:
        return []
    start = cycle.index(min(cycle))
    return cycle[start:] + cycle[:start]


def same_polygon(first: list[int], second: list[int]) -> bool:
    """Whether two cycles of vertices are equal up to where they begin."""
    return canonical_cycle(first) == canonical_cycle(second)


def is_simple(polygon: Float[Array, "corners 2"]) -> bool:
    """Whether a polygon has at least three corners and no two of its edges meet, but neighbours at their corner."""
    corners = len(polygon)
    if corners < 3 or len(np.unique(polygon, axis=0)) < corners:
        return False
    ends = np.roll(polygon, -1, axis=0)

    def side(points: Array) -> Bool[Array, "edges points"]:
        return _cross((ends - polygon)[:, None], points[None] - polygon[:, None]) > 0

    apart = side(polygon) != side(ends)
    crossing = apart & apart.T
    i, j = np.indices((corners, corners))
    neighbours = ((i - j) % corners <= 1) | ((j - i) % corners <= 1)
    return not bool((crossing & ~neighbours).any())


def area(polygon: Float[Array, "corners 2"]) -> float:
    """The area inside a simple polygon: ½ |Σ x_i y_{i+1} − x_{i+1} y_i|."""
    return float(abs(_cross(polygon, np.roll(polygon, -1, axis=0)).sum()) / 2)


def area_coverage(points: Float[Array, "n 2"], found: list[int], hull: list[int]) -> float | None:
    """The area of (polygon found ∩ hull) / area of the hull; None if what was found is not a simple polygon.

    A polygon on points of the set lies in their hull, which is convex: the intersection is the polygon itself.
    """
    polygon = points[found] if found else np.zeros((0, 2))
    return area(polygon) / area(points[hull]) if is_simple(polygon) else None


def triangles(answered: list[int]) -> set[frozenset[int]]:
    """The triangles of an answer, whatever the order of triangles and corners; an unfinished last one counts too."""
    return {frozenset(answered[i : i + 3]) for i in range(0, len(answered), 3)}


def triangle_coverage(found: list[int], true: list[int]) -> float:
    """The share of the true triangles that were found."""
    wanted = triangles(true)
    return len(wanted & triangles(found)) / len(wanted)
