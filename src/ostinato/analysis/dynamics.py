"""How well a generated orbit has the attractor, the spectrum and the exponents of the true one.

Each measure depends on how it was taken: a `Measure` carries length, bins and widths beside its value, and the
floor that the truth has against itself. All are of standardised series, (time, dim), as NumPy arrays in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.models.dynamics import DynamicsModel, generate

Array = np.ndarray


@dataclass(frozen=True)
class Measure:
    """A value, how it was taken, and what the truth scores against itself."""

    name: str
    value: float
    settings: dict[str, Any] = field(default_factory=dict)
    floor: float | None = None

    def __str__(self) -> str:
        parts = [f"{key} {value}" for key, value in self.settings.items()]
        if self.floor is not None:
            parts.append(f"noise floor {self.floor:.3g}")
        return f"{self.name} {self.value:.3g}" + (f" ({', '.join(parts)})" if parts else "")


def _pair(true: Array, generated: Array) -> tuple[Array, Array]:
    true, generated = (np.asarray(each, dtype=np.float64) for each in (true, generated))
    if true.ndim != 2 or generated.ndim != 2 or true.shape[1] != generated.shape[1]:
        raise ShapeError(f"series must be (time, dim) and of one dim, got {true.shape} and {generated.shape}")
    return true, generated


def _with_floor(
    name: str, measure: Callable[[Array, Array], float], true: Array, other: Array, **settings: Any
) -> Measure:
    half = len(true) // 2
    floor = measure(true[:half], true[half : 2 * half])
    return Measure(name, measure(true, other), {"T": len(other), **settings}, floor)


def binned_divergence(
    true: Float[Array, "time dim"], generated: Float[Array, "time dim"], *, bins: int = 30, prior: float = 1e-5
) -> float:
    """KL(true ‖ generated) of histograms, for dim ≤ 5: D_stsp.

    Each dimension runs over [min − 0.1σ, max + 0.1σ] of the true series in `bins` bins; points outside are dropped;
    p̂ = (count + a)/(Σ count + a·bins^dim). NaN where the orbit is not finite or has no point inside.

    Source: GTF (arXiv 2306.04406), appendix and its code.
    """
    true, generated = _pair(true, generated)
    if not np.isfinite(generated).all():
        return math.nan
    low, high = true.min(0) - 0.1 * true.std(0), true.max(0) + 0.1 * true.std(0)
    size = bins ** true.shape[1]

    def histogram(series: Array) -> Array:
        cell = np.floor((series - low) / (high - low) * bins).astype(np.int64)
        cell = cell[((cell >= 0) & (cell < bins)).all(1)]
        return np.bincount(np.ravel_multi_index(tuple(cell.T), (bins,) * true.shape[1]), minlength=size)

    theirs, ours = histogram(true), histogram(generated)
    if not ours.sum():
        return math.nan
    p = (theirs + prior) / (theirs.sum() + prior * size)
    q = (ours + prior) / (ours.sum() + prior * size)
    return float((p * np.log(p / q)).sum())


def mixture_divergence(
    true: Float[Array, "time dim"],
    generated: Float[Array, "time dim"],
    *,
    variance: float = 1.0,
    points: int = 10_000,
    samples: int = 1000,
    seed: int = 0,
) -> float:
    """KL(true ‖ generated) of Gaussian mixtures with a component at each of the first `points`, by Monte Carlo.

    For more dimensions than histograms bear. Samples of zero likelihood under either are dropped; NaN where the
    orbit is not finite.

    Source: GTF (arXiv 2306.04406), appendix and its code.
    """
    true, generated = _pair(true, generated)
    true, generated = true[:points], generated[:points]
    if not np.isfinite(generated).all():
        return math.nan
    rng = np.random.default_rng(seed)
    drawn = true[rng.integers(0, len(true), samples)]
    drawn = drawn + math.sqrt(variance) * rng.standard_normal(drawn.shape)

    def log_density(centres: Array) -> Array:
        squares = torch.cdist(torch.from_numpy(drawn), torch.from_numpy(centres)).square()
        return (torch.logsumexp(-squares / (2 * variance), 1) - math.log(len(centres))).numpy()

    difference = log_density(true) - log_density(generated)
    return float(difference[np.isfinite(difference)].mean())


def smoothed_spectrum(series: Float[Array, "time dim"], smoothing: float = 20.0) -> Float[Array, "frequency dim"]:
    """The power spectrum of each dimension's z-scores, smoothed over frequency bins and summing to 1.

    A Gaussian of standard deviation `smoothing` bins and radius 4σ, edges mirrored half-sample symmetric. A series
    that does not vary has a spectrum of NaN.
    """
    series = np.asarray(series, dtype=np.float64)
    deviation = series.std(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(deviation > 1e-12, (series - series.mean(0)) / deviation, np.nan)
    power = np.abs(np.fft.rfft(scaled, axis=0)) ** 2
    if smoothing > 0:
        radius = int(4 * smoothing + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / smoothing) ** 2)
        padded = np.pad(power, ((radius, radius), (0, 0)), mode="symmetric")
        columns = [np.convolve(column, kernel / kernel.sum(), mode="valid") for column in padded.T]
        power = np.stack(columns, axis=1)
    power = np.clip(power, 0, None)
    return power / power.sum(0)


def spectral_hellinger(
    true: Float[Array, "time dim"], generated: Float[Array, "time dim"], *, smoothing: float = 20.0
) -> float:
    """D_H: H = √(1 − Σ√(p q)) of the smoothed spectra, averaged over dimensions; in [0, 1].

    Series of unequal length are cut to the shorter. NaN where the orbit is not finite; a dimension that does not
    vary counts as 1. Depends on length and `smoothing`: compare only at equal ones.

    Source: GTF (arXiv 2306.04406), appendix and its code.
    """
    true, generated = _pair(true, generated)
    length = min(len(true), len(generated))
    true, generated = true[:length], generated[:length]
    if not np.isfinite(generated).all():
        return math.nan
    p, q = smoothed_spectrum(true, smoothing), smoothed_spectrum(generated, smoothing)
    overlap = np.nan_to_num(np.sqrt(p * q).sum(0), nan=0.0)
    return float(np.sqrt(np.clip(1 - overlap, 0, None)).mean())


def state_space_divergence(true: Array, generated: Array, *, bins: int = 30) -> Measure:
    """`binned_divergence` as a `Measure`; its floor is one half of the truth against the other."""
    return _with_floor(
        "D_stsp", lambda a, b: binned_divergence(a, b, bins=bins), true, generated, bins=bins, range="±0.1σ"
    )


def mixture_state_space_divergence(true: Array, generated: Array, *, variance: float = 1.0) -> Measure:
    """`mixture_divergence` as a `Measure`."""
    return _with_floor(
        "D_stsp (mixture)",
        lambda a, b: mixture_divergence(a, b, variance=variance),
        true,
        generated,
        variance=variance,
        samples=1000,
    )


def spectral_distance(true: Array, generated: Array, *, smoothing: float = 20.0) -> Measure:
    """`spectral_hellinger` as a `Measure`."""
    return _with_floor(
        "D_H", lambda a, b: spectral_hellinger(a, b, smoothing=smoothing), true, generated, smoothing=smoothing
    )


@torch.no_grad()
def prediction_error(
    model: DynamicsModel, data: Float[Tensor, "time observed"], steps: int = 20, *, points: int = 2000
) -> tuple[Float[Array, " runs"], float]:
    """PE(n): the mean squared error n steps ahead of each of `points` test points, and that of persistence.

    The latent state is inferred at the point itself. A diverged run has NaN.
    """
    starts = torch.linspace(0, len(data) - steps - 1, min(points, len(data) - steps), device=data.device).long()
    state = model.first(data[starts].expand(model.runs, -1, -1))
    ahead = model.observe(generate(model, state, steps)[:, -1])
    truth = data[starts + steps]
    error = (ahead - truth).square().mean((1, 2))
    return error.double().cpu().numpy(), float((data[starts] - truth).square().mean())


@torch.no_grad()
def lyapunov_spectrum(
    model: DynamicsModel,
    orbit: Float[Tensor, "runs time latent"],
    *,
    step: float = 1.0,
    count: int | None = None,
    transient: int = 100,
) -> Float[Array, "runs count"]:
    """The `count` largest Lyapunov exponents of each run along its own orbit, per unit of time.

        Q_0 = I, Q_{t+1} R_t = J_t Q_t, λ_i = 1/(T Δt) Σ_t log|R_t,ii| after the transient.

    Computed in float64. A run whose orbit is not finite has NaN.

    Source: GTF (arXiv 2306.04406), appendix; Benettin et al. 1980.
    """
    runs, time, latent = orbit.shape
    count = latent if count is None else count
    alive = orbit.flatten(1).isfinite().all(1)
    orbit = orbit.nan_to_num(0.0).cpu().double()
    weights = tuple(weight.detach().cpu().double() for weight in model.weights())
    frame = torch.eye(latent, count, dtype=torch.float64).expand(runs, -1, -1)
    total = torch.zeros(runs, count, dtype=torch.float64)
    for begin in range(0, time, 512):
        piece = orbit[:, begin : begin + 512]
        jacobians = model.cell.affine(weights, model.cell.regions(weights, piece))[0]
        for t in range(piece.shape[1]):
            frame, stretch = torch.linalg.qr(jacobians[:, t] @ frame)
            if begin + t >= transient:
                total += stretch.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300).log()
    exponents = total / (max(1, time - transient) * step)
    exponents[~alive.cpu()] = math.nan
    return exponents.numpy()
