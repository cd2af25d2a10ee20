"""The loss of a language model that reads its prompt as a whole: masked tokens there, next tokens after it.

    L = L_next(positions M … N − 1) + w · L_masked(masked positions of the prefix),   w = 0.25

Within the prefix a next token is in sight: its loss would teach to copy. Only masked places are asked there.

Source: Just read twice (arXiv 2407.05483), section 4.2 and the authors' code.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ostinato.errors import ConfigurationError


def prefix_lm_loss(
    logits: Float[Tensor, "batch time vocab"],
    tokens: Int[Tensor, "batch time"],
    prefix_length: int,
    masked: Bool[Tensor, "batch time"],
    mlm_weight: float = 0.25,
) -> Float[Tensor, ""]:
    """The loss in nats; each of its two parts is a mean over its own positions.

    Args:
        logits: at every position, of what the model read (with masks in it).
        tokens: the sequence without masks.
        prefix_length: M. Position M − 1, which would predict the first token after the prefix, is not asked: the
            model says token i + 1 at position i, from i = M on.
        masked: True where the prefix had a mask; the token itself is asked there.
        mlm_weight: w.

    Raises `ConfigurationError` for a prefix that leaves nothing to predict, or a mask beyond it.
    """
    time = tokens.shape[1]
    if not 0 <= prefix_length < time - 1:
        raise ConfigurationError(f"a prefix of {prefix_length} leaves nothing to predict in {time} tokens")
    # On a GPU the answer would have to be waited for.
    if masked.device.type == "cpu" and bool(masked[:, prefix_length:].any()):
        raise ConfigurationError("masked tokens lie in the prefix alone")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    following = wide[:, prefix_length:-1].flatten(0, 1)
    next_loss = functional.cross_entropy(following, tokens[:, prefix_length + 1 :].flatten())
    each = functional.cross_entropy(wide.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    hidden = torch.where(masked, each, 0.0).sum() / masked.sum().clamp(min=1)
    return next_loss + mlm_weight * hidden


def mask_prefix(
    tokens: Int[Tensor, "batch time"],
    prefix_length: int,
    mask_token: int,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """What the model reads, a share of the prefix masked, and where."""
    draws = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    inside = torch.arange(tokens.shape[1], device=tokens.device) < prefix_length
    masked = (draws < share) & inside
    return tokens.masked_fill(masked, mask_token), masked
