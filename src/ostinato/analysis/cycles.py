"""Fixed points and cycles of piecewise-linear maps: solved for, not iterated to.

In a sequence of regions the k-fold map is affine, z ↦ P z + q, and has one fixed point, (I − P)⁻¹ q. It is a *real*
cycle if the map, started there, visits just those regions, and a *virtual* one if not: no orbit stays on it, yet
orbits feel it. Stability is that of the eigenvalues of P.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.cells.piecewise_linear import PiecewiseLinear
from ostinato.ops.cells.protocol import Weights


@dataclass(frozen=True)
class Cycle:
    """A k-cycle (a fixed point for k = 1) of a piecewise-linear map."""

    points: Float[Tensor, "k latent"]
    regions: Bool[Tensor, "k bits"]
    """The regions that were assumed; those of the points if the cycle is real."""
    real: bool
    eigenvalues: Complex[Tensor, " latent"]
    """Of the product of Jacobians around the cycle."""
    singular: bool
    """I − P has (nearly) an eigenvalue of zero: the point is one of many, found by least squares."""

    @property
    def period(self) -> int:
        """k."""
        return len(self.points)

    @property
    def stable(self) -> bool:
        """All eigenvalues are inside the unit circle."""
        return bool((self.eigenvalues.abs() < 1).all())

    @property
    def kind(self) -> str:
        """ "stable", "saddle" or "unstable", and "spiral" if some eigenvalue is complex."""
        size = self.eigenvalues.abs()
        name = "stable" if (size < 1).all() else "unstable" if (size > 1).all() else "saddle"
        return f"{name} spiral" if (self.eigenvalues.imag.abs() > 1e-9).any() else name


def _visit(cell: PiecewiseLinear, weights: Weights, start: Tensor, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """`period` true steps: the points, their regions, and where the last step ends."""
    points, regions, state = [], [], start
    for _ in range(period):
        points.append(state)
        regions.append(cell.regions(weights, state))
        state = cell.advance(weights, state)
    return torch.stack(points), torch.stack(regions), state


def solve_cycle(
    cell: PiecewiseLinear, weights: Weights, regions: Bool[Tensor, "k bits"], *, tolerance: float = 1e-7
) -> Cycle:
    """The cycle of one sequence of regions, real or virtual, in float64.

    The points of a virtual cycle are those of the assumed affine maps, not of the true one.

    Args:
        cell: the map.
        weights: of one model, without the axis of runs (`DynamicsModel.weights_of`).
        regions: in the order visited.
        tolerance: how near to zero a singular value of I − P counts as zero.

    Raises:
        ShapeError: regions are not (k, bits).

    Source: SCYFI (arXiv 2310.20400); AL-RNN (arXiv 2410.14240), section 4.
    """
    if regions.ndim != 2 or not len(regions):
        raise ShapeError(f"regions must be (k, bits) with k ≥ 1, got {tuple(regions.shape)}")
    weights = tuple(weight.double() for weight in weights)
    jacobians, offsets = cell.affine(weights, regions)
    latent = offsets.shape[-1]
    product, offset = torch.eye(latent, dtype=torch.float64), torch.zeros(latent, dtype=torch.float64)
    for jacobian, shift in zip(jacobians, offsets, strict=True):
        product, offset = jacobian @ product, jacobian @ offset + shift
    matrix = torch.eye(latent, dtype=torch.float64) - product
    smallest = torch.linalg.svdvals(matrix)[-1]
    singular = not bool(smallest > tolerance)
    start = torch.linalg.pinv(matrix) @ offset if singular else torch.linalg.solve(matrix, offset)
    points = [start]
    for jacobian, shift in zip(jacobians[:-1], offsets[:-1], strict=True):
        points.append(jacobian @ points[-1] + shift)
    _, visited, _ = _visit(cell, weights, start, len(regions))
    real = bool((visited == regions).all())
    return Cycle(torch.stack(points), regions, real, torch.linalg.eigvals(product), singular)


def fixed_point(cell: PiecewiseLinear, weights: Weights, region: Bool[Tensor, " bits"]) -> Cycle:
    """z* = (I − J_Ω)⁻¹ c_Ω of a region Ω, real or virtual."""
    return solve_cycle(cell, weights, region.unsqueeze(0))


def necklaces(symbols: int, length: int) -> Iterator[tuple[int, ...]]:
    """Sequences of `length` symbols up to rotation, without those that repeat a shorter one."""
    for word in itertools.product(range(symbols), repeat=length):
        turned = [word[i:] + word[:i] for i in range(1, length)]
        if all(word < other for other in turned):
            yield word


def enumerate_cycles(
    cell: PiecewiseLinear,
    weights: Weights,
    regions: Bool[Tensor, "alphabet bits"],
    longest: int,
    *,
    virtual: bool = False,
    at_most: int = 100_000,
) -> list[Cycle]:
    """Every cycle of period 1 … `longest` through the given regions, by trying all sequences of them.

    Raises:
        ConfigurationError: more than `at_most` sequences; `find_cycles` searches instead.
    """
    total = sum(len(regions) ** k for k in range(1, longest + 1))
    if total > at_most:
        raise ConfigurationError(
            f"{len(regions)} regions make {total} sequences of up to {longest}: more than {at_most}; use find_cycles"
        )
    found = []
    for period in range(1, longest + 1):
        for word in necklaces(len(regions), period):
            cycle = solve_cycle(cell, weights, regions[list(word)])
            if virtual or (cycle.real and not cycle.singular):
                found.append(cycle)
    return found


def find_cycles(
    cell: PiecewiseLinear,
    weights: Weights,
    period: int,
    starts: Float[Tensor, "attempts latent"],
    *,
    refinements: int = 50,
    seed: int = 0,
) -> list[Cycle]:
    """Real cycles of one period, by the SCYFI heuristic: guess regions, solve, read the regions visited, again.

    Every start gives the first guess, the regions that its orbit visits. Where a guess comes back, a random one
    among the regions seen so far takes its place. A cycle of a shorter period that divides this one is left out.
    Finds, but cannot prove that there are no more.

    Raises:
        ConfigurationError: a period below 1.

    Source: SCYFI (arXiv 2310.20400); card of GTF (arXiv 2306.04406).
    """
    if period < 1:
        raise ConfigurationError(f"a cycle has a period of at least 1, got {period}")
    generator = torch.Generator().manual_seed(seed)
    weights = tuple(weight.double() for weight in weights)
    seen: list[Tensor] = []
    found: list[Cycle] = []
    for start in starts.double():
        guess = _visit(cell, weights, start, period)[1]
        tried: set[bytes] = set()
        for _ in range(refinements):
            key = guess.numpy().tobytes()
            if key in tried:
                guess = torch.stack([seen[i] for i in torch.randint(len(seen), (period,), generator=generator)])
                key = guess.numpy().tobytes()
                if key in tried:
                    break
            tried.add(key)
            seen.extend(guess)
            cycle = solve_cycle(cell, weights, guess)
            if not cycle.points.isfinite().all():
                break
            if cycle.real:
                if not cycle.singular and _primitive(cycle) and not any(_same(cycle, other) for other in found):
                    found.append(cycle)
                break
            guess = _visit(cell, weights, cycle.points[0], period)[1]
    return found


def _primitive(cycle: Cycle) -> bool:
    points = cycle.points
    return not any(torch.allclose(points[0], points[k], atol=1e-8) for k in range(1, len(points)))


def _same(one: Cycle, other: Cycle) -> bool:
    return any(torch.allclose(one.points[0], point, atol=1e-6, rtol=1e-6) for point in other.points)


def regions_of_codes(codes: Sequence[int], switching: int, latent: int) -> Bool[Tensor, "alphabet bits"]:
    """Regions of an AL-RNN from its symbols: the last `switching` bits are those of the symbol, the rest are set."""
    regions = torch.ones(len(codes), latent, dtype=torch.bool)
    for row, code in enumerate(codes):
        for bit in range(switching):
            regions[row, latent - switching + bit] = bool(code >> bit & 1)
    return regions
