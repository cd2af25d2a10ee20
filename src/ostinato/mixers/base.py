"""What a mixer is.

A mixer is a map (batch, time, d_model) -> (batch, time, d_model) that carries a state, and obeys the law:

    forward(x)  ==  forward(x[:, :t]) then forward(x[:, t:], state)  ==  step, step, step, …

in outputs, in the final state and in all gradients. To add one, write one file with one class: its
projections in `__init__`, its state as a NamedTuple, its recurrence in `mix`; then one line in
`registry.py`. The tests, the routes, streaming, checkpoints, the command line and the benchmarks follow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import ConfigurationError, ShapeError, StateError
from ostinato.ops.checks import accumulation_dtype, check_reset, check_sequence

State = Any


@dataclass(frozen=True)
class Traits:
    """What kind of recurrence a mixer is: the axes of the taxonomy of SelectivBench (arXiv 2601.12598).

    Plain words; tables are generated from them.
    """

    engine: str
    """The function of `ostinato.ops` that computes it."""
    transition: str
    """What multiplies the state: "identity", "fixed scalar", "data scalar", "data vector", "data scalar × rank-1", …"""
    input_gate: str = "none"
    """What scales a write: "none", "tied", "beta", "delta", "exponential", "sigmoid", …"""
    state: str = ""
    """The shape of the state per layer, in symbols: "heads × key_dim × value_dim"."""
    channel_mixing: bool = False
    """Whether the transition mixes channels of the state (the delta family and dense recurrences do)."""
    linear: bool = True
    """Whether the recurrence is linear in the state."""
    paper: str = ""
    """Where it is from: "Gated DeltaNet (arXiv 2412.06464)"."""

    def as_dict(self) -> dict[str, Any]:
        """The traits as JSON-ready values."""
        return asdict(self)


class Mixer(nn.Module):
    """A causal map (batch, time, d_model) -> (batch, time, d_model) that carries a state.

    Subclasses set `traits`, call `super().__init__(d_model)`, and define `mix` and `initial_state`.
    """

    traits: ClassVar[Traits]
    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    """Names of own parameters that an optimiser must not decay (decay rates, biases, norms' weights are)."""
    learning_rate_cap: ClassVar[dict[str, float]] = {}
    """Own parameters whose learning rate may not exceed the value (S4's A, B and Δ: 1e-3)."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What `mix` takes by name besides x, of what a backbone is given: ("tokens",) for token ids, say."""
    takes: ClassVar[tuple[str, ...]] = ()
    """The same, of what it can do without."""
    causal: ClassVar[bool] = True
    """Whether a step sees nothing that comes after it (`ostinato.mixers.whole` has those for which this is not so)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model < 1:
            raise ConfigurationError(f"d_model must be positive, got {d_model}")
        self.d_model = d_model
        self._state_shapes: list[tuple[str, tuple[int, ...]]] | None = None

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: State, reset: Bool[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], State]:
        """The map itself, on checked arguments and a state that is never None."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix")

    def initial_state(self, batch_size: int) -> State:
        """The state before the first step: zeros, on the device of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not define initial_state")

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: State = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time d_model"], State]:
        """All outputs, and the state after the last step.

        Args:
            x: the sequence.
            state: where to go on from; None starts anew.
            reset: True marks the first step of a new sequence: nothing from before it is seen.
            context: what this mixer `needs` or `takes` besides x; handed to `mix`.

        Raises:
            ShapeError, DtypeError: x or reset does not fit.
            StateError: the state is of another mixer, width or batch size.
        """
        check_sequence("x", x, "batch time d_model")
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"{type(self).__name__} has d_model {self.d_model}, x has shape {tuple(x.shape)}")
        check_reset(reset, x.shape[0], x.shape[1])
        if state is None:
            state = self.initial_state(x.shape[0])
        elif not torch.compiler.is_compiling():
            self.check_state(state, x.shape[0])
        y, state = self.mix(x, state, reset, **context)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # Autograd keeps the sequence anyway; without it, the state must not.
            state = ostinato.state.compact(state)
        return y, state

    def step(self, x: Float[Tensor, "batch d_model"], state: State) -> tuple[Float[Tensor, "batch d_model"], State]:
        """One step. The engines take their one-step definition for a sequence of length one."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def check_state(self, state: State, batch_size: int) -> None:
        """Raise `StateError` unless `state` is one of this mixer's for this batch size.

        A mixer whose state grows (attention's cache) overrides this.
        """
        if self._state_shapes is None:
            template = self.initial_state(1)
            self._state_shapes = [(path, tuple(leaf.shape[1:])) for path, leaf in ostinato.state.leaves(template)]
        found = [(path, tuple(leaf.shape)) for path, leaf in ostinato.state.leaves(state)]
        wanted = [(path, (batch_size, *shape)) for path, shape in self._state_shapes]
        if found != wanted:
            raise StateError(
                f"this is not a state of this {type(self).__name__} for batch size {batch_size}: it holds "
                f"{found}, wanted {wanted}"
            )

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of the state's tensors: float32 under half-precision parameters."""
        return accumulation_dtype(next(self.parameters()).dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A zero tensor on the parameters' device, in `state_dtype`: what initial states are made of."""
        return torch.zeros(shape, dtype=dtype or self.state_dtype, device=next(self.parameters()).device)


def split_heads(width: int, heads: int, what: str = "d_model") -> int:
    """`width / heads`, or a clear error."""
    if heads < 1 or width % heads:
        near = [h for h in range(1, width + 1) if width % h == 0]
        raise ConfigurationError(
            f"{what}={width} is not divisible by heads={heads}; heads may be one of {', '.join(map(str, near))}"
        )
    return width // heads
