"""Mixers that read a whole sequence before they say anything: not causal, and without a state.

What they keep of the law (`ostinato.testing.check_whole_mixer` holds each of them to it):

    packed(x₁, x₂, …; reset)  ==  x₁ alone, x₂ alone, …          sequences that share a row do not see each other,
    the rows of a batch do not see each other, and padding that follows a reset changes nothing before it,

in outputs and in the gradients of inputs and parameters. They cannot be cut in the middle of a sequence: there is no
state that could be passed on, and no step.
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import StateError
from ostinato.mixers.base import Mixer, State


class WholeMixer(Mixer):
    """A map (batch, time, d_model) -> (batch, time, d_model) in which every step may see every other.

    Subclasses set `traits` and define `mix_whole`. The registry keeps them apart (`registry.whole_mixers()`); plans,
    backbones and classifiers take them as they take any mixer, language models do not.
    """

    causal: ClassVar[bool] = False

    def mix_whole(
        self, x: Float[Tensor, "batch time d_model"], reset: Bool[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time d_model"]:
        """The map itself, on checked arguments."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix_whole")

    def mix(self, x: Tensor, state: State, reset: Tensor | None, **context: Any) -> tuple[Tensor, None]:
        """All outputs, and None where other mixers give their state."""
        return self.mix_whole(x, reset, **context), None

    def initial_state(self, batch_size: int) -> None:
        """None: there is no state."""

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises `StateError`: there is no state to go on from."""
        raise StateError(f"{type(self).__name__} reads whole sequences: it has no state to go on from")

    def step(self, x: Float[Tensor, "batch d_model"], state: State) -> tuple[Float[Tensor, "batch d_model"], State]:
        """Raises `StateError`: a step would have to see what comes after it."""
        raise StateError(f"{type(self).__name__} reads whole sequences: it cannot go step by step")
