"""The pieces that mixers share: a short convolution that streams, a token shift, norms of heads, gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.ops.checks import product_dtype
from ostinato.ops.delta_rule import unit_length
from ostinato.ops.normalization import GATES, gated_rms_norm, rms_norm
from ostinato.ops.short_convolution import joint_short_convolution, short_convolution


def softplus_inverse(y: Tensor) -> Tensor:
    """x with softplus(x) = y, without overflow: x = y + log(1 − e^{−y})."""
    return y + torch.log(-torch.expm1(-y))


def log_uniform(size: int, low: float, high: float, floor: float = 0.0) -> Tensor:
    """`size` draws of e^{U(log low, log high)}, not below `floor`."""
    return torch.empty(size).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)


def l2_normalize(x: Float[Tensor, "... dim"], eps: float = 1e-6) -> Float[Tensor, "... dim"]:
    """x / √(Σx² + eps) over the last axis, in float32 at least; an all-zero vector stays zero."""
    return unit_length(x, eps)


def linear_together(x: Float[Tensor, "... dim"], *maps: nn.Module) -> list[Tensor]:
    """What each of several narrow linear maps makes of x, by one product: x and its gradient pass memory once.

    The joined weight is filled up to a multiple of eight rows, the least that tensor cores take without detours. A map
    that is more than a matrix (has a bias, is adapted, has hooks that want to see it) computes for itself.
    """
    if not all(type(each) is nn.Linear and each.bias is None and not each._forward_hooks for each in maps):
        return [each(x) for each in maps]
    weights: list[Tensor] = [each.weight for each in maps]  # type: ignore[misc]
    widths = [len(weight) for weight in weights]
    if missing := -sum(widths) % 8:
        weights.append(weights[0].new_zeros(missing, x.shape[-1]))
    return list(F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1))[: len(maps)]


class ShortConvolution(nn.Module):
    """A causal depthwise convolution of a few taps that streams: y_t = Σ_i w_i ⊙ x_{t−i} (+ bias).

    The state is the last width − 1 inputs, (batch, width − 1, channels), oldest first.
    """

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ConfigurationError(f"a convolution needs at least one tap, got width {width}")
        self.channels, self.width = channels, width
        bound = 1 / math.sqrt(width)
        # weight[i] multiplies the input of i steps ago.
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def initial_state(self, batch_size: int) -> Float[Tensor, "batch taps channels"]:
        """Nothing was there before: zeros."""
        return self.weight.new_zeros(batch_size, self.width - 1, self.channels)

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        state: Float[Tensor, "batch taps channels"],
        reset: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch taps channels"]]:
        """The convolved sequence, and the inputs that the next step will need."""
        return short_convolution(x, self.weight, state, bias=self.bias, reset=reset)

    def jointly(
        self,
        parts: Sequence[Float[Tensor, "batch time _"]],
        state: Float[Tensor, "batch taps channels"] | None,
        reset: Bool[Tensor, "batch time"] | None,
        silu: Sequence[bool],
    ) -> tuple[tuple[Float[Tensor, "batch time _"], ...], Float[Tensor, "batch taps channels"]]:
        """`forward` of parts as if they stood side by side, those with `silu` then activated; in parts again."""
        return joint_short_convolution(parts, self.weight, state, bias=self.bias, reset=reset, silu=silu)


class TokenShift(nn.Module):
    """x_{t−1}, zero at the start of a sequence. The state is the last input, (batch, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        state: Float[Tensor, "batch channels"],
        reset: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels"]]:
        """The inputs of one step before, and the last input."""
        previous = torch.cat([state.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)
        if reset is not None:
            previous = previous.masked_fill(reset.unsqueeze(-1), 0)
        return previous, x[:, -1]


class GatedNorm(nn.Module):
    """RMSNorm over the last axis and an optional gate, before or after it.

    gate after norm (GLA, Gated DeltaNet):   y = norm(x) ⊙ act(gate)
    gate before norm (Mamba-2, M²RNN):       y = norm(x ⊙ act(gate))
    """

    def __init__(self, dim: int, *, gate: str | None = "silu", gate_first: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        if gate not in (*GATES, None):
            raise ConfigurationError(f"gate must be 'silu', 'sigmoid' or None, got {gate!r}")
        self.gate, self.gate_first, self.eps = gate, gate_first, eps
        self.norm = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Float[Tensor, "... dim"], gate: Float[Tensor, "... dim"] | None = None) -> Tensor:
        """Normalised and gated, in the type of the weight, or autocast's; computed in float32 at least."""
        weight, eps = self.norm.weight, self.eps
        # x may be a float32 sum that is not yet rounded: it is rounded here, to what the product behind it reads.
        dtype = product_dtype(weight)
        if self.gate is None or gate is None:
            return rms_norm(x, weight, eps, dtype=dtype)
        return gated_rms_norm(x, gate, weight, eps, activation=self.gate, gate_first=self.gate_first, dtype=dtype)
