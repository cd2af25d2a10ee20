"""The second-order Taylor features of exp(q·k / √f): positive, and linear attention with them is near softmax.

    φ(x) = [1, x / f^{1/4}, vec(x xᵀ) / (√2 √f)],     φ(q)·φ(k) = 1 + s + s²/2  with  s = q·k / √f

1 + s + s²/2 = ((1 + s)² + 1) / 2 is at least ½, so a normaliser made of it is never 0.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError


def taylor_width(dim: int) -> int:
    """1 + f + f²: how many features there are of f numbers. Raises `ConfigurationError` for f below 1."""
    if dim < 1:
        raise ConfigurationError(f"Taylor features need at least one number, got dim {dim}")
    return 1 + dim + dim * dim


def taylor_features(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... features"]:
    """φ(x); the square is whole, not its triangle. Half precision comes out in float32.

    Source: Based (arXiv 2402.18668), section 3; Just read twice (arXiv 2407.05483), appendix.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    dim = wide.shape[-1]
    square = (wide.unsqueeze(-1) * wide.unsqueeze(-2)).flatten(-2) / (math.sqrt(2) * math.sqrt(dim))
    return torch.cat([torch.ones_like(wide[..., :1]), wide / dim**0.25, square], dim=-1)
