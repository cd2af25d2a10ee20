"""What S4 and S4D share: a fixed linear system per feature, a skip, and the layer's output part.

Inside a block of time steps the system is a convolution, between blocks a recurrence (`ops/state_space.py`); one
step is the recurrence itself. Complex parameters are stored as pairs of real numbers (…, 2), so that optimisers,
casts and files see real tensors only; so are states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer
from ostinato.ops.checks import accumulation_dtype, own_precision
from ostinato.ops.state_space import Block, apply_blocks

OUTPUTS = ("glu", "none")


def as_pairs(x: Complex[Tensor, " ..."]) -> Float[Tensor, "... 2"]:
    """Real and imaginary part along a new last axis, in the default type: how complex parameters are stored."""
    return torch.view_as_real(x.resolve_conj()).to(torch.get_default_dtype()).clone()


def from_pairs(x: Float[Tensor, "... 2"]) -> Complex[Tensor, " ..."]:
    """The complex numbers of `as_pairs`; half precision becomes complex64."""
    wide = x.to(accumulation_dtype(x.dtype))
    return torch.complex(wide[..., 0], wide[..., 1])


class TimeInvariantState(NamedTuple):
    """The state x of every feature: real and imaginary parts of one of each pair of conjugate coordinates."""

    coordinates: Float[Tensor, "batch d_model half 2"]


class TimeInvariant(Mixer):
    """y = C x + D u per feature, then the output part: GELU, Linear(d → 2d), gated linear unit.

    Subclasses define `block` (the maps of several steps) and `advance` (one step).
    """

    rate: float
    """Multiplies every Δ: 2 for a sequence sampled half as often as the one trained on."""

    def __init__(self, d_model: int, d_state: int, output: str, block_length: int, rate: float) -> None:
        super().__init__(d_model)
        if output not in OUTPUTS:
            raise ConfigurationError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        if d_state < 2 or d_state % 2:
            raise ConfigurationError(f"d_state must be even and positive, got {d_state}")
        if block_length < 1 or rate <= 0:
            raise ConfigurationError(f"block_length and rate must be positive, got {block_length} and {rate}")
        self.pairs = d_state // 2
        self.block_length, self.rate = block_length, rate
        self.skip = nn.Parameter(torch.randn(d_model))
        self.to_output = nn.Linear(d_model, 2 * d_model) if output == "glu" else None

    def block(self, length: int) -> Block:
        """The system's maps over `length` steps."""
        raise NotImplementedError(f"{type(self).__name__} does not define block")

    def advance(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: (batch, d_model) inputs and (batch, d_model, size) real coordinates, both also out."""
        raise NotImplementedError(f"{type(self).__name__} does not define advance")

    def initial_state(self, batch_size: int) -> TimeInvariantState:
        """Zeros."""
        return TimeInvariantState(self.zeros(batch_size, self.d_model, self.pairs, 2))

    def mix(self, x: Tensor, state: TimeInvariantState, reset: Tensor | None) -> tuple[Tensor, TimeInvariantState]:
        """The system over the whole sequence, the skip, the output part."""
        u = x.to(self.state_dtype)
        coordinates = state.coordinates.flatten(-2)
        with own_precision(x):
            if x.shape[1] == 1:
                if reset is not None:
                    coordinates = coordinates.masked_fill(reset.unsqueeze(-1), 0)
                y, coordinates = self.advance(u[:, 0], coordinates)
                y = y.unsqueeze(1)
            else:
                y, coordinates = apply_blocks(self.block, u, coordinates, reset=reset, length=self.block_length)
            y = (y + self.skip.to(y.dtype) * u).to(x.dtype)
        if self.to_output is not None:
            y = F.glu(self.to_output(F.gelu(y)), dim=-1)
        return y, TimeInvariantState(coordinates.unflatten(-1, (self.pairs, 2)))
