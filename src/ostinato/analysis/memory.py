"""How far back a linear state remembers: a ridge readout of the input of d steps ago.

memory_of_delays(*discretize(*hippo_matrix("legs", 64), 1 / 128), delays=(64, 128, 192))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError

_WARM_UP = 0.1
_TRAINED = 2 / 3


def low_passed_noise(steps: int, *, cutoff: float = 0.05, seed: int = 0) -> Float[Tensor, " steps"]:
    """Gaussian noise without frequencies above `cutoff` of the sampling rate, of unit variance; float64."""
    if not 0 < cutoff <= 0.5:
        raise ConfigurationError(f"cutoff must lie in (0, 0.5], the Nyquist frequency, got {cutoff}")
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = torch.fft.rfft(noise)
    spectrum[torch.fft.rfftfreq(steps) > cutoff] = 0
    signal = torch.fft.irfft(spectrum, n=steps)
    return signal / signal.std()


def memory_of_delays(
    transition: Float[Tensor, "size size"],
    inputs: Float[Tensor, " size"],
    *,
    delays: Sequence[int],
    steps: int = 6000,
    cutoff: float = 0.05,
    ridge: float = 1e-6,
    seed: int = 0,
) -> list[float]:
    """R² of reading u_{t−d} linearly from x_t, x_t = Ā x_{t−1} + B̄ u_t, on steps that were not fitted.

    u is `low_passed_noise`. The state's coordinates are scaled to unit variance; the readout is fitted on steps
    from a tenth to two thirds with a penalty of `ridge` times their number, and tested on the last third.

    Raises `ConfigurationError` for delays that reach before the first step fitted. Source: HiPPO (arXiv 2008.07669),
    section 4; LSSL (arXiv 2110.13985), section 5, for what it explains.
    """
    start, split = int(_WARM_UP * steps), int(_TRAINED * steps)
    if not all(0 <= delay <= start for delay in delays):
        raise ConfigurationError(f"delays must lie in 0 … {start}, a tenth of the steps, got {list(delays)}")
    signal = low_passed_noise(steps, cutoff=cutoff, seed=seed)
    states = torch.empty(steps, len(inputs), dtype=torch.float64)
    x = torch.zeros_like(inputs)
    for t, u in enumerate(signal.tolist()):
        x = torch.addmv(inputs * u, transition, x)
        states[t] = x
    if not bool(states.isfinite().all()):
        return [-math.inf] * len(delays)
    states = states / states[start:split].std(0).clamp(min=1e-300)
    fitted, tested = states[start:split], states[split:]
    penalty = ridge * len(fitted) * torch.eye(states.shape[1], dtype=torch.float64)
    factor = torch.linalg.cholesky(fitted.T @ fitted + penalty)
    found = []
    for delay in delays:
        target = signal[start - delay : split - delay].unsqueeze(1)
        readout = torch.cholesky_solve(fitted.T @ target, factor).squeeze(1)
        wanted = signal[split - delay : steps - delay]
        miss = (tested @ readout - wanted).square().mean()
        found.append(float(1 - miss / wanted.var(correction=0)))
    return found
