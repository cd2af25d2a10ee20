"""The backbone: a stack of mixers and channel mixers with residual connections. Everything else is a head.

    x ← x + mixer(norm(x));   x ← x + channel_mixer(norm(x));   …;   y = norm(x)

Source: pre-norm residual blocks with RMSNorm, as in Llama (arXiv 2302.13971), section 2.2, and xLSTM 7B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError, StateError, UnknownNameError
from ostinato.layers.rms_norm import RMSNorm
from ostinato.layers.swiglu import SwiGLU
from ostinato.mixers.base import Mixer
from ostinato.models.plan import Plan, parse_plan
from ostinato.ops.checks import check_reset, check_sequence

State = tuple[Any, ...]

CHANNEL_MIXERS: dict[str, Callable[[int, int | None], nn.Module]] = {"swiglu": SwiGLU}


class Block(nn.Module):
    """One layer: a sequence mixer, then a channel mixer (or none), each behind a norm and beside a residual."""

    def __init__(self, mixer: Mixer, channel_mixer: nn.Module | None, dropout: float, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model, eps=eps)
        self.mixer = mixer
        self.channel_norm = RMSNorm(mixer.d_model, eps=eps) if channel_mixer is not None else None
        self.channel_mixer = channel_mixer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: Any, reset: Tensor | None, context: dict[str, Any]
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """The block's output and its mixer's state."""
        mixed, state = self.mix(x, state, reset, context)
        if self.channel_mixer is None or self.channel_norm is None:
            return x + self.dropout(mixed), state
        x, normed = self.channel_norm.behind_sum(x, self.dropout(mixed))
        return x + self.dropout(self.channel_mixer(normed)), state

    def mix(
        self, x: Tensor, state: Any, reset: Tensor | None, context: dict[str, Any]
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """mixer(norm(x)) and its state; the mixer is handed what it `needs` and `takes` of the context."""
        given = {}
        for name in self.mixer.needs:
            if name not in context:
                raise ConfigurationError(
                    f"{type(self.mixer).__name__} needs {name!r}, which this network is not given; "
                    f"pass {name}=… to the backbone (it has {', '.join(context) or 'nothing'})"
                )
            given[name] = context[name]
        given |= {name: context[name] for name in self.mixer.takes if name in context}
        result: tuple[Tensor, Any] = self.mixer(self.norm(x), state, reset=reset, **given)
        return result


class Backbone(nn.Module):
    """A causal map (batch, time, d_model) -> (batch, time, d_model) made of mixers; it obeys the law as they do.

    Args:
        d_model: width.
        plan: which mixers, e.g. "gated_delta_net*3, attention(window=64)" (see `ostinato.models.plan`).
        depth: number of layers; the plan is repeated and cut to it. None takes the plan once.
        channel_mixer: "swiglu", or None for mixers alone.
        hidden: the channel mixer's inner width; None takes its own default.
        dropout: probability, on both branches of every block, before the sum.
        eps: of the norms.

    Mixers initialise themselves. Their output projections (`to_output`, where it is a plain linear layer) and
    those of the channel mixers are then divided by √(branches), so that the residual stream's variance does
    not grow with depth (GPT-2, section 2.3); a mixer that sets `depth_scaled = False` is left alone.

    Raises `PlanError`, `UnknownNameError`, `ConfigurationError` for arguments that make no network.
    """

    def __init__(
        self,
        d_model: int,
        plan: str | Plan,
        depth: int | None = None,
        *,
        channel_mixer: str | None = "swiglu",
        hidden: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if channel_mixer is not None and channel_mixer not in CHANNEL_MIXERS:
            raise UnknownNameError("channel mixer", channel_mixer, CHANNEL_MIXERS)
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is a probability in [0, 1), got {dropout}")
        self.d_model = d_model
        self.plan = parse_plan(plan)
        self.blocks = nn.ModuleList()
        for layer in self.plan.to_depth(depth):
            channels = CHANNEL_MIXERS[channel_mixer](d_model, hidden) if channel_mixer is not None else None
            self.blocks.append(Block(layer.build(d_model), channels, dropout, eps))
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self._scale_outputs(len(self.blocks) * (1 if channel_mixer is None else 2))

    @torch.no_grad()
    def _scale_outputs(self, branches: int) -> None:
        for block in self.blocks:
            for part in (block.mixer, block.channel_mixer):
                output = getattr(part, "to_output", None)
                if isinstance(output, nn.Linear) and getattr(part, "depth_scaled", True):
                    output.weight.mul_(branches**-0.5)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.blocks)

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixers, first layer first."""
        return [block.mixer for block in self.blocks]

    def initial_state(self, batch_size: int) -> State:
        """The mixers' states before the first step, first layer first."""
        return tuple(mixer.initial_state(batch_size) for mixer in self.mixers)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: State | None = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time d_model"], State]:
        """All outputs, and the states after the last step.

        Args:
            x: the sequence.
            state: where to go on from; None starts anew.
            reset: True marks the first step of a new sequence: nothing from before it is seen.
            context: what mixers may need besides x (token ids, say), each (batch, time, …). A mixer is
                handed what it names in `needs` and `takes`, the rest is ignored.

        Raises:
            ShapeError, DtypeError: x or reset does not fit.
            StateError: the state is of another network or batch size.
            ConfigurationError: a mixer needs something that the context lacks.
        """
        check_sequence("x", x, "batch time d_model")
        if x.shape[-1] != self.d_model:
            raise ShapeError(f"this backbone has d_model {self.d_model}, x has shape {tuple(x.shape)}")
        check_reset(reset, x.shape[0], x.shape[1])
        if state is None:
            states: tuple[Any, ...] = (None,) * self.depth
        elif isinstance(state, (tuple, list)) and len(state) == self.depth:
            states = tuple(state)
        else:
            size = len(state) if isinstance(state, (tuple, list)) else type(state).__name__
            raise StateError(f"the state of this backbone is a tuple of {self.depth} mixers' states, got {size}")
        after = []
        for block, entering in zip(self.blocks, states, strict=True):
            x, leaving = block(x, entering, reset, context)
            after.append(leaving)
        return self.norm(x), tuple(after)

    def step(
        self, x: Float[Tensor, "batch d_model"], state: State, **context: Any
    ) -> tuple[Float[Tensor, "batch d_model"], State]:
        """One step; the context's values have no time axis either."""
        given = {name: value.unsqueeze(1) for name, value in context.items()}
        y, state = self(x.unsqueeze(1), state, **given)
        return y.squeeze(1), state
