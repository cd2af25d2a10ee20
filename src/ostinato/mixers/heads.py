"""What the mixers with a matrix memory per head share: queries, keys and values, decays, the way out.

The memory of a head is S ∈ R^{key_dim × value_dim}; it is written at a key and read at a query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, split_heads
from ostinato.mixers.parts import GatedNorm, ShortConvolution, log_uniform, softplus_inverse
from ostinato.ops.checks import accumulation_dtype


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
    n times as long, those of one step side by side. No activation.
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
        self, x: Float[Tensor, "batch time d_model"], window: Tensor | None, reset: Bool[Tensor, "batch time"] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (batch, time, heads, key_dim), keys and values (batch, writes · time, heads, …), the window."""
        batch, time = x.shape[:2]
        queries, keys, values = self.to_queries(x), self.to_keys(x), self.to_values(x)
        if self.convolution is not None:
            joined, window = self.convolution(torch.cat([queries, keys, values], dim=-1), window, reset)
            queries, keys, values = joined.split(self.widths, dim=-1)
        queries = queries.reshape(batch, time, self.heads, -1)
        keys = keys.reshape(batch, time * self.writes, self.heads, -1)
        values = values.reshape(batch, time * self.writes, self.heads, -1)
        return queries, keys, values, window


class KeyValueMixer(Mixer):
    """A mixer that reads a matrix memory per head: y = W_o concat_h[RMSNorm(o) ⊙ act(W_g x)].

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

    def initial_state(self, batch_size: int) -> MatrixState:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.key_dim, self.value_dim)
        return MatrixState(memory, self.project.initial_state(batch_size))

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
