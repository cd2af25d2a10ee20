"""Symbolic dynamics of a piecewise-linear orbit: one symbol a region, and the graph of what follows what.

codes = encode(model.regions(orbit)[run], switching=2)
code = transition_graph(codes)
code.symbols, code.occupancy, code.edges, topological_entropy(code.edges)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.errors import DataError

Array = np.ndarray


def encode(regions: Bool[Tensor, "time bits"], switching: int | None = None) -> Int[Array, " time"]:
    """The symbol of each step, s = Σ_p b_p 2^p over the last `switching` bits.

    With `switching` None, or more bits than an integer holds, symbols number the regions in the order of first
    visit.
    """
    bits = regions.cpu().numpy()
    if switching is not None and switching <= 62:
        chosen = bits[:, bits.shape[1] - switching :].astype(np.int64)
        return chosen @ (1 << np.arange(switching, dtype=np.int64))
    _, first, inverse = np.unique(np.packbits(bits, axis=1), axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


@dataclass(frozen=True)
class TransitionGraph:
    """Nodes are the symbols that are visited often enough, by falling occupancy."""

    symbols: Int[Array, " nodes"]
    occupancy: Float[Array, " nodes"]
    """Share of the time in each."""
    edges: Int[Array, "nodes nodes"]
    """The topological graph: 1 where the row's symbol is ever followed by the column's."""
    weights: Float[Array, "nodes nodes"]
    """The geometric graph: the share of all transitions."""
    length: int
    least: float
    """The occupancy below which a symbol was left out."""

    def __str__(self) -> str:
        arrows = [
            f"{self.symbols[i]}→{self.symbols[j]} {self.weights[i, j]:.3f}"
            for i, j in zip(*np.nonzero(self.edges), strict=True)
        ]
        return f"{', '.join(arrows)} (T {self.length}, occupancy ≥ {self.least:g})"


def transition_graph(codes: Int[Array, " time"], *, least: float = 1e-4) -> TransitionGraph:
    """The graph of a symbol string; symbols rarer than `least` are left out, with the transitions through them.

    Raises:
        DataError: an empty string.

    Source: AL-RNN (arXiv 2410.14240), section 4.
    """
    codes = np.asarray(codes)
    if not len(codes):
        raise DataError("a transition graph needs a symbol string, got an empty one; drop less of the transient")
    symbols, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    symbols, share = symbols[order], counts[order] / len(codes)
    symbols, share = symbols[share >= least], share[share >= least]
    place = {int(symbol): i for i, symbol in enumerate(symbols)}
    index = np.array([place.get(int(code), -1) for code in np.unique(codes)])[np.searchsorted(np.unique(codes), codes)]
    before, after = index[:-1], index[1:]
    both = (before >= 0) & (after >= 0)
    counted = np.zeros((len(symbols), len(symbols)))
    np.add.at(counted, (before[both], after[both]), 1)
    return TransitionGraph(
        symbols, share, (counted > 0).astype(np.int64), counted / max(1.0, counted.sum()), len(codes), least
    )


def topological_entropy(edges: Int[Array, "nodes nodes"]) -> float:
    """log of the spectral radius of a 0/1 transition matrix, in nats a step; −∞ for a graph without cycles.

    log 2 for the full shift on two symbols, log((1 + √5)/2) for the golden-mean shift. Exact for the shift that the
    graph defines, which may hold more strings than the orbit: an upper bound there.
    """
    if not edges.size:
        return -math.inf
    radius = float(np.abs(np.linalg.eigvals(edges.astype(np.float64))).max())
    return math.log(radius) if radius > 1e-9 else -math.inf


def string_period(codes: Int[Array, " time"], longest: int = 1000, *, transient: int = 0) -> int | None:
    """The period of a string that is periodic after the transient, and None for one that is not within `longest`.

    A fixed point's string has period 1, a k-cycle's a period that divides k, an aperiodic orbit's none.
    """
    tail = np.asarray(codes)[transient:]
    for period in range(1, min(longest, len(tail) // 2) + 1):
        if (tail[period:] == tail[:-period]).all():
            return period
    return None


def occupancy_curve(codes: Int[Array, " time"], regions: int) -> Float[Array, " regions"]:
    """Cumulative share of time in the most visited 1, 2, … of `regions` regions."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    share = np.zeros(max(regions, len(counts)))
    share[: len(counts)] = np.sort(counts)[::-1] / len(codes)
    return np.cumsum(share)


def occupancy_distance(one: Int[Array, " time"], other: Int[Array, " time"]) -> float:
    """The Kolmogorov–Smirnov statistic of two runs' occupancies, sorted: max of the curves' difference.

    Source: AL-RNN (arXiv 2410.14240), robustness across runs.
    """
    regions = max(len(np.unique(one)), len(np.unique(other)))
    return float(np.abs(occupancy_curve(one, regions) - occupancy_curve(other, regions)).max())
