"""Training without training: what gradient descent on squared loss does to a function whose kernel stays fixed.

With the loss ½ ‖f(X) − y‖² on N points and the rate η, in the eigenbasis Θ = U diag(λ) Uᵀ each component of the error
decays on its own, as e^{−ηλt} (gradient flow) or (1 − ηλ)^t (gradient descent, for η < 2/λ_max): the large ones first,
which is why stopping early smooths. For a loss of the mean, pass η/N.

Source: Jacot et al. (arXiv 1806.07572), section 5; Lee et al., Wide Neural Networks of Any Depth (arXiv 1902.06720).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.theory.kernels import Spec, kernels


def kernel_dynamics(
    ntk: Float[Tensor, "n n"],
    y: Float[Tensor, " n"],
    f0: Float[Tensor, " n"],
    lr: float,
    t: float,
    *,
    discrete: bool = False,
    cross: Float[Tensor, "m n"] | None = None,
    cross_f0: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " k"]:
    """The function at time t: f_t(X) = y + e^{−ηΘt}(f₀(X) − y), or at other points by the kernel `cross`.

    f_t(x) = f₀(x) + Θ(x, X) Θ⁻¹ (I − e^{−ηΘt})(y − f₀(X)).

    Args:
        ntk: Θ of the training points.
        y, f0: targets and outputs at the start; more axes may follow (several functions at once).
        lr: η.
        t: time, or steps; `math.inf` for the end.
        discrete: (I − ηΘ)^t, t an integer, in place of the exponential.
        cross, cross_f0: Θ(x, X) and f₀(x) of other points, to have f_t there.

    In the kernel's type. Raises `ShapeError` for a kernel that is not square or does not fit, `ConfigurationError` for
    a discrete rate of 2/λ_max or more, or one of `cross` and `cross_f0` alone.
    """
    if (cross is None) != (cross_f0 is None):
        raise ConfigurationError("cross and cross_f0 belong together: f_t(x) starts from f₀(x)")
    moved = _apply(ntk, y - f0, lr, t, discrete, divided=cross is not None)
    if cross is None or cross_f0 is None:
        return f0 + moved
    return cross_f0 + cross @ moved


def decay_rates(ntk: Float[Tensor, "n n"], lr: float, *, discrete: bool = False) -> tuple[Tensor, Tensor]:
    """Rates per step of the error's components, and these (columns), by falling rate: ηλ, or −log|1 − ηλ|."""
    values, vectors = torch.linalg.eigh(ntk)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return (-torch.log((1 - lr * values).abs()) if discrete else lr * values), vectors


class Prediction(NamedTuple):
    """A Gaussian process at the test points."""

    mean: Float[Tensor, " m"]
    covariance: Float[Tensor, "m m"]


def ntk_gp(
    spec: Spec,
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, " n"],
    x_test: Float[Tensor, "m ..."],
    *,
    lr: float = 1.0,
    t: float = math.inf,
    discrete: bool = False,
) -> Prediction:
    """The outputs of infinitely wide trained networks over their draws: mean and covariance at the test points.

    mean A y, covariance Σ(x,x') + A Σ(X,X) A'ᵀ − A Σ(X,x') − Σ(x,X) A'ᵀ with A = Θ(x,X) Θ⁻¹ (1 − e^{−ηΘt}). Not
    the posterior of the NNGP: there Σ stands in the place of Θ.

    Args:
        spec: of the network.
        x, y: training set; the loss is ½ ‖f(x) − y‖² (for the mean over points pass lr/N).
        x_test: where.
        lr, t, discrete: as in `kernel_dynamics`.

    In float64. Raises `ShapeError` and `ConfigurationError`.
    """
    both = torch.cat([x, x_test])
    joint = kernels(spec, both)
    n = len(x)
    theta, sigma = joint.theta, joint.sigma.pairs
    identity = torch.eye(n, dtype=theta.dtype, device=theta.device)
    influence = theta[n:, :n] @ _apply(theta[:n, :n], identity, lr, t, discrete, divided=True)
    mixed = influence @ sigma[:n, n:]
    covariance = sigma[n:, n:] + influence @ sigma[:n, :n] @ influence.mT - mixed - mixed.mT
    return Prediction(influence @ y.to(theta.dtype), covariance)


def _apply(ntk: Tensor, error: Tensor, lr: float, t: float, discrete: bool, *, divided: bool) -> Tensor:
    """(1 − e^{−ηΘt}) error, or Θ⁻¹ of it."""
    if ntk.ndim != 2 or ntk.shape[0] != ntk.shape[1] or error.shape[0] != ntk.shape[0]:
        raise ShapeError(f"the kernel must be (n, n) for n errors, got {tuple(ntk.shape)} and {tuple(error.shape)}")
    values, vectors = torch.linalg.eigh(ntk)
    # Rounding: eigenvalues below are noise, and at t = ∞ they would be divided by.
    values = values.clamp(min=1e-8 * float(values.clamp(min=0).mean()) + torch.finfo(values.dtype).tiny)
    if discrete and lr * float(values.max()) >= 2:
        raise ConfigurationError(
            f"gradient descent at rate {lr} diverges: λ_max is {float(values.max()):.4g}, take less than 2/λ_max"
        )
    if math.isinf(t):
        done = torch.ones_like(values)
    elif discrete:
        done = 1 - (1 - lr * values) ** int(t)
    else:
        done = -torch.expm1(-lr * values * t)
    if divided:
        done = done / values
    scaled = done.view(-1, *[1] * (error.ndim - 1)) * (vectors.mT @ error)
    return vectors @ scaled
