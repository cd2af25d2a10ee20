"""The sequence autoencoder: a sequence read into one vector, and every token told again from it.

What a backbone can put into its last output, by itself: the decoder is a small network at each position, which sees
that vector, the position, and nothing else.

Source: MAD (Poli et al. 2024, arXiv 2403.17844), the compression task and the authors' autoencoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.models.backbone import Backbone
from ostinato.models.plan import Plan


def sinusoids(positions: int, dim: int, like: Tensor) -> Float[Tensor, "positions dim"]:
    """sin(p w_i), then cos(p w_i), w_i = 10000^{−i / (dim/2 − 1)} for i < dim/2; in the type and place of `like`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, the sines and the cosines each side by side.
    """
    half = dim // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(positions, device=like.device).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class SequenceAutoencoder(nn.Module):
    """Token ids (batch, time) -> logits (batch, time, vocab_size) of the same tokens, from the last output alone.

        z = backbone(embedding(tokens))_T,   logits_p = W MLP(z + sinusoids_p)

    with MLP of two layers, each RMSNorm, linear, GELU, as wide as the model, and a norm before W.

    Args:
        vocab_size: number of tokens.
        d_model, plan, depth, channel_mixer: see `Backbone`; d_model must be even.

    Raises `ConfigurationError` for a size below 1 or an odd width, and what `Backbone` raises.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        plan: str | Plan,
        depth: int | None = None,
        *,
        channel_mixer: str | None = "swiglu",
    ) -> None:
        super().__init__()
        if vocab_size < 1 or d_model < 2 or d_model % 2:
            raise ConfigurationError(
                f"vocab_size must be positive and d_model even and positive, got {vocab_size} and {d_model}"
            )
        self.vocab_size, self.d_model = vocab_size, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.backbone = Backbone(d_model, plan, depth, channel_mixer=channel_mixer)
        layers = [part for _ in range(2) for part in (nn.RMSNorm(d_model), nn.Linear(d_model, d_model), nn.GELU())]
        self.decoder = nn.Sequential(*layers, nn.RMSNorm(d_model), nn.Linear(d_model, vocab_size))

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """The backbone's, before the first token."""
        return self.backbone.initial_state(batch_size)

    def encode(
        self, tokens: Int[Tensor, "batch time"], state: Any = None, *, reset: Bool[Tensor, "batch time"] | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], tuple[Any, ...]]:
        """The vector z, and the state after the last token."""
        y, state = self.backbone(self.embedding(tokens), state, reset=reset, tokens=tokens)
        return y[:, -1], state

    def decode(self, code: Float[Tensor, "batch d_model"], positions: int) -> Float[Tensor, "batch positions vocab"]:
        """The logits of so many tokens."""
        return self.decoder(code.unsqueeze(1) + sinusoids(positions, self.d_model, code))

    def forward(
        self, tokens: Int[Tensor, "batch time"], state: Any = None, *, reset: Bool[Tensor, "batch time"] | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], tuple[Any, ...]]:
        """The logits of all tokens that were passed, and the state after the last."""
        code, state = self.encode(tokens, state, reset=reset)
        return self.decode(code, tokens.shape[1]), state
