"""Mixers made to forget after training, without a change of their parameters: remedies for an overfull memory.

    longer = mended(model, StateDifferenceWindow, window=64)

A network that was trained on short sequences need not have learned to forget; on longer ones its memory fills up. The
wrappers here exchange the engine of a mixer with a matrix memory; all of them obey the law.

Source: Stuffed Mamba (arXiv 2410.07145), section 4; the state normalisation is in its first version only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer
from ostinato.mixers.heads import value_decay
from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.linear_attention import linear_attention

Scan = Callable[..., tuple[Tensor, Any]]


class WindowedMemory(NamedTuple):
    """Two memories, of all steps and of those that have left the window, and what was written inside the window."""

    now: Float[Tensor, "batch heads key_dim value_dim"]
    past: Float[Tensor, "batch heads key_dim value_dim"]
    keys: Float[Tensor, "batch window heads key_dim"]
    values: Float[Tensor, "batch window heads value_dim"]
    log_decay: Float[Tensor, "batch window heads"] | Float[Tensor, "batch window heads key_dim"]


class Damped:
    """An engine whose decays and writes are scaled."""

    def __init__(self, scan: Scan, retain: float, insert: float, step: float) -> None:
        self.scan, self.log_retain, self.insert, self.step = scan, math.log(retain), insert, step

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> Any:
        """What the engine gives for other decays and writes."""
        *own, log_decay, state = rest
        gate = value_decay(values, own)
        if gate is not None:
            own = [self.step * gate if part is gate else part for part in own]
        if log_decay is None:
            log_decay = queries.new_zeros(queries.shape[:3], dtype=accumulation_dtype(queries.dtype))
        log_decay = self.step * log_decay + self.log_retain
        # The engines are linear in the values: scaling them scales the write, whatever else the keys do.
        return self.scan(queries, keys, values * (self.insert * self.step), *own, log_decay, state, **options)


class _Normalized:
    """An engine whose memory is scaled down, head by head, wherever its norm exceeds a bound; step by step."""

    def __init__(self, scan: Scan, bound: float) -> None:
        self.scan, self.bound = scan, bound

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, reset: Tensor | None, **options: Any
    ) -> Any:
        *own, log_decay, memory = rest
        writes = keys.shape[1] // queries.shape[1]
        outputs = []
        for t in range(queries.shape[1]):
            step, written = slice(t, t + 1), slice(t * writes, (t + 1) * writes)
            y, memory = self.scan(
                queries[:, step],
                keys[:, written],
                values[:, written],
                *(part[:, written] for part in own),
                None if log_decay is None else log_decay[:, step],
                memory,
                reset=None if reset is None else reset[:, step],
                **options,
            )
            factor = self.bound / torch.linalg.vector_norm(memory, dim=(-2, -1)).clamp(min=self.bound)
            memory = memory * factor[..., None, None]
            outputs.append(y * factor[:, None, :, None].to(y.dtype))
        return torch.cat(outputs, dim=1), memory


class _Windowed:
    """Linear attention over the last `window` steps, as the difference of two memories."""

    def __init__(self, window: int) -> None:
        self.window = window

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        log_decay: Tensor | None,
        memory: WindowedMemory,
        *,
        reset: Tensor | None,
    ) -> tuple[Tensor, WindowedMemory]:
        time, wide = queries.shape[1], memory.now.dtype
        kind, queries, keys, values = queries.dtype, queries.to(wide), keys.to(wide), values.to(wide)
        gates = torch.zeros_like(keys[..., 0]) if log_decay is None else log_decay.to(wide)
        read, now = linear_attention(queries, keys, values, gates, memory.now, reset=reset)
        known = [
            torch.cat([old, new], dim=1)
            for old, new in zip(memory[2:], (keys, values, gates), strict=True)  # step t stands at window + t
        ]
        # What was forgotten since the step that leaves the window; summed exactly, for it is a difference.
        total = (known[2].double() if wide == torch.float32 and not known[2].is_mps else known[2]).cumsum(1)
        since = (total[:, self.window :] - total[:, :time]).to(wide).exp()
        held = known
        if reset is not None:
            own = reset.long().cumsum(1)
            sequence = F.pad(own, (self.window, 0))
            known = [_kept(part, sequence, own, slice(0, time)) for part in known]
            held = [_kept(part, sequence, own[:, -1:], slice(time, None)) for part in held]
        else:
            known, held = [part[:, :time] for part in known], [part[:, time:] for part in held]
        faded = queries * (since if since.ndim == 4 else since.unsqueeze(-1))
        stale, past = linear_attention(faded, *known, memory.past, reset=reset)
        return (read - stale).to(kind), WindowedMemory(now, past, *held)


def _kept(part: Tensor, sequence: Tensor, own: Tensor, where: slice) -> Tensor:
    """Some steps of `part`, zero those of another sequence than the step that they are looked at from."""
    foreign = sequence[:, where] != own
    return part[:, where].masked_fill(foreign.view(*foreign.shape, *[1] * (part.ndim - 2)), 0)


class _Mended(Mixer):
    """A mixer with another engine; its parameters are those of the mixer that was passed, not copies."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.d_model)
        if not hasattr(mixer, "scan") or not hasattr(mixer.initial_state(1), "memory"):
            raise ConfigurationError(
                f"{type(mixer).__name__} has no matrix memory with a linear engine whose forgetting could be changed"
            )
        self.inner = copy.deepcopy(mixer, {id(parameter): parameter for parameter in mixer.parameters()})
        self.traits = mixer.traits  # type: ignore[misc]
        self.needs = mixer.needs  # type: ignore[misc]

    def initial_state(self, batch_size: int) -> Any:
        """The mixer's own."""
        return self.inner.initial_state(batch_size)

    def mix(self, x: Tensor, state: Any, reset: Tensor | None, **context: Any) -> tuple[Tensor, Any]:
        """The mixer's recurrence, on the other engine."""
        return self.inner.mix(x, state, reset, **context)


