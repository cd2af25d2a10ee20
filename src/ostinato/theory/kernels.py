"""The two kernels of an infinitely wide network, NNGP and NTK, from an algebra of its layers.

    spec = (Dense(bias=0.1), Relu(), Dense(bias=0.1), Relu(), Dense(bias=0.1))
    ntk(spec, x), nngp(spec, x, x2)

In the parametrisation z = (w/√n) W a + β b, with all entries of W and b drawn from N(0, 1), the outputs of the network
are a Gaussian process of covariance Σ (NNGP) as its widths grow, and gradient descent moves them along the fixed
kernel Θ(x, x') = Σ_p ∂_p f(x) ∂_p f(x') (NTK). Each layer maps the pair (Σ, Θ):

    Dense       Σ ← w² Σ + β²,            Θ ← w² Θ + Σ (the new one)
    activation  Σ ← E[s(u) s(v)],         Θ ← Θ E[s'(u) s'(v)],       (u, v) ∼ N(0, Σ on {x, x'})
    Residual    Σ ← Σ + Σ of the branch,  Θ ← Θ + Θ of the branch
    Recurrent   S_t = w² E[s s]_{S_{t−1}} + u² x_t·x'_t/m + β²,  G_t = S_t + w² E[s' s']_{S_{t−1}} G_{t−1}

`theory/wide_networks.py` draws finite networks of the same specifications.

Source: Jacot et al., Neural Tangent Kernel (arXiv 1806.07572), section 4. The recurrent kernel is not in the paper; it
is derived in the same way: terms that pair different times vanish at infinite width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError


class Covariance(NamedTuple):
    """Kernel values on pairs of inputs, with the variances of both sides."""

    pairs: Float[Tensor, "n m"]
    left: Float[Tensor, " n"]
    right: Float[Tensor, " m"]
    same: bool
    """Whether both sides are one set, so that the diagonal of `pairs` is `left`."""


class Activation:
    """A pointwise function s with its two Gaussian moments."""

    def __call__(self, x: Tensor) -> Tensor:
        """s(x)."""
        raise NotImplementedError(f"{type(self).__name__} does not define its function")

    def moments(self, pairs: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """E[s(u) s(v)] and E[s'(u) s'(v)] for covariance `pairs` and variances `left`, `right`, all broadcastable."""
        raise NotImplementedError(f"{type(self).__name__} does not define its moments")

    def transform(self, sigma: Covariance) -> tuple[Covariance, Tensor]:
        """The covariance of s(u), and E[s' s'] on the pairs."""
        pairs, slopes = self.moments(sigma.pairs, sigma.left.unsqueeze(1), sigma.right.unsqueeze(0))
        left, left_slopes = self.moments(sigma.left, sigma.left, sigma.left)
        right = left if sigma.same else self.moments(sigma.right, sigma.right, sigma.right)[0]
        if sigma.same:
            # The correlation is 1 up to rounding there, where its arc cosine has no slope: eps would become √eps.
            pairs = pairs.diagonal_scatter(left)
            slopes = slopes.diagonal_scatter(left_slopes)
        return Covariance(pairs, left, right, sigma.same), slopes


@dataclass(frozen=True)
class Relu(Activation):
    """max(x, 0): with c the correlation and t = arccos c,

    E[ss] = √(S₁₁S₂₂) (sin t + (π − t) c) / 2π, E[s's'] = (π − t) / 2π.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return torch.relu(x)

    def moments(self, pairs: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The arc-cosine kernels of orders 1 and 0."""
        if pairs is left:  # a variance: t = 0
            return pairs / 2, torch.full_like(pairs, 0.5)
        scale = (left * right).sqrt()
        c = (pairs / scale.clamp(min=torch.finfo(scale.dtype).tiny)).clamp(-1, 1)
        angle = torch.arccos(c)
        return scale * ((1 - c * c).sqrt() + (math.pi - angle) * c) / (2 * math.pi), (math.pi - angle) / (2 * math.pi)


@dataclass(frozen=True)
class Erf(Activation):
    """erf(x): E[ss] = (2/π) arcsin(2S₁₂/√((1+2S₁₁)(1+2S₂₂))), E[s's'] = (4/π)/√((1+2S₁₁)(1+2S₂₂) − 4S₁₂²)."""

    def __call__(self, x: Tensor) -> Tensor:
        """erf(x)."""
        return torch.erf(x)

    def moments(self, pairs: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Both in closed form."""
        scale = (1 + 2 * left) * (1 + 2 * right)
        covariance = (2 / math.pi) * torch.arcsin((2 * pairs / scale.sqrt()).clamp(-1, 1))
        return covariance, (4 / math.pi) / (scale - 4 * pairs * pairs).sqrt()


@dataclass(frozen=True)
class Quadrature(Activation):
    """A smooth function whose moments are taken by Gauss–Hermite quadrature over `nodes`² points."""

    nodes: int = 40

    def slope(self, x: Tensor) -> Tensor:
        """s'(x)."""
        raise NotImplementedError(f"{type(self).__name__} does not define its derivative")

    def moments(self, pairs: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """u = √S₁₁ a, v = √S₂₂ (c a + √(1 − c²) b), with a and b on the quadrature's points."""
        points, weights = _gauss_hermite(self.nodes)
        a = torch.tensor(points, dtype=pairs.dtype, device=pairs.device)
        w = torch.tensor(weights, dtype=pairs.dtype, device=pairs.device)
        scale = (left * right).sqrt().clamp(min=torch.finfo(pairs.dtype).tiny)
        c = (pairs / scale).clamp(-1, 1)
        covariance, slopes = torch.zeros_like(pairs), torch.zeros_like(pairs)
        across = (1 - c * c).sqrt()
        # One axis of points in a loop, the other as a new axis: memory grows with the nodes, not their square.
        for point, weight in zip(points, weights, strict=True):
            u = left.sqrt() * point
            v = right.sqrt().unsqueeze(-1) * (c.unsqueeze(-1) * point + across.unsqueeze(-1) * a)
            covariance = covariance + weight * self(u) * (self(v) @ w)
            slopes = slopes + weight * self.slope(u) * (self.slope(v) @ w)
        return covariance, slopes


@dataclass(frozen=True)
class Gelu(Quadrature):
    """x Φ(x), by Gauss–Hermite quadrature."""

    def __call__(self, x: Tensor) -> Tensor:
        """x Φ(x)."""
        return torch.nn.functional.gelu(x)

    def slope(self, x: Tensor) -> Tensor:
        """Φ(x) + x φ(x)."""
        return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Tanh(Quadrature):
    """tanh(x), by Gauss–Hermite quadrature."""

    def __call__(self, x: Tensor) -> Tensor:
        """tanh(x)."""
        return torch.tanh(x)

    def slope(self, x: Tensor) -> Tensor:
        """1 − tanh²(x)."""
        return 1 - torch.tanh(x) ** 2


@dataclass(frozen=True)
class Dense:
    """z = (weight/√n) W a + bias · b, with W and b standard normal."""

    weight: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class Residual:
    """a + branch(a); the branch ends in `Dense`, whose own draw makes it uncorrelated with a."""

    branch: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.branch or not isinstance(self.branch[-1], Dense):
            raise ConfigurationError(
                "a Residual's branch must end in Dense: without fresh weights it is correlated with what it is "
                "added to, and the kernels do not add up"
            )


@dataclass(frozen=True)
class Recurrent:
    """p_t = (weight/√n) W h_{t−1} + (inputs/√m) U x_t + bias · b, h_t = s(p_t), h_0 = 0; gives h_T. A first layer."""

    activation: Activation
    weight: float = 1.0
    inputs: float = 1.0
    bias: float = 0.0


Layer = Dense | Activation | Residual | Recurrent
Spec = Sequence[Layer]


class Kernels(NamedTuple):
    """What goes from layer to layer."""

    sigma: Covariance
    theta: Float[Tensor, "n m"]


def nngp(spec: Spec, x: Float[Tensor, "n ..."], x2: Float[Tensor, "m ..."] | None = None) -> Float[Tensor, "n m"]:
    """The covariance of the network's outputs over its draws; one output, or the diagonal block of several.

    Args:
        spec: layers from the input on.
        x, x2: inputs (n, features), or sequences (n, time, features) for a spec that starts with `Recurrent`; without
            x2 the kernel of x with itself.

    Computed in float64 whatever the inputs' type, and returned so. Raises `ShapeError` and `ConfigurationError`.

    Source: arXiv 1806.07572, proposition 1.
    """
    return kernels(spec, x, x2).sigma.pairs


def ntk(spec: Spec, x: Float[Tensor, "n ..."], x2: Float[Tensor, "m ..."] | None = None) -> Float[Tensor, "n m"]:
    """The tangent kernel at infinite width; with several outputs it is this times the identity. As `nngp` otherwise.

    Source: arXiv 1806.07572, theorem 1.
    """
    return kernels(spec, x, x2).theta


def kernels(spec: Spec, x: Float[Tensor, "n ..."], x2: Float[Tensor, "m ..."] | None = None) -> Kernels:
    """Both kernels at once, with the variances of both sides."""
    sequences = bool(spec) and isinstance(spec[0], Recurrent)
    wanted = 3 if sequences else 2
    x2_given = x if x2 is None else x2
    for name, tensor in (("x", x), ("x2", x2_given)):
        if tensor.ndim != wanted or tensor.shape[1:] != x.shape[1:] or not tensor.numel():
            axes = "(inputs, time, features)" if sequences else "(inputs, features)"
            raise ShapeError(f"{name} must be {axes} and alike x, not empty, got {tuple(tensor.shape)}")
    left, right, same = x.double(), x2_given.double(), x2 is None
    first = spec[0] if spec else None
    if isinstance(first, Recurrent):
        return _through(spec[1:], _recurrent(first, left, right, same))
    sigma = _products(left, right, same)
    return _through(spec, Kernels(sigma, torch.zeros_like(sigma.pairs)))


def _through(layers: Sequence[Layer], state: Kernels) -> Kernels:
    for layer in layers:
        if isinstance(layer, Dense):
            sigma = _affine(state.sigma, layer.weight, layer.bias)
            state = Kernels(sigma, layer.weight**2 * state.theta + sigma.pairs)
        elif isinstance(layer, Activation):
            sigma, slopes = layer.transform(state.sigma)
            state = Kernels(sigma, state.theta * slopes)
        elif isinstance(layer, Residual):
            branch = _through(layer.branch, state)
            sigma = _add(state.sigma, branch.sigma)
            state = Kernels(sigma, state.theta + branch.theta)
        elif isinstance(layer, Recurrent):
            raise ConfigurationError("Recurrent reads sequences and must be the first layer")
        else:
            raise ConfigurationError(f"a spec is made of Dense, activations, Residual and Recurrent, got {layer!r}")
    return state


def _recurrent(layer: Recurrent, left: Tensor, right: Tensor, same: bool) -> Kernels:
    def driven(t: int) -> Covariance:
        return _affine(_products(left[:, t], right[:, t], same), layer.inputs, layer.bias)

    sigma = driven(0)
    theta = sigma.pairs
    for t in range(1, left.shape[1]):
        hidden, slopes = layer.activation.transform(sigma)
        sigma = _add(_affine(hidden, layer.weight), driven(t))
        theta = sigma.pairs + layer.weight**2 * slopes * theta
    hidden, slopes = layer.activation.transform(sigma)
    return Kernels(hidden, slopes * theta)


def _products(left: Tensor, right: Tensor, same: bool) -> Covariance:
    width = left.shape[-1]
    return Covariance(left @ right.mT / width, left.square().sum(-1) / width, right.square().sum(-1) / width, same)


def _affine(sigma: Covariance, weight: float, bias: float = 0.0) -> Covariance:
    """weight² Σ + bias²."""
    pairs, left, right = (weight**2 * s + bias**2 for s in sigma[:3])
    return Covariance(pairs, left, right, sigma.same)


def _add(one: Covariance, other: Covariance) -> Covariance:
    return Covariance(one.pairs + other.pairs, one.left + other.left, one.right + other.right, one.same)


@lru_cache(maxsize=8)
def _gauss_hermite(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points and weights of the expectation under N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return tuple(points.tolist()), tuple((weights / math.sqrt(2 * math.pi)).tolist())
