"""Planar problems whose answer is a sequence of positions of the input: hulls, triangulations, tours; and sorting.

    data = convex_hulls(np.random.default_rng(0), rows=128, n=10)
    data.points                   # (128, 10, 2), uniform in the unit square
    data.targets                  # (128, steps): positions from 1 to n, then 0 for the end; −1 fills up

Labels are exact, and those of many instances are computed at once, in NumPy. Conventions (arXiv 1506.03134, section 4;
orders partly ours): a hull runs counter-clockwise from its lowest index; triangles are index triples in rising order,
ordered by their incentres; a tour starts at the first city, and of its two directions visits the lower index first.
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


def tours(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """Shortest tours through `n` uniform cities; there is no END, a tour has n stops."""
    points = rng.random((rows, n, 2))
    return Pointing(points, shortest_tours(points) + 1)


def sorting(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """`n` uniform numbers, to be pointed at from the lowest to the highest; there is no END."""
    numbers = rng.random((rows, n, 1))
    return Pointing(numbers, np.argsort(numbers[..., 0], axis=1) + 1)


def delaunay(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """Delaunay triangulations of `n` uniform points, three pointers a triangle; END after the last."""
    points = rng.random((rows, n, 2))
    answers = [[*(np.array(triangulation(each)).ravel() + 1), END] for each in points]
    targets = np.full((rows, max(map(len, answers))), FILL)
    for row, answer in zip(targets, answers, strict=True):
        row[: len(answer)] = answer
    return Pointing(points, targets)


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
    """The hulls of many sets of points at once, as targets: O(n³), but without a loop over rows.

    i → j is an edge of the counter-clockwise hull if every other point lies to its left.
    """
    rows, n, _ = points.shape
    offset = points[:, None] - points[:, :, None]  # from i to j
    left = _cross(offset[:, :, :, None], offset[:, :, None, :]) > 0
    others = np.eye(n, dtype=bool)
    left |= others[:, None, :] | others[None, :, :]
    edge = left.all(axis=3) & ~others
    after = edge.argmax(axis=2)
    start = edge.any(axis=2).argmax(axis=1)
    targets = np.full((rows, n + 1), FILL)
    here, open_ = start.copy(), np.ones(rows, dtype=bool)
    every = np.arange(rows)
    for step in range(n + 1):
        targets[open_, step] = here[open_] + 1
        if step:
            closed = open_ & (here == start)
            targets[closed, step] = END
            open_ &= ~closed
        here = after[every, here]
    return targets[:, : int((targets != FILL).any(axis=0).sum())]


def triangulation(points: Float[Array, "n 2"]) -> list[tuple[int, int, int]]:
    """The Delaunay triangles: those whose circumcircle holds no other point. O(n⁴): for small sets."""
    triples = np.array(list(combinations(range(len(points)), 3)))
    a, b, c = (points[triples[:, corner]] for corner in range(3))
    turn = np.sign(_cross(b - a, c - a))
    rows = [corner[:, None] - points[None] for corner in (a, b, c)]
    squares = [(row**2).sum(-1) for row in rows]
    inside = sum(squares[i] * _cross(rows[(i + 1) % 3], rows[(i + 2) % 3]) for i in range(3)) * turn[:, None]
    for corner in range(3):
        inside[np.arange(len(triples)), triples[:, corner]] = -1
    chosen = (inside <= 0).all(axis=1) & (turn != 0)
    sides = [np.linalg.norm(q - p, axis=1) for p, q in ((b, c), (c, a), (a, b))]
    weighted = sum(side[:, None] * corner for side, corner in zip(sides, (a, b, c), strict=True))
    incentres = (weighted / sum(sides)[:, None])[chosen]
    order = np.lexsort((incentres[:, 1], incentres[:, 0]))
    return [tuple(triple) for triple in triples[chosen][order].tolist()]


def shortest_tours(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    """Optimal tours of many instances, from city 0: Held and Karp's recursion over subsets, O(2ⁿ n²) each.

    cost(S, j) = min over k in S∖{j} of cost(S∖{j}, k) + d(k, j): the shortest way from 0 through S that ends in j.
    """
    rows, n, _ = points.shape
    require(3 <= n <= 14, f"exact tours are for 3 to 14 cities, got {n}")
    distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    free = n - 1
    cost = np.full((1 << free, free, rows), np.inf)
    parent = np.zeros((1 << free, free, rows), dtype=np.int8)
    between = np.moveaxis(distance[:, 1:, 1:], 0, -1)
    for subset in range(1, 1 << free):
        members = [j for j in range(free) if subset >> j & 1]
        for j in members:
            rest = subset & ~(1 << j)
            if not rest:
                cost[subset, j] = distance[:, 0, j + 1]
                continue
            through = cost[rest] + between[:, j]
            parent[subset, j] = through.argmin(axis=0)
            cost[subset, j] = through.min(axis=0)
    every = np.arange(rows)
    subsets = np.full(rows, (1 << free) - 1)
    last = (cost[-1] + distance[:, 0, 1:].T).argmin(axis=0)
    tour = np.zeros((rows, n), dtype=np.int64)
    for stop in range(n - 1, 0, -1):
        tour[:, stop] = last + 1
        before = parent[subsets, last, every].astype(np.int64)
        subsets, last = subsets & ~(1 << last), before
    backward = tour[:, 1] > tour[:, -1]
    tour[backward, 1:] = tour[backward, :0:-1]
    return tour


def nearest_neighbour_tours(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    """From city 0, always on to the nearest that was not visited: the baseline."""
    rows, n, _ = points.shape
    every = np.arange(rows)
    distance = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    tour = np.zeros((rows, n), dtype=np.int64)
    for stop in range(1, n):
        distance[every, :, tour[:, stop - 1]] = np.inf
        tour[:, stop] = distance[every, tour[:, stop - 1]].argmin(axis=1)
    return tour


def tour_lengths(points: Float[Array, "rows n 2"], tour: Int[Array, "rows n"]) -> Float[Array, " rows"]:
    """The lengths of closed tours."""
    visited = np.take_along_axis(points, tour[..., None], axis=1)
    return np.linalg.norm(visited - np.roll(visited, -1, axis=1), axis=-1).sum(axis=1)


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


def triangle_coverage(found: list[int], true: list[int]) -> float:
    """The share of the true triangles that were found, whatever the order of triangles and corners."""
    wanted = {frozenset(true[i : i + 3]) for i in range(0, len(true), 3)}
    given = {frozenset(found[i : i + 3]) for i in range(0, len(found), 3)}
    return len(wanted & given) / len(wanted)
