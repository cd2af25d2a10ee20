"""The token classifier: an embedding, a backbone, and a linear head that labels every position.

The model of the state-tracking experiments: small, and with nothing that a result could be owed to but the mixer.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.models.backbone import Backbone
from ostinato.models.plan import Plan


class TokenClassifier(nn.Module):
    """Token ids (batch, time) -> logits (batch, time, num_classes) that carries a state.

    Args:
        vocab_size: number of input tokens.
        num_classes: labels a position can have; None takes vocab_size.
        d_model, plan, depth, channel_mixer: see `Backbone`.

    The embedding starts at N(0, 1), the scale of the normed branches beside it; the head has a bias and starts as
    PyTorch's linear layers do. Raises `ConfigurationError` for sizes below 1 and what `Backbone` raises.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        plan: str | Plan,
        depth: int | None = None,
        *,
        num_classes: int | None = None,
        channel_mixer: str | None = "swiglu",
    ) -> None:
        super().__init__()
        num_classes = vocab_size if num_classes is None else num_classes
        if vocab_size < 1 or num_classes < 1:
            raise ConfigurationError(f"vocab_size and num_classes must be positive, got {vocab_size} and {num_classes}")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.backbone = Backbone(d_model, plan, depth, channel_mixer=channel_mixer)
        self.head = nn.Linear(d_model, num_classes)

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """The backbone's, before the first token."""
        return self.backbone.initial_state(batch_size)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: Any = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time classes"], tuple[Any, ...]]:
        """The logits of every position's label, and the state after the last.

        `context` is what mixers take besides (see `Backbone.forward`).
        """
        y, state = self.backbone(self.embedding(tokens), state, reset=reset, tokens=tokens, **context)
        return self.head(y), state
