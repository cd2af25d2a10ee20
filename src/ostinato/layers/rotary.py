"""Rotary position embedding: queries and keys are turned by an angle proportional to their position.

The pair (x_i, x_{i + d/2}) is a point in the plane, turned by p · base^{−2i/d} at position p. A product of a
query at p and a key at q then depends on p − q alone.

Source: RoFormer (arXiv 2104.09864), section 3.4, with the pairing of GPT-NeoX and Llama (halves, not
neighbours).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.checks import accumulation_dtype


def positions(
    start: Int[Tensor, " batch"], time: int, reset: Bool[Tensor, "batch time"] | None = None
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, " batch"]]:
    """The position of every step in its own sequence, and the position that comes next.

    Args:
        start: the position of the first step of each row: how many steps of its sequence went before.
        time: the number of steps.
        reset: True marks the first step of a new sequence, where the count starts again at 0.
    """
    index = torch.arange(time, device=start.device)
    counted = start.unsqueeze(1) + index
    if reset is not None:
        began = torch.where(reset, index, -1).cummax(dim=1).values
        counted = torch.where(began >= 0, index - began, counted)
    return counted, counted[:, -1] + 1


def rotate(
    x: Float[Tensor, "batch time heads dim"], positions: Int[Tensor, "batch time"], base: float = 10000.0
) -> Float[Tensor, "batch time heads dim"]:
    """x turned to its positions: (x₁, x₂) -> (x₁ cos φ − x₂ sin φ, x₂ cos φ + x₁ sin φ), φ_i = p · base^{−2i/dim}.

    Angles are computed in float64 where the device has it (in float32 they are off by 0.004 radians at
    position 100 000), the rotation in float32 for half precision and in the type of x otherwise; the
    output has the type of x.

    Raises `ConfigurationError` if dim is odd.
    """
    check_rotary_dim(x.shape[-1])
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    frequency = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = positions.to(exact)[:, :, None, None] * frequency
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = angle.cos().to(wide.dtype), angle.sin().to(wide.dtype)
    first, second = wide[..., :half], wide[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def check_rotary_dim(dim: int) -> None:
    """Raise `ConfigurationError` if a head of this width cannot be rotated."""
    if dim % 2:
        raise ConfigurationError(f"rotary embedding turns pairs of channels: the head's width must be even, got {dim}")
