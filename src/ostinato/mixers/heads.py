"""What the mixers with a matrix memory per head share: queries, keys and values, decays, the way out.

The memory of a head is S ∈ R^{key_dim × value_dim}; it is written at a key and read at a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, split_heads
from ostinato.mixers.parts import GatedNorm, ShortConvolution, log_uniform, softplus_inverse
from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.linear_attention import linear_attention


class MatrixState(NamedTuple):
    """The memory of every head, and the inputs that the short convolution will need (None without one)."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    window: Float[Tensor, "batch taps channels"] | None


def head_width(d_model: int, heads: int, expand: float = 1.0) -> int:
    """The width of a head, expand · d_model / heads rounded down; `ConfigurationError` if heads do not divide."""
    split_heads(d_model, heads)
    width = int(expand * d_model / heads + 1e-9)
    if width < 1:
        raise ConfigurationError(
            f"an expansion of {expand} leaves heads of width 0 (d_model={d_model}, heads={heads}); use a larger one"
        )
    return width


def widened(x: Tensor) -> Tensor:
    """x in the type in which gates are computed: float32 for half precision, else its own."""
    return x.to(accumulation_dtype(x.dtype))


def padding(lengths: Int[Tensor, " batch"] | None, time: int) -> Bool[Tensor, "batch time"] | None:
    """True from step `lengths` of a row on; None if every row is as long as the batch."""
    return None if lengths is None else torch.arange(time, device=lengths.device) >= lengths.unsqueeze(1)


def cleared(x: Tensor, padded: Bool[Tensor, "batch time"] | None) -> Tensor:
    """x with zeros where it is padded. A write of zero with a log decay of zero leaves a memory as it was."""
    return x if padded is None else x.masked_fill(padded.reshape(*padded.shape, *[1] * (x.ndim - 2)), 0)


def last_inputs(
    x: Float[Tensor, "batch time channels"],
    window: Float[Tensor, "batch taps channels"],
    reset: Bool[Tensor, "batch time"] | None,
    lengths: Int[Tensor, " batch"],
) -> Float[Tensor, "batch taps channels"]:
    """The window of a short convolution after the first `lengths` inputs of each row: zero before the last reset."""
    taps = window.shape[1]
    index = lengths.unsqueeze(1) + torch.arange(taps, device=x.device)
    found = torch.cat([window.to(x.dtype), x], dim=1).gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    if reset is not None:
        sequence = F.pad(reset.long().cumsum(1), (taps, 0))
        own = sequence.gather(1, index)
        found = found.masked_fill((own != sequence.gather(1, index[:, -1:])).unsqueeze(-1), 0) if taps else found
    return found


