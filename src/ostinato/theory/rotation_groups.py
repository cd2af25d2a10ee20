"""The rotations of the solids as groups: S4 is the cube's, A5 the icosahedron's, both inside SO(3).

So each of their elements is two reflections of a space of three dimensions (`theory.householder`), where the
permutations themselves need n − 1 = 3 or 4 of n: a DeltaProduct layer with two writes a step can follow S4 and A5.

Source: DeltaProduct (arXiv 2502.10297), section 4; the groups: Klein 1884.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ostinato.errors import UnknownNameError


class RotationGroup(NamedTuple):
    """A finite group of rotations, and what each of them does to n things that it permutes."""

    matrices: Float[Tensor, "order 3 3"]
    """float64; the identity first."""
    permutations: Int[Tensor, "order n"]
    """permutations[g, i] is where g carries thing i: the four diagonals of the cube, or the five frames of three
    orthogonal two-fold axes of the icosahedron."""


def rotation_group(name: str) -> RotationGroup:
    """The rotations "S4" of the cube or "A5" of the icosahedron; raises `UnknownNameError` for any other name."""
    if name == "S4":
        matrices = _generated(_turn((0, 0, 1), 4), _turn((1, 1, 1), 3))
        axes = torch.tensor([[1, 1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]], dtype=torch.float64)
        return RotationGroup(matrices, _permuted(matrices, axes / 3**0.5, torch.arange(4)))
    if name == "A5":
        golden = (1 + 5**0.5) / 2
        matrices = _generated(_turn((0, 1, golden), 5), _turn((1, 1, 1), 3))
        axes, frames = _frames(matrices)
        return RotationGroup(matrices, _permuted(matrices, axes, frames))
    raise UnknownNameError("group of rotations", name, ("A5", "S4"))


def _turn(axis: tuple[float, float, float], order: int) -> Tensor:
    """The rotation about an axis by 2π/order: exp of the cross product with the axis."""
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(cross * (2 * torch.pi / order))


def _generated(*generators: Tensor) -> Tensor:
    """All products of the generators, the identity first."""
    found = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    size = 0
    while len(found) > size:
        size = len(found)
        for generator in generators:
            for candidate in generator @ found:
                if float((found - candidate).abs().amax((1, 2)).min()) > 1e-6:
                    found = torch.cat([found, candidate.unsqueeze(0)])
    return found


def _frames(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The two-fold axes (15, 3), and for each the number of the orthogonal frame that it belongs to (15,)."""
    half_turns = matrices[(matrices.diagonal(dim1=1, dim2=2).sum(1) + 1).abs() < 1e-6]
    # A half turn is 2 a aᵀ − I.
    axes = torch.linalg.eigh(half_turns).eigenvectors[..., 2]
    same = ((axes @ axes.mT).abs() < 1e-6) | torch.eye(len(axes), dtype=torch.bool)
    first = same.int().argmax(1)
    return axes, torch.unique(first, return_inverse=True)[1]


def _permuted(matrices: Tensor, axes: Tensor, things: Tensor) -> Tensor:
    """Where every matrix carries every thing; axis i (a line, of either sign) belongs to thing things[i]."""
    carried = torch.einsum("gij,aj->gai", matrices, axes)
    target = torch.einsum("gai,bi->gab", carried, axes).abs().argmax(-1)
    first = torch.stack([(things == thing).int().argmax() for thing in range(int(things.max()) + 1)])
    return things[target[:, first]]
