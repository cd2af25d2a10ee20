"""Piecewise-linear cells: PLRNN and its mean-centred, dendritic, shallow and almost-linear kin.

Within a region of state space, given by the signs of a few linear functions of the state, such a step is affine:
f(z) = J z + c, with J and c known from the region alone. That is what makes these maps legible: Jacobians are
exact, and fixed points and cycles are solutions of linear systems (`ostinato.analysis.cycles`).

Many models can run side by side: matrices then carry a leading axis, (runs, out, in), whatever broadcasts
against states carries one more of size one, (runs, 1, dim), and states are (runs, rows, latent).
`ostinato.models.dynamics` stacks them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.cells.protocol import Cell, Weights
from ostinato.ops.scan import DENSE


class Latent(NamedTuple):
    """The latent vector."""

    latent: Float[Tensor, "... latent"]


def _for_each_row(matrix: Tensor) -> Tensor:
    """A matrix, or one for each run, as it meets the regions of many rows."""
    return matrix if matrix.ndim == 2 else matrix.unsqueeze(-3)


def _largest(diagonal: Tensor) -> Tensor:
    """max|A_i|, of each run."""
    largest = diagonal.abs().amax(-1)
    return largest.squeeze(-1) if diagonal.ndim > 1 else largest


def _uniform(bound: float, *shape: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * bound


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw_diagonal(latent: int, generator: torch.Generator) -> Tensor:
    """A = diag(K)/λ_max(K), K = RᵀR/M + I, R ~ N(0, 1): entries in (0, 1)."""
    root = _normal(latent, latent, generator=generator)
    matrix = root.T @ root / latent + torch.eye(latent, dtype=torch.float64)
    return matrix.diagonal() / torch.linalg.eigvalsh(matrix)[-1]


class PiecewiseLinear(Cell):
    """z_t = f(z_{t−1}) + x_t, f affine in each region; x_t is the projected external input, (…, latent).

    Subclasses define `advance`, `regions`, `affine` and `draw`, and name their weights.
    """

    structure = DENSE
    names: ClassVar[tuple[str, ...]]
    """The names of the weights, in their order."""
    matrices: ClassVar[tuple[str, ...]]
    """Those that states are multiplied with; the others broadcast against states."""

    def advance(self, weights: Weights, latent: Float[Tensor, "... latent"]) -> Float[Tensor, "... latent"]:
        """f(z)."""
        raise NotImplementedError(f"{type(self).__name__} does not define advance")

    def regions(self, weights: Weights, latent: Float[Tensor, "... latent"]) -> Bool[Tensor, "... bits"]:
        """The region of z: one bit for each function whose sign decides."""
        raise NotImplementedError(f"{type(self).__name__} does not define regions")

    def affine(
        self, weights: Weights, region: Bool[Tensor, "... bits"]
    ) -> tuple[Float[Tensor, "... latent latent"], Float[Tensor, "... latent"]]:
        """J and c of a region: f(z) = J z + c for every z in it. Regions that hold no z have them too."""
        raise NotImplementedError(f"{type(self).__name__} does not define affine")

    def draw(self, latent: int, run: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial weights of one model, in float64; `run` is its place among models side by side."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw")

    def constants(self) -> tuple[str, ...]:
        """The weights that training leaves alone."""
        return ()

    def norm_bound(self, weights: Weights) -> Float[Tensor, ...]:
        """max|A_i| + ‖W‖₂ ≥ ‖J‖₂ in every region, of each run."""
        return _largest(weights[0]) + torch.linalg.matrix_norm(weights[1], 2)

    def linearise(self, weights: Weights, latent: Float[Tensor, "... latent"]) -> Tensor:
        """What `pull_back` needs to know of f at z: here, J."""
        return self.affine(weights, self.regions(weights, latent))[0]

    def pull_back(self, weights: Weights, slopes: Tensor, adjoint: Float[Tensor, "... latent"]) -> Tensor:
        """Jᵀ λ, from what `linearise` gave."""
        return (slopes * adjoint.unsqueeze(-1)).sum(-2)

    def step(self, weights: Weights, state: Latent, inputs: Tensor) -> Latent:
        """One step."""
        return Latent(self.advance(weights, state.latent) + inputs)

    def step_and_jacobian(self, weights: Weights, state: Latent, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """f(z) + x and the J of z's region."""
        jacobian, _ = self.affine(weights, self.regions(weights, state.latent))
        return self.step(weights, state, inputs).latent, jacobian

    def output(self, state: Latent) -> Tensor:
        """The latent vector."""
        return state.latent

    def initial_state(self, inputs: Tensor) -> Latent:
        """Zeros."""
        return Latent(torch.zeros_like(inputs))

    def pack(self, state: Latent) -> Tensor:
        """The latent vector."""
        return state.latent

    def unpack(self, packed: Tensor) -> Latent:
        """The inverse of `pack`."""
        return Latent(packed)

    def check(self, weights: Weights, inputs: Tensor) -> None:
        """Raise `ShapeError` unless there is a weight for each name and the width is that of the inputs."""
        name = type(self).__name__
        if len(weights) != len(self.names):
            raise ShapeError(f"{name} takes the weights {', '.join(self.names)}, got {len(weights)} of them")
        width = weights[0].shape[-1]
        if inputs.shape[-1] != width:
            raise ShapeError(f"the inputs of this {name} are {width} wide, as its state; got {tuple(inputs.shape)}")