def value_decay(values: Tensor, own: Sequence[Tensor]) -> Tensor | None:
    """log β, if it is among what an engine is given between values and log decay, a number per value channel.

    What else may stand there is `delta_rule`'s β, a number per head.
    """
    return next((part for part in own if part.shape == values.shape), None)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: e^x below 0, x + 1 above; positive. (`F.elu` itself cannot be traced on a view.)"""
    return x.clamp(max=0).exp() + F.relu(x)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": elu_plus_one,
    "identity": lambda x: x,
}
"""Maps of queries and keys, by name."""


def find_feature_map(name: str, what: str) -> Callable[[Tensor], Tensor]:
    """The map of that name, or a `ConfigurationError` for the option `what`."""
    if name not in FEATURES:
        raise ConfigurationError(f"{what} must be one of {', '.join(FEATURES)}, got {name!r}")
    return FEATURES[name]


class QueriesKeysValues(nn.Module):
    """Linear maps to the queries, keys and values of all heads, and a short causal convolution over the three.

    With `writes` = n there are n keys and values a step, laid out (n, heads, dim); they come out with time
    n times as long, those of one step side by side.
    """

    def __init__(
        self, d_model: int, heads: int, key_dim: int, value_dim: int, *, conv: int | None = None, writes: int = 1
    ) -> None:
        super().__init__()
        self.heads, self.writes = heads, writes
        self.widths = [heads * key_dim, writes * heads * key_dim, writes * heads * value_dim]
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(d_model, w, bias=False) for w in self.widths)
        self.convolution = ShortConvolution(sum(self.widths), conv) if conv else None

    def initial_state(self, batch_size: int) -> Float[Tensor, "batch taps channels"] | None:
        """The convolution's: zeros, or None without one."""
        return self.convolution.initial_state(batch_size) if self.convolution is not None else None

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        window: Tensor | None,
        reset: Bool[Tensor, "batch time"] | None,
        lengths: Int[Tensor, " batch"] | None = None,
        silu: tuple[bool, bool, bool] = (False, False, False),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (batch, time, heads, key_dim), keys and values (batch, writes · time, heads, …), the window.

        With `lengths` the window is that of the first `lengths` steps of each row. With `silu`, which of queries, keys
        and values are activated: here, because a kernel of the convolution does it for nothing.
        """
        batch, time = x.shape[:2]
        parts = (self.to_queries(x), self.to_keys(x), self.to_values(x))
        if self.convolution is None:
            queries, keys, values = (
                F.silu(part) if activated else part for part, activated in zip(parts, silu, strict=True)
            )
        else:
            entering = window
            (queries, keys, values), window = self.convolution.jointly(parts, entering, reset, silu)
            if lengths is not None and entering is not None:
                window = last_inputs(torch.cat(parts, dim=-1), entering, reset, lengths)
        queries = queries.reshape(batch, time, self.heads, -1)
        keys = keys.reshape(batch, time * self.writes, self.heads, -1)
        values = values.reshape(batch, time * self.writes, self.heads, -1)
        return queries, keys, values, window


class KeyValueMixer(Mixer):
    """A mixer that reads a matrix memory per head: y = W_o concat_h[RMSNorm(o) ⊙ act(W_g x)].

    Subclasses define `remember`: the recurrence up to o.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model.
        conv: taps of the short convolution over queries, keys and values; None for none.
        gate: the activation of the output gate, "silu" or "sigmoid"; None for no gate.
        writes: keys and values per step.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        expand_k: float,
        expand_v: float,
        conv: int | None,
        gate: str | None,
        writes: int = 1,
    ) -> None:
        super().__init__(d_model)
        self.heads = heads
        self.key_dim = head_width(d_model, heads, expand_k)
        self.value_dim = head_width(d_model, heads, expand_v)
        self.project = QueriesKeysValues(d_model, heads, self.key_dim, self.value_dim, conv=conv, writes=writes)
        self.to_gate = self.gate_map() if gate else None
        self.norm: nn.Module = GatedNorm(self.value_dim, gate=gate)
        self.to_output = nn.Linear(heads * self.value_dim, d_model, bias=False)

    def gate_map(self) -> nn.Module:
        """W_g: the map from x to the output gates of all heads."""
        return nn.Linear(self.d_model, self.heads * self.value_dim, bias=False)

    scan: Callable[..., Any] = staticmethod(linear_attention)
    """The engine. An instance may be given another one with the same arguments: queries, keys, values, what the engine
    has of its own (see `value_decay`), log decay, state."""

    def initial_state(self, batch_size: int) -> MatrixState:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.key_dim, self.value_dim)
        return MatrixState(memory, self.project.initial_state(batch_size))

    def remember(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Any,
        reset: Bool[Tensor, "batch time"] | None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time heads value_dim"], Any]:
        """What is read from the memory at every step, o, and the state.

        With `lengths`, row i has `lengths[i]` steps and the others are padding: the state does not see them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define remember")

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """The recurrence, over the whole sequence."""
        outputs, state = self.remember(x, state, reset)
        return self.read_out(outputs, x), state

    def read_out(self, outputs: Float[Tensor, "batch time heads value_dim"], x: Tensor) -> Tensor:
        """W_o concat_h[RMSNorm(o) ⊙ act(W_g x)]."""
        gate = self.to_gate(x).unflatten(-1, (self.heads, -1)) if self.to_gate is not None else None
        return self.to_output(self.norm(outputs, gate).flatten(-2))


class HeadNorm(nn.Module):
    """Each head to mean 0 and variance 1, then a weight (and bias) per channel: group normalisation per token."""

    def __init__(self, heads: int, dim: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(heads * dim))
        self.bias = nn.Parameter(torch.zeros(heads * dim)) if bias else None

    def forward(self, x: Float[Tensor, "... heads dim"]) -> Float[Tensor, "... channels"]:
        """Normalised, the heads joined."""
        y = F.layer_norm(x, (self.dim,), eps=self.eps).flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias


def decay_rates(heads: int, low: float, high: float) -> nn.Parameter:
    """log A for decays e^{−A Δ}, with A ∼ U(low, high); a draw next to 0 would be a logarithm without bound."""
    return nn.Parameter(torch.empty(heads).uniform_(low, high).clamp(min=1e-3).log())


def step_biases(size: int) -> nn.Parameter:
    """b with softplus(b) log-uniform in [1e-3, 0.1]: the step sizes Δ that a recurrence starts from."""
    return nn.Parameter(softplus_inverse(log_uniform(size, 1e-3, 0.1, floor=1e-4)))


def softplus_steps(raw: Tensor, bias: Tensor) -> Tensor:
    """Δ = softplus(raw + b), in float32 at least."""
    return F.softplus(widened(raw) + widened(bias))