class ForgetMore(_Mended):
    """α_t ← retain · α_t^step and k_t v_tᵀ ← insert · step · k_t v_tᵀ, everywhere: still a linear scan.

    `step` multiplies Mamba-2's Δ, which scales decay and write together ("LongMamba"); retain and insert keep them
    apart. Where value channels decay too, α_t stands for the gate α_t β_tᵀ. The paper chose retain 0.9999 and insert
    0.75 by the loss at 32 thousand tokens.

    Raises `ConfigurationError` for a mixer without such a memory, or a factor out of range.
    """

    def __init__(self, mixer: Mixer, retain: float = 0.9999, insert: float = 0.75, step: float = 1.0) -> None:
        super().__init__(mixer)
        if not 0 < retain <= 1:
            raise ConfigurationError(f"retain multiplies decays, so it is in (0, 1], got {retain}")
        if insert <= 0 or step <= 0:
            raise ConfigurationError(f"insert and step are positive, got {insert} and {step}")
        self.inner.scan = Damped(self.inner.scan, retain, insert, step)  # type: ignore[assignment, arg-type]


class StateNorm(_Mended):
    """S_t ← S_t · min(1, max_norm / ‖S_t‖_F) per head, in every step, before it is read. Not linear: step by step.

    Raises `ConfigurationError` for a mixer without such a memory, or a bound that is not positive.
    """

    def __init__(self, mixer: Mixer, max_norm: float) -> None:
        super().__init__(mixer)
        if not max_norm > 0:
            raise ConfigurationError(f"max_norm must be positive, got {max_norm}")
        self.inner.scan = _Normalized(self.inner.scan, max_norm)  # type: ignore[assignment, arg-type]
        self.traits = replace(mixer.traits, linear=False)  # type: ignore[misc]


class StateDifferenceWindow(_Mended):
    """S^{(r)}_t = S_t − α_{t−r+1:t} S_{t−r}: exactly the last r = `window` steps, per layer, in constant time a step.

    Held are both memories and what was written in the last r steps, all in float32 at least: where almost nothing
    decays, the difference of two large memories loses digits. Through L layers up to L · r steps are seen.

    Raises `ConfigurationError` for a mixer that is not on `linear_attention`: a transition that mixes channels has no
    such difference; and for a window below 1.
    """

    def __init__(self, mixer: Mixer, window: int) -> None:
        super().__init__(mixer)
        if getattr(mixer, "scan", None) is not linear_attention:
            raise ConfigurationError(
                f"{type(mixer).__name__} is not on linear_attention: its memory has no window by a difference"
            )
        if window < 1:
            raise ConfigurationError(f"a window holds at least one step, got {window}")
        self.window = window
        self.inner.scan = _Windowed(window)  # type: ignore[assignment]

    def initial_state(self, batch_size: int) -> Any:
        """Zeros."""
        plain = self.inner.initial_state(batch_size)
        _, heads, key_dim, value_dim = plain.memory.shape
        steps = (batch_size, self.window, heads)
        by_channel = self.traits.transition == "data vector"
        return plain._replace(
            memory=WindowedMemory(
                plain.memory,
                torch.zeros_like(plain.memory),
                plain.memory.new_zeros(*steps, key_dim),
                plain.memory.new_zeros(*steps, value_dim),
                plain.memory.new_zeros(*steps, key_dim) if by_channel else plain.memory.new_zeros(steps),
            )
        )


Module = TypeVar("Module", bound=nn.Module)


def mended(model: Module, remedy: Callable[..., Mixer], **options: Any) -> Module:
    """The model with `remedy(mixer, **options)` in the place of every mixer that has a matrix memory.

    The parameters are the model's own, not copies; the model itself stays as it is. Its states do not fit where the
    remedy's hold more. Mixers of other kinds (attention, say) are left alone.

    Raises `ConfigurationError` if there is no such mixer in the model.
    """
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Mixer) and hasattr(child, "scan") and not isinstance(parent, Mixer):
                setattr(parent, name, remedy(child, **options))
                found += 1
    if not found:
        raise ConfigurationError("there is no mixer with a matrix memory in this model")
    return model
