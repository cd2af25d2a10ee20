"""The travelling salesman's tours through cities in the plane: the shortest ones, and what heuristics find.

    data = tours(np.random.default_rng(0), rows=128, n=8)
    data.points                   # (128, 8, 2), uniform in the unit square
    data.targets                  # (128, 8): positions from 1 to 8, of an optimal tour

A tour starts at the first city. An optimal one visits, of the two neighbours of that city, the lower index first, so
that each instance has one right answer (arXiv 1506.03134, section 4.4; the direction is our convention). The
heuristics stand in for the paper's A1, A2 (O(n²)) and A3 (Christofides, O(n³), at most 1.5 times the optimum).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, Int

from ostinato.tasks.base import require
from ostinato.tasks.geometry import Pointing

Array = np.ndarray


def tours(rng: np.random.Generator, rows: int, n: int) -> Pointing:
    """Shortest tours through `n` uniform cities; there is no END, a tour has n stops."""
    points = rng.random((rows, n, 2))
    return Pointing(points, shortest_tours(points) + 1)


def distances(points: Float[Array, "rows n 2"]) -> Float[Array, "rows n n"]:
    """Between all cities of each row."""
    return np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)


def shortest_tours(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    """Optimal tours of many instances, from city 0: Held and Karp's recursion over subsets, O(2ⁿ n²) each.

    cost(S, j) = min over k in S∖{j} of cost(S∖{j}, k) + d(k, j): the shortest way from 0 through S that ends in j.
    """
    n = points.shape[1]
    require(3 <= n <= 14, f"exact tours are for 3 to 14 cities, got {n}")
    pieces = [_shortest_piece(points[i : i + 4096]) for i in range(0, len(points), 4096)]
    return np.concatenate(pieces)


def _shortest_piece(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    rows, n, _ = points.shape
    distance = distances(points)
    free = n - 1
    cost = np.full((1 << free, free, rows), np.inf)
    parent = np.zeros((1 << free, free, rows), dtype=np.int8)
    between = np.ascontiguousarray(np.moveaxis(distance[:, 1:, 1:], 0, -1))
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
    """From city 0, always on to the nearest that was not visited: O(n²)."""
    rows, n, _ = points.shape
    every = np.arange(rows)
    distance = distances(points)
    tour = np.zeros((rows, n), dtype=np.int64)
    for stop in range(1, n):
        distance[every, :, tour[:, stop - 1]] = np.inf
        tour[:, stop] = distance[every, tour[:, stop - 1]].argmin(axis=1)
    return tour


def farthest_insertion_tours(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    """From city 0 alone, the city farthest from the tour is put in where it costs least: O(n²).

    Rosenkrantz, Stearns and Lewis 1977: k between i and its successor s costs d(i, k) + d(k, s) − d(i, s).
    """
    rows, n, _ = points.shape
    every = np.arange(rows)
    distance = distances(points)
    after = np.zeros((rows, n), dtype=np.int64)
    away = distance[:, 0].copy()  # from the tour; −1 for what is on it
    away[:, 0] = -1
    for _ in range(n - 1):
        city = away.argmax(axis=1)
        to_city = distance[every, city]
        cost = to_city + np.take_along_axis(to_city, after, 1)
        cost -= np.take_along_axis(distance, after[..., None], 2)[..., 0]
        place = np.where(away < 0, cost, np.inf).argmin(axis=1)
        after[every, city] = after[every, place]
        after[every, place] = city
        away = np.minimum(away, to_city)
        away[every, city] = -1
    tour = np.zeros((rows, n), dtype=np.int64)
    for stop in range(1, n):
        tour[:, stop] = after[every, tour[:, stop - 1]]
    return tour


def christofides_tours(points: Float[Array, "rows n 2"]) -> Int[Array, "rows n"]:
    """A minimum spanning tree, its odd nodes matched at least cost, an Euler tour with repetitions left out.

    Christofides 1976: at most 1.5 times the optimum. The matching is exact, by recursion over subsets: for tens of
    cities. One row after the other.
    """
    return np.array([_christofides(each) for each in distances(points)]).reshape(points.shape[:2])


def _christofides(distance: Float[Array, "n n"]) -> list[int]:
    n = len(distance)
    links: list[list[int]] = [[] for _ in range(n)]

    def link(i: int, j: int) -> None:
        links[i].append(j)
        links[j].append(i)

    # Prim's tree: `near` is the distance of a city from the tree, `by` where from.
    near, by, outside = distance[0].copy(), np.zeros(n, dtype=int), np.arange(n) > 0
    for _ in range(n - 1):
        city = int(np.where(outside, near, np.inf).argmin())
        link(city, int(by[city]))
        outside[city] = False
        closer = distance[city] < near
        near[closer], by[closer] = distance[city][closer], city
    odd = [city for city in range(n) if len(links[city]) % 2]
    lengths = distance[np.ix_(odd, odd)].tolist()

    @cache
    def match(left: int) -> tuple[float, int]:
        """The least cost of matching the nodes in the bits of `left`, and the partner of the lowest."""
        if not left:
            return 0.0, 0
        first = (left & -left).bit_length() - 1
        rest = left & (left - 1)
        partners = [j for j in range(len(odd)) if rest >> j & 1]
        return min((lengths[first][j] + match(rest & ~(1 << j))[0], j) for j in partners)

    left = (1 << len(odd)) - 1
    while left:
        first, partner = (left & -left).bit_length() - 1, match(left)[1]
        link(odd[first], odd[partner])
        left &= ~(1 << first) & ~(1 << partner)
    # Hierholzer: go on until stuck, and note a city when leaving it for good.
    stack, circuit = [0], []
    while stack:
        here = stack[-1]
        if links[here]:
            onward = links[here].pop()
            links[onward].remove(here)
            stack.append(onward)
        else:
            circuit.append(stack.pop())
    return list(dict.fromkeys(circuit))


def tour_lengths(points: Float[Array, "rows n 2"], tour: Int[Array, "rows n"]) -> Float[Array, " rows"]:
    """The lengths of closed tours."""
    visited = np.take_along_axis(points, tour[..., None], axis=1)
    return np.linalg.norm(visited - np.roll(visited, -1, axis=1), axis=-1).sum(axis=1)


HEURISTICS = {
    "nearest neighbour": nearest_neighbour_tours,
    "farthest insertion": farthest_insertion_tours,
    "Christofides": christofides_tours,
}
