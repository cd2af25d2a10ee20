"""A gated convolution: a few steps of the past through a filter, times a second look at the step itself.

Source: Based (arXiv 2402.18668), BaseConv; in the form of Just read twice (arXiv 2407.05483), appendix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.parts import ShortConvolution


class ConvolutionState(NamedTuple):
    """The inputs that the filter will need: all the memory that there is."""

    past: Float[Tensor, "batch taps channels"]


class GatedConvolution(Mixer):
    """[a, b] = W_in x;   y = W_o [silu(conv(a)) ⊙ b], a depthwise causal convolution.

    Args:
        d_model: width.
        conv: taps of the convolution.
        expand: width of a and of b over d_model.
    """

    traits = Traits(
        engine="short_convolution",
        transition="fixed shift",
        state="taps × channels",
        channel_mixing=True,
        paper="Based (arXiv 2402.18668)",
    )

    def __init__(self, d_model: int, conv: int = 3, expand: int = 2) -> None:
        super().__init__(d_model)
        self.to_input = nn.Linear(d_model, 2 * expand * d_model, bias=False)
        self.convolution = ShortConvolution(expand * d_model, conv)
        self.to_output = nn.Linear(expand * d_model, d_model, bias=False)

    def initial_state(self, batch_size: int) -> ConvolutionState:
        """Zeros."""
        return ConvolutionState(self.convolution.initial_state(batch_size))

    def mix(self, x: Tensor, state: ConvolutionState, reset: Tensor | None) -> tuple[Tensor, ConvolutionState]:
        """The filter, over the whole sequence."""
        filtered, gate = self.to_input(x).chunk(2, dim=-1)
        filtered, past = self.convolution(filtered, state.past, reset)
        return self.to_output(F.silu(filtered) * gate), ConvolutionState(past)