@dataclass(frozen=True)
class PLRNN(PiecewiseLinear):
    """z' = A ∘ z + W φ(z) + h, φ = ReLU, W without its diagonal; mean-centred: φ(z − mean z).

    weights = (A (latent,), W (latent, latent), h (latent,)). One bit a unit: is what φ sees positive?
    Source: GTF (arXiv 2306.04406), section 2 and its code for the earlier members of the family.
    """

    mean_centred: bool = False
    names = ("diagonal", "matrix", "bias")
    matrices = ("matrix",)

    @staticmethod
    def _hollow(matrix: Tensor) -> Tensor:
        return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))

    def _seen(self, latent: Tensor) -> Tensor:
        return latent - latent.mean(-1, keepdim=True) if self.mean_centred else latent

    def advance(self, weights: Weights, latent: Tensor) -> Tensor:
        """f(z)."""
        diagonal, matrix, bias = weights
        return torch.addcmul(bias, diagonal, latent) + torch.relu(self._seen(latent)) @ self._hollow(matrix).mT

    def regions(self, weights: Weights, latent: Tensor) -> Tensor:
        """z > 0, or z > mean z."""
        return self._seen(latent) > 0

    def affine(self, weights: Weights, region: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(A) + W D (W D (I − 11ᵀ/M) if mean-centred), c = h."""
        diagonal, matrix, bias = weights
        through = _for_each_row(self._hollow(matrix)) * region.to(diagonal.dtype).unsqueeze(-2)
        if self.mean_centred:
            through = through - through.mean(-1, keepdim=True)
        return through + torch.diag_embed(diagonal), bias.expand(*region.shape[:-1], bias.shape[-1])

    def draw(self, latent: int, run: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A as `draw_diagonal`, W ~ 0.01 N(0, 1), h = 0."""
        return {
            "diagonal": draw_diagonal(latent, generator),
            "matrix": 0.01 * _normal(latent, latent, generator=generator),
            "bias": torch.zeros(latent, dtype=torch.float64),
        }


@dataclass(frozen=True)
class DendriticPLRNN(PiecewiseLinear):
    """z' = A ∘ z + W Σ_b α_b φ(z − h_b) + h; clipped: φ(z − h_b) − φ(z) in the sum.

    weights = (A, W, h, α (branches, 1), thresholds h_b (branches, latent)). Bits: z > h_b branch by branch,
    and z > 0 after them if clipped.
    Source: GTF (arXiv 2306.04406) and its code; dendPLRNN (arXiv 2207.02542).
    """

    branches: int = 8
    clipped: bool = False
    names = ("diagonal", "matrix", "bias", "slopes", "thresholds")
    matrices = ("matrix",)

    def _gates(self, weights: Weights, region: Tensor) -> tuple[Tensor, Tensor]:
        """α_b D_b (…, branches, latent), and the slope of the sum (…, latent)."""
        bits = region.to(weights[0].dtype).unflatten(-1, (-1, weights[0].shape[-1]))
        opened = weights[3] * bits[..., : self.branches, :]
        slope = opened.sum(-2)
        if self.clipped:
            slope = slope - weights[3].sum(-2) * bits[..., self.branches, :]
        return opened, slope

    def advance(self, weights: Weights, latent: Tensor) -> Tensor:
        """f(z)."""
        diagonal, matrix, bias, slopes, thresholds = weights
        basis = torch.relu(latent.unsqueeze(-2) - thresholds)
        if self.clipped:
            basis = basis - torch.relu(latent).unsqueeze(-2)
        return torch.addcmul(bias, diagonal, latent) + (slopes * basis).sum(-2) @ matrix.mT

    def regions(self, weights: Weights, latent: Tensor) -> Tensor:
        """z > h_b for each branch, then z > 0 if clipped."""
        bits = latent.unsqueeze(-2) > weights[4]
        if self.clipped:
            bits = torch.cat([bits, latent.unsqueeze(-2) > 0], dim=-2)
        return bits.flatten(-2)

    def norm_bound(self, weights: Weights) -> Tensor:
        """max|A_i| + ‖W‖₂ Σ_b|α_b| ≥ ‖J‖₂ in every region, of each run."""
        slopes = weights[3].abs().flatten(-2).sum(-1)
        slopes = slopes.squeeze(-1) if weights[1].ndim > 2 else slopes
        return _largest(weights[0]) + torch.linalg.matrix_norm(weights[1], 2) * slopes

    def affine(self, weights: Weights, region: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(A) + W Σ_b α_b D_b (− W Σ_b α_b D_0 if clipped), c = h − W Σ_b α_b D_b h_b."""
        diagonal, matrix, bias, _, thresholds = weights
        opened, slope = self._gates(weights, region)
        jacobian = _for_each_row(matrix) * slope.unsqueeze(-2) + torch.diag_embed(diagonal)
        return jacobian, bias - (opened * thresholds).sum(-2) @ matrix.mT

    def draw(self, latent: int, run: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A as `draw_diagonal`, W ~ 0.01 N(0, 1), h = 0, α ~ U(±1/√branches), h_b ~ N(0, 1)."""
        bound = 1 / math.sqrt(self.branches)
        return {
            "diagonal": draw_diagonal(latent, generator),
            "matrix": 0.01 * _normal(latent, latent, generator=generator),
            "bias": torch.zeros(latent, dtype=torch.float64),
            "slopes": _uniform(bound, self.branches, 1, generator=generator),
            "thresholds": _normal(self.branches, latent, generator=generator),
        }


@dataclass(frozen=True)
class ShallowPLRNN(PiecewiseLinear):
    """z' = A ∘ z + W1 φ(W2 z + h2) + h1; clipped: φ(W2 z + h2) − φ(W2 z) in place of φ(W2 z + h2).

    Clipped, the bracket is at most |h2| in each entry, so every orbit is bounded where all |A_i| < 1.
    weights = (A (latent,), W1 (latent, hidden), W2 (hidden, latent), h1 (latent,), h2 (hidden,)). Bits:
    W2 z + h2 > 0 for each hidden unit, and W2 z > 0 after them if clipped.
    Source: GTF (arXiv 2306.04406), section 3.
    """

    hidden: int = 50
    clipped: bool = True
    names = ("diagonal", "outer", "inner", "bias", "hidden_bias")
    matrices = ("outer", "inner")

    def advance(self, weights: Weights, latent: Tensor) -> Tensor:
        """f(z)."""
        diagonal, outer, inner, bias, hidden_bias = weights
        projected = latent @ inner.mT
        active = torch.relu(projected + hidden_bias)
        if self.clipped:
            active = active - torch.relu(projected)
        return torch.addcmul(bias, diagonal, latent) + active @ outer.mT

    def regions(self, weights: Weights, latent: Tensor) -> Tensor:
        """W2 z + h2 > 0, then W2 z > 0 if clipped."""
        projected = latent @ weights[2].mT
        bits = projected + weights[4] > 0
        return torch.cat([bits, projected > 0], dim=-1) if self.clipped else bits

    def affine(self, weights: Weights, region: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(A) + W1 (D1 − D2) W2, c = h1 + W1 D1 h2; D2 = 0 if not clipped."""
        diagonal, outer, inner, bias, hidden_bias = weights
        hidden, latent = inner.shape[-2:]
        bits = region.to(diagonal.dtype)
        opened = bits[..., :hidden]
        slope = opened - bits[..., hidden:] if self.clipped else opened
        # J is linear in the slopes: one product with the outer products of W1's columns and W2's rows
        pairs = (outer.mT.unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2)
        jacobian = (slope @ pairs).unflatten(-1, (latent, latent)) + torch.diag_embed(diagonal)
        return jacobian, bias + (opened * hidden_bias) @ outer.mT

    def norm_bound(self, weights: Weights) -> Float[Tensor, ...]:
        """max|A_i| + ‖W1‖₂ ‖W2‖₂ ≥ ‖J‖₂ in every region, of each run."""
        diagonal, outer, inner = weights[:3]
        return _largest(diagonal) + torch.linalg.matrix_norm(outer, 2) * torch.linalg.matrix_norm(inner, 2)

    def draw(self, latent: int, run: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A as `draw_diagonal`; W1, h2 ~ U(±1/√hidden) (h2 = 0 if not clipped), W2 ~ U(±1/√latent), h1 = 0."""
        of_hidden = 1 / math.sqrt(self.hidden)
        return {
            "diagonal": draw_diagonal(latent, generator),
            "outer": _uniform(of_hidden, latent, self.hidden, generator=generator),
            "inner": _uniform(1 / math.sqrt(latent), self.hidden, latent, generator=generator),
            "bias": torch.zeros(latent, dtype=torch.float64),
            "hidden_bias": _uniform(of_hidden if self.clipped else 0.0, self.hidden, generator=generator),
        }


@dataclass(frozen=True)
class ALRNN(PiecewiseLinear):
    """z' = A ∘ z + W Φ(z) + h, where Φ is the identity on all units but the last P, and ReLU on those.

    Written Φ(z) = max(z, s ∘ z) with a slope s of 1 for a linear unit and 0 for a ReLU; slopes between, learned
    and pushed towards 1, let training choose which units switch. weights = (A, W (full), h, s).
    Bits: z > 0 for each unit, always set for a unit of slope 1: at most 2^P regions.

    Args:
        switching: P, or one P for each of the models side by side.
        learned_slopes: whether slopes are trained, of all units; `switching` is then how many start as ReLU.

    Source: AL-RNN (arXiv 2410.14240), section 3.
    """

    switching: int | Sequence[int] = 2
    learned_slopes: bool = False
    names = ("diagonal", "matrix", "bias", "slopes")
    matrices = ("matrix",)

    def constants(self) -> tuple[str, ...]:
        """The slopes, unless they are learned."""
        return () if self.learned_slopes else ("slopes",)

    def advance(self, weights: Weights, latent: Tensor) -> Tensor:
        """f(z)."""
        diagonal, matrix, bias, slopes = weights
        leaky = slopes * latent  # max(z, s z) is Φ only while no learned slope exceeds 1
        bent = torch.where(latent > 0, latent, leaky) if self.learned_slopes else torch.maximum(latent, leaky)
        return torch.addcmul(bias, diagonal, latent) + bent @ matrix.mT

    def regions(self, weights: Weights, latent: Tensor) -> Tensor:
        """z > 0, set for units of slope 1."""
        return (latent > 0) | (weights[3] == 1)

    def linearise(self, weights: Weights, latent: Tensor) -> Tensor:
        """The slope of Φ."""
        return torch.where(latent > 0, torch.ones_like(latent), weights[3])

    def pull_back(self, weights: Weights, slopes: Tensor, adjoint: Tensor) -> Tensor:
        """A ∘ λ + D Wᵀ λ."""
        return torch.addcmul(weights[0] * adjoint, slopes, adjoint @ weights[1])

    def affine(self, weights: Weights, region: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(A) + W D, c = h."""
        diagonal, matrix, bias, slopes = weights
        gain = torch.where(region, torch.ones_like(slopes), slopes)
        jacobian = _for_each_row(matrix) * gain.unsqueeze(-2) + torch.diag_embed(diagonal)
        return jacobian, bias.expand(*region.shape[:-1], bias.shape[-1])

    def draw(self, latent: int, run: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A as `draw_diagonal`, W ~ 0.01 N(0, 1), h = 0; learned slopes start at 0.

        Raises:
            ConfigurationError: P is not among 0 … latent, or there is none for this run.
        """
        each = self.switching if isinstance(self.switching, int) else None
        if each is None:
            if run >= len(self.switching):  # type: ignore[arg-type]
                raise ConfigurationError(f"ALRNN has {self.switching} switching units: none is given for run {run}")
            each = self.switching[run]  # type: ignore[index]
        if not 0 <= each <= latent:
            raise ConfigurationError(f"ALRNN cannot have {each} switching units among {latent}")
        slopes = torch.ones(latent, dtype=torch.float64)
        slopes[latent - each :] = 0
        return {
            "diagonal": draw_diagonal(latent, generator),
            "matrix": 0.01 * _normal(latent, latent, generator=generator),
            "bias": torch.zeros(latent, dtype=torch.float64),
            "slopes": slopes,
        }
