"""`long_convolution`: y_t = Σ_s k_s ⊙ u_{t−s}, a causal filter of any length, every channel for itself.

The engine of S4, S4D and LSSL, whose kernels are as long as the sequence, and of any finite impulse response.
As a recurrence it is a shift register: the state is the last L − 1 inputs. In parallel it is a product of
spectra.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import DtypeError, ShapeError
from ostinato.ops.checks import accumulation_dtype, check_finite, check_reset, check_sequence, check_shape
from ostinato.ops.routes import Engine

_engine = Engine("long_convolution")


def long_convolution_step(
    inputs: Float[Tensor, "batch channels"],
    kernel: Float[Tensor, "taps channels"],
    state: Float[Tensor, "batch past channels"],
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch past channels"]]:
    """One step, the definition: y = Σ_s k_s ⊙ u_{t−s}; the state is the last L − 1 inputs, oldest first."""
    window = torch.cat([state, inputs.unsqueeze(1)], dim=1)
    return (window * kernel.flip(0)).sum(1), window[:, 1:]


@_engine.route("reference")
def _reference(inputs: Tensor, kernel: Tensor, state: Tensor | None, reset: Tensor | None) -> Tensor:
    batch, time, channels = inputs.shape
    past = inputs.new_zeros(batch, kernel.shape[0] - 1, channels) if state is None else state
    outputs = []
    for t in range(time):
        if reset is not None:
            past = past.masked_fill(reset[:, t, None, None], 0)
        y, past = long_convolution_step(inputs[:, t], kernel, past)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def _one_step(inputs: Tensor, kernel: Tensor, state: Tensor | None, reset: Tensor | None) -> str | None:
    return "a single step needs no transform" if inputs.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
def _parallel(inputs: Tensor, kernel: Tensor, state: Tensor | None, reset: Tensor | None) -> Tensor:
    time = inputs.shape[1]
    if state is not None and state.shape[1]:
        past = state.shape[1]
        inputs = torch.cat([state, inputs], dim=1)
        if reset is not None:
            reset = torch.cat([torch.zeros_like(reset[:, :1]).expand(-1, past), reset], dim=1)
    if reset is None:
        return _by_spectra(inputs, kernel)[:, -time:]
    return _by_halves(inputs, kernel, reset)[:, -time:]


def _by_spectra(inputs: Tensor, kernel: Tensor) -> Tensor:
    """The causal convolution as a product of spectra, padded so that nothing wraps around."""
    time = inputs.shape[1]
    kernel = kernel[:time]
    size = fast_length(time + kernel.shape[0] - 1)
    spectrum = torch.fft.rfft(inputs, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :time]


def _by_halves(inputs: Tensor, kernel: Tensor, reset: Tensor) -> Tensor:
    """The convolution in which nothing crosses a reset.

    Time is halved again and again. What the left half of a block gives to the right half is one product of
    spectra; a pair (i in the left, j in the right) is free of resets exactly when no reset lies after i in the
    left and none up to j in the right, so masking the inputs and the outputs of that product is exact. The
    shapes do not depend on where the resets are.
    """
    batch, time, channels = inputs.shape
    levels = (time - 1).bit_length()
    padding = (1 << levels) - time
    u = torch.nn.functional.pad(inputs, (0, 0, 0, padding))
    marks = torch.nn.functional.pad(reset, (0, padding)).long()
    y = u * kernel[0]
    for level in range(levels):
        half = 1 << level
        taps = kernel[: 2 * half]
        if taps.shape[0] == 1:
            break
        blocks = u.reshape(batch, -1, 2, half, channels)
        flags = marks.reshape(batch, -1, 2, half)
        after = flags[:, :, 0].flip(-1).cumsum(-1).flip(-1) - flags[:, :, 0]
        left = blocks[:, :, 0] * (after == 0).unsqueeze(-1)
        upto = flags[:, :, 1].cumsum(-1)
        # Circular of length 2·half: only outputs before `half` are wrapped into, and they are not wanted.
        spectrum = torch.fft.rfft(left, n=2 * half, dim=2) * torch.fft.rfft(taps, n=2 * half, dim=0)
        right = torch.fft.irfft(spectrum, n=2 * half, dim=2)[:, :, half:] * (upto == 0).unsqueeze(-1)
        y = y + torch.stack([torch.zeros_like(right), right], dim=2).reshape(y.shape)
    return y[:, :time]


def fast_length(size: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least `size`: lengths for which Fourier transforms are fast."""
    best = 1 << (int(size) - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three
            while two < size:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def long_convolution(
    inputs: Float[Tensor, "batch time channels"],
    kernel: Float[Tensor, "taps channels"],
    state: Float[Tensor, "batch past channels"] | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch past channels"]]:
    """y_t = Σ_{s=0}^{L−1} k_s ⊙ u_{t−s}, in O(T log T) by Fourier transform.

    Args:
        inputs: u.
        kernel: k; tap s multiplies the input of s steps ago. It may be longer or shorter than the sequence.
        state: the L − 1 inputs before the first, oldest first; zeros if None.
        reset: True marks the first step of a new sequence: no input from before it is seen. The transform then
            takes O(T log² T).
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The outputs, in the type of `inputs`, and the last L − 1 inputs (zero where they lie before the last
        reset). Half precision is computed, and its state kept, in float32; memory is linear in T up to a
        logarithm.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        NonFiniteError: with `validate`.

    Source: LSSL (arXiv 2110.13985), section 3; S4 (arXiv 2111.00396), section 2.4.
    """
    check_sequence("inputs", inputs, "batch time channels")
    check_sequence("kernel", kernel, "taps channels")
    for name, tensor in (("inputs", inputs), ("kernel", kernel)):
        if tensor.is_complex():
            raise DtypeError(f"{name} must be real, got {tensor.dtype}; convolve the parts one by one")
    batch, time, channels = inputs.shape
    taps = kernel.shape[0]
    if kernel.shape[1] != channels:
        raise ShapeError(f"kernel has {kernel.shape[1]} channels, inputs have {channels}")
    check_reset(reset, batch, time)
    if state is not None:
        check_shape("state", state, (batch, taps - 1, channels), "batch past channels")
    if validate:
        check_finite(inputs=inputs, kernel=kernel, state=state)

    dtype = torch.promote_types(accumulation_dtype(inputs.dtype), accumulation_dtype(kernel.dtype))
    u, k = inputs.to(dtype), kernel.to(dtype)
    past = None if state is None else state.to(dtype)
    outputs = _engine(u, k, past, reset)

    before = u.new_zeros(batch, taps - 1, channels) if past is None else past
    kept = torch.cat([before, u], dim=1)[:, time:]
    if reset is not None and taps > 1:
        later = reset.long().flip(1).cumsum(1).flip(1)
        # An input is forgotten when a reset lies after it; every input of the old state, when there is any.
        after = torch.cat([later[:, :1].expand(-1, taps - 1), later - reset.long()], dim=1)[:, time:]
        kept = kept * (after == 0).unsqueeze(-1)
    return outputs.to(inputs.dtype), kept
