"""A depthwise convolution that looks both ways: y_t = Σ_{i=−w}^{w} w_i ⊙ x_{t+i} + b."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.ops.sequences import sequence_numbers
from ostinato.ops.short_convolution import short_convolution


class CentredConvolution(nn.Module):
    """`width` taps, as many behind as ahead; beyond the ends of a sequence there are zeros.

    Raises `ConfigurationError` for a width that is even or below 1. Source: Hydra (arXiv 2407.09941), width 7.
    """

    def __init__(self, channels: int, width: int = 7, *, bias: bool = True) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ConfigurationError(f"a centred convolution has an odd number of taps, got width {width}")
        self.width = width
        bound = 1 / math.sqrt(width)
        # weight[i] multiplies the input of width // 2 − i steps ahead, as a causal convolution of what is ahead has it.
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Float[Tensor, "batch time channels"], reset: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time channels"]:
        """The convolved sequence; nothing crosses a reset."""
        reach, time = self.width // 2, x.shape[1]
        if reset is None:
            return short_convolution(F.pad(x, (0, 0, 0, reach)), self.weight, bias=self.bias)[0][:, reach:]
        numbers = sequence_numbers(reset)
        padded, owner = F.pad(x, (0, 0, reach, reach)), F.pad(numbers, (reach, reach), value=-1)
        y = torch.zeros_like(x) if self.bias is None else self.bias.expand_as(x)
        for ahead in range(-reach, reach + 1):
            here = slice(reach + ahead, reach + ahead + time)
            seen = padded[:, here].masked_fill((owner[:, here] != numbers).unsqueeze(-1), 0)
            y = y + self.weight[reach - ahead] * seen
        return y
