"""Hedgehog's learned feature map of queries and keys: what stands in for the exponential in linearised attention.

Source: Hedgehog (arXiv 2402.04347), section 4.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.mixers.heads import widened


def feature_weights(heads: int, dim: int) -> nn.Parameter:
    """W of every head, (heads, dim, dim): the identity, from which learning starts."""
    return nn.Parameter(torch.eye(dim).expand(heads, -1, -1).clone())


def hedgehog(
    x: Float[Tensor, "batch time heads dim"], weight: Float[Tensor, "heads dim dim"]
) -> Float[Tensor, "batch time heads twice_dim"]:
    """φ(x) = softmax([x W, −x W]) per head: positive, and its 2 dim channels sum to one. In float32 at least."""
    turned = torch.einsum("bthd,hde->bthe", widened(x), widened(weight))
    return torch.cat([turned, -turned], dim=-1).softmax(-1)
