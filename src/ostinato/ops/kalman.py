"""The Kalman filter as an associative scan: the inner solve of ELK.

A Levenberg–Marquardt step on a trajectory, min over h of
    ½ Σ_t ‖h_t − A_t h_{t−1} − b_t‖² + (λ/2) Σ_t ‖h_t − y_t‖²,
is inference in a linear Gaussian model: transition A_t, offset b_t, unit process noise, and an observation
y_t of the whole state with noise 1/λ. Its filter is an associative scan over the 5-tuples (A, b, C, J, η)
of Särkkä & García-Fernández 2021; every one is p(h_t | h_{t−1}, y_t) = N(A h_{t−1} + b, C) together with
the likelihood of y_t, an information matrix J and vector η of h_{t−1}.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.ops.scan import DIAGONAL, Affine, Element, Point, associative_scan


class DiagonalFilter:
    """Filters of one number a channel: all five parts are (…, channels), points are (mean, variance)."""

    def combine(self, first: Element, second: Element) -> Element:
        """With D = 1 + C₁J₂: A₁A₂/D, A₂(b₁ + C₁η₂)/D + b₂, A₂²C₁/D + C₂, A₁²J₂/D + J₁, A₁(η₂ − J₂b₁)/D + η₁."""
        a1, b1, c1, j1, e1 = first
        a2, b2, c2, j2, e2 = second
        shrink = 1 / (1 + c1 * j2)
        left, right = a2 * shrink, a1 * shrink
        return (
            left * a1,
            left * (b1 + c1 * e2) + b2,
            left * a2 * c1 + c2,
            right * a1 * j2 + j1,
            right * (e2 - j2 * b1) + e1,
        )

    def act(self, element: Element, point: Point) -> Point:
        """The filtered mean and variance after the element's steps."""
        a, b, c, j, e = element
        mean, variance = point
        left = a / (1 + variance * j)
        return left * (mean + variance * e) + b, left * a * variance + c


class DenseFilter:
    """Filters of vectors: A, C, J are (…, d, d), b, η (…, d), points (mean, covariance).

    The same products as `DiagonalFilter`, with D = I + C₁J₂ a matrix.
    """

    def combine(self, first: Element, second: Element) -> Element:
        """A₂D⁻¹A₁, A₂D⁻¹(b₁ + C₁η₂) + b₂, A₂D⁻¹C₁A₂ᵀ + C₂, A₁ᵀD⁻ᵀJ₂A₁ + J₁, A₁ᵀD⁻ᵀ(η₂ − J₂b₁) + η₁."""
        a1, b1, c1, j1, e1 = first
        a2, b2, c2, j2, e2 = second
        left, right = _shrink(a2, c1, j2), torch.linalg.solve(_denominator(c1, j2), a1).mT
        return (
            left @ a1,
            _times(left, b1 + _times(c1, e2)) + b2,
            left @ c1 @ a2.mT + c2,
            right @ j2 @ a1 + j1,
            _times(right, e2 - _times(j2, b1)) + e1,
        )

    def act(self, element: Element, point: Point) -> Point:
        """The filtered mean and covariance after the element's steps."""
        a, b, c, j, e = element
        mean, covariance = point
        left = _shrink(a, covariance, j)
        return _times(left, mean + _times(covariance, e)) + b, left @ covariance @ a.mT + c


def _denominator(covariance: Tensor, information: Tensor) -> Tensor:
    product = covariance @ information
    return product + torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)


def _shrink(a: Tensor, covariance: Tensor, information: Tensor) -> Tensor:
    """A (I + C J)⁻¹."""
    return torch.linalg.solve(_denominator(covariance, information).mT, a.mT).mT


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def filtered_means(
    transition: Float[Tensor, "batch time ..."],
    offset: Float[Tensor, "batch time ..."],
    observation: Float[Tensor, "batch time ..."],
    initial: Float[Tensor, "batch ..."],
    damping: float,
    *,
    structure: Affine = DIAGONAL,
) -> Float[Tensor, "batch time ..."]:
    """E[h_t | y_1…y_t] of h_t = A_t h_{t−1} + b_t + noise, y_t = h_t + noise/√λ, from the known h_0.

    Args:
        transition: A, (batch, time, …, channels) for `DIAGONAL`, (batch, time, …, d, d) for `DENSE`.
        offset: b, (batch, time, …).
        observation: y, (batch, time, …).
        initial: h_0, (batch, …).
        damping: λ > 0. λ → 0 gives the noiseless recurrence, λ → ∞ the observations.
        structure: `DIAGONAL` or `DENSE`.

    Source: ELK (arXiv 2407.19115), section 4; Särkkä & García-Fernández 2021 (arXiv 1905.13002).
    """
    gain = damping / (1 + damping)  # K = P/(P + 1/λ) with the unit P of a single step
    surprise = observation - offset
    mean = offset + gain * surprise
    if structure is DIAGONAL:
        spread = torch.ones_like(transition)
        elements = (
            (1 - gain) * transition,
            mean,
            (1 - gain) * spread,
            gain * transition * transition,
            gain * transition * surprise,
        )
        means, _ = associative_scan(DiagonalFilter(), elements, (initial, torch.zeros_like(initial)))
        return means
    spread = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device).expand_as(transition)
    elements = (
        (1 - gain) * transition,
        mean,
        (1 - gain) * spread,
        gain * transition.mT @ transition,
        gain * _times(transition.mT, surprise),
    )
    means, _ = associative_scan(DenseFilter(), elements, (initial, torch.zeros_like(transition[:, 0])))
    return means
