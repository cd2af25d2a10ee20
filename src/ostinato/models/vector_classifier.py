"""The vector classifier: a linear encoder, normed blocks, and a linear head that labels every step.

    post:  x ← norm(x + Dropout(mixer(x)));   y = W x + b
    pre:   x ← x + Dropout(mixer(norm(x)));   y = W norm(x) + b

A layer norm scales every step by itself: a loud step and a quiet one leave it equally loud. Where amplitude carries
the message (an impulse in noise), take the batch norm, which scales every channel by what is usual for it.

Source: post-norm, the networks of SelectivBench (arXiv 2601.12598), section on models, and its authors' code;
pre-norm and batch norm, S4 (arXiv 2111.00396), appendix D.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError, StateError
from ostinato.layers.sequence_norm import SequenceBatchNorm
from ostinato.layers.swiglu import SwiGLU
from ostinato.mixers.base import Mixer
from ostinato.models.plan import Plan, parse_plan
from ostinato.ops.checks import check_sequence

NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": SequenceBatchNorm}


class _Block(nn.Module):
    """A mixer with its norm, and perhaps a channel mixer with another."""

    def __init__(
        self, mixer: Mixer, channel_mixer: nn.Module | None = None, dropout: float = 0.0, norm: str = "layer"
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, NORMS[norm](mixer.d_model)
        self.channel_mixer = channel_mixer
        self.channel_norm = NORMS[norm](mixer.d_model) if channel_mixer is not None else None
        self.dropout = nn.Dropout(dropout)


class PostNormBlock(_Block):
    """One layer: the norm stands after the sum of the input and the mixer's output.

    With a channel mixer there follows a second sum and norm, x ← norm(x + Dropout(channel_mixer(x))).
    """

    def forward(
        self, x: Float[Tensor, "batch time d_model"], state: Any = None, *, reset: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """The block's output, and the mixer's state."""
        mixed, state = self.mixer(x, state, reset=reset)
        x = self.norm(x + self.dropout(mixed))
        if self.channel_mixer is not None and self.channel_norm is not None:
            x = self.channel_norm(x + self.dropout(self.channel_mixer(x)))
        return x, state


class PreNormBlock(_Block):
    """One layer: the mixer reads the normed input, and its output is added to the input itself.

    With a channel mixer there follows x ← x + Dropout(channel_mixer(norm(x))).
    """

    def forward(
        self, x: Float[Tensor, "batch time d_model"], state: Any = None, *, reset: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """The block's output, and the mixer's state."""
        mixed, state = self.mixer(self.norm(x), state, reset=reset)
        x = x + self.dropout(mixed)
        if self.channel_mixer is not None and self.channel_norm is not None:
            x = x + self.dropout(self.channel_mixer(self.channel_norm(x)))
        return x, state


BLOCKS: dict[str, type[PostNormBlock] | type[PreNormBlock]] = {"post": PostNormBlock, "pre": PreNormBlock}


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
        norm: "layer", or "batch": over batch and time, with running averages in evaluation, where alone parts of a
            sequence give what the whole gives.
        norm_place: "post", after the sums, or "pre", before the mixers and once more before the head.

    Raises:
        ConfigurationError: sizes below 1, a probability that is none, an unknown norm or place.
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
        norm: str = "layer",
        norm_place: str = "post",
    ) -> None:
        super().__init__()
        if features < 1 or num_classes < 1:
            raise ConfigurationError(f"features and num_classes must be positive, got {features} and {num_classes}")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is a probability in [0, 1), got {dropout}")
        if norm not in NORMS or norm_place not in BLOCKS:
            raise ConfigurationError(
                f"norm is one of {', '.join(NORMS)} and norm_place one of {', '.join(BLOCKS)}, "
                f"got {norm!r} and {norm_place!r}"
            )
        self.features = features
        self.encoder = nn.Linear(features, d_model)
        blocks = []
        for layer in parse_plan(plan).to_depth(depth):
            channels = SwiGLU(d_model, swiglu * d_model) if swiglu is not None else None
            blocks.append(BLOCKS[norm_place](layer.build(d_model), channels, dropout, norm))
        self.blocks = nn.ModuleList(blocks)
        self.norm = NORMS[norm](d_model) if norm_place == "pre" else None
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
        return self.head(y if self.norm is None else self.norm(y)), tuple(after)
