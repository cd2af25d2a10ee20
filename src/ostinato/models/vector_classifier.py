"""The vector classifier: a linear encoder, post-norm blocks, and a linear head that labels every step.

    x ← LayerNorm(x + Dropout(mixer(x)));   y = W x + b

Source: the networks of SelectivBench (arXiv 2601.12598), section on models, and its authors' code.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError, StateError
from ostinato.layers.swiglu import SwiGLU
from ostinato.mixers.base import Mixer
from ostinato.models.plan import Plan, parse_plan
from ostinato.ops.checks import check_sequence


class PostNormBlock(nn.Module):
    """One layer: the norm stands after the sum of the input and the mixer's output.

    With a channel mixer there follows a second sum and norm, x ← LayerNorm(x + Dropout(channel_mixer(x))).
    """

    def __init__(self, mixer: Mixer, channel_mixer: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, nn.LayerNorm(mixer.d_model)
        self.channel_mixer = channel_mixer
        self.channel_norm = nn.LayerNorm(mixer.d_model) if channel_mixer is not None else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch time d_model"], state: Any = None, *, reset: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """The block's output, and the mixer's state."""
        mixed, state = self.mixer(x, state, reset=reset)
        x = self.norm(x + self.dropout(mixed))
        if self.channel_mixer is not None and self.channel_norm is not None:
            x = self.channel_norm(x + self.dropout(self.channel_mixer(x)))
        return x, state


class VectorClassifier(nn.Module):
    """Vectors (batch, time, features) -> logits (batch, time, num_classes) that carries a state.

    Args:
        features: width of the input vectors.
        num_classes: labels a step can have.
        d_model: width.
        plan, depth: which mixers, and how many layers (see `ostinato.models.plan`).
        swiglu: inner width over d_model of a SwiGLU after every mixer; None, as in the paper's recurrent models, for
            mixers alone.
        dropout: probability, before the sums.

    Raises:
        ConfigurationError: sizes below 1, a probability that is none.
        PlanError, UnknownNameError: the plan.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        d_model: int,
        plan: str | Plan,
        depth: int | None = None,
        *,
        swiglu: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if features < 1 or num_classes < 1:
            raise ConfigurationError(f"features and num_classes must be positive, got {features} and {num_classes}")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is a probability in [0, 1), got {dropout}")
        self.features = features
        self.encoder = nn.Linear(features, d_model)
        blocks = []
        for layer in parse_plan(plan).to_depth(depth):
            channels = SwiGLU(d_model, swiglu * d_model) if swiglu is not None else None
            blocks.append(PostNormBlock(layer.build(d_model), channels, dropout))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(d_model, num_classes)

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixers, first layer first."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """The mixers' states before the first step, first layer first."""
        return tuple(mixer.initial_state(batch_size) for mixer in self.mixers)

    def forward(
        self,
        x: Float[Tensor, "batch time features"],
        state: Any = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time classes"], tuple[Any, ...]]:
        """The logits of every step's label, and the state after the last.

        Raises:
            ShapeError, DtypeError: x or reset does not fit.
            StateError: the state is of another network or batch size.
        """
        check_sequence("x", x, "batch time features")
        if x.shape[-1] != self.features:
            raise ShapeError(f"this network reads vectors of width {self.features}, x has shape {tuple(x.shape)}")
        if state is None:
            state = (None,) * len(self.blocks)
        elif not isinstance(state, (tuple, list)) or len(state) != len(self.blocks):
            raise StateError(f"the state of this network is a tuple of {len(self.blocks)} mixers' states")
        y, after = self.encoder(x), []
        for block, entering in zip(self.blocks, state, strict=True):
            y, leaving = block(y, entering, reset=reset)
            after.append(leaving)
        return self.head(y), tuple(after)
