"""RWKV-7 ("Goose"): a delta rule with decays per channel, and an erase that differs from the write.

Source: RWKV-7 (arXiv 2503.14456), section 4; initial values: the authors' training code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import HeadNorm, widened
from ostinato.mixers.parts import TokenShift, l2_normalize
from ostinato.ops.delta_rule import delta_rule


class RWKV7State(NamedTuple):
    """The memory of every head, and the last input."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    previous: Float[Tensor, "batch d_model"]


class LowRank(nn.Module):
    """b + W_2 act(W_1 x). W_1 starts at 0 and W_2 orthogonal, so that it starts at b."""

    def __init__(self, d_model: int, rank: int, activation: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(d_model, rank, bias=False)
        self.up = nn.Linear(rank, d_model, bias=bias is not None)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, math.sqrt(rank / d_model)))
        if bias is not None:
            with torch.no_grad():
                self.up.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The map."""
        return self.up(self.activation(self.down(x)))


class RWKV7(Mixer):
    """S_t = diag(w) S_{t−1} − (κ ⊙ a)(κᵀ S_{t−1}) + k v̂ᵀ, o_t = S_tᵀ r; y = W_o [(GroupNorm(o) + b) ⊙ g].

    Each of r, w, k, v, a, g sees its own mix x + μ_* ⊙ (x_{t−1} − x_t). With low-rank maps L_*:
    log w = −e^{−1/2} σ(L_w), a = σ(L_a), g = L_g, κ = norm2(k ⊙ k_k), k̂ = k ⊙ (1 + (a − 1) ⊙ k_a), which is
    the key that is written, and b = (Σ_c r k̂ r_k) v. The erase acts on the memory before its decay.

    In a layer above the first, v moves towards the values of the first layer: v̂ = v + (v_first − v) σ(L_v).
    A mixer alone is a first layer. With `value_residual` it has L_v, and `mix_values` takes v_first.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model. The paper has heads of width 64.
        layer, layers: which layer of how many it is; initial values depend on it.
        value_residual: whether there is L_v; then `mix_values` must be called, with the first layer's values.
    """

    traits = Traits(
        engine="delta_rule",
        transition="data vector + rank-1",
        input_gate="tied",
        state="heads × key_dim × value_dim, d_model",
        channel_mixing=True,
        paper="RWKV-7 (arXiv 2503.14456)",
    )
    no_weight_decay = frozenset({"shift_mix", "key_scale", "key_mix", "bonus"})

    def __init__(
        self, d_model: int, heads: int = 4, layer: int = 0, layers: int = 1, value_residual: bool = False
    ) -> None:
        super().__init__(d_model)
        if not 0 <= layer < layers:
            raise ConfigurationError(f"layer counts from 0 and must be below layers, got layer {layer} of {layers}")
        self.heads, self.head_dim = heads, split_heads(d_model, heads)
        depth, rest = layer / max(1, layers - 1), 1 - layer / layers
        ramp = torch.arange(d_model) / max(1, d_model - 1)
        centred = ramp - 0.5
        within = torch.linspace(-1, 1, self.head_dim).repeat(heads) if self.head_dim > 1 else torch.zeros(d_model)
        zigzag = within * within.abs()

        self.shift = TokenShift(d_model)
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * rest  # of r, w, k, v, a, g
        self.shift_mix = nn.Parameter(1 - (torch.arange(d_model) / d_model) ** powers.unsqueeze(-1))
        self.to_receptance, self.to_keys, self.to_values, self.to_output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        nn.init.orthogonal_(self.to_receptance.weight)
        nn.init.orthogonal_(self.to_keys.weight, gain=0.1)
        nn.init.orthogonal_(self.to_values.weight)
        nn.init.zeros_(self.to_output.weight)

        decay_bias = -6 + 6 * ramp ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        rate_bias = -0.19 + 0.3 * zigzag + 0.4 * centred
        self.to_decay = LowRank(d_model, self._rank(2.5), nn.Tanh(), decay_bias)
        self.to_rate = LowRank(d_model, self._rank(2.5), nn.Identity(), rate_bias)
        self.to_gate = LowRank(d_model, self._rank(5.0, scaled=False), nn.Sigmoid(), None)
        self.to_residual = (
            LowRank(d_model, self._rank(1.7), nn.Identity(), 0.73 - 0.4 * centred) if value_residual else None
        )
        self.key_scale = nn.Parameter(0.71 - 0.1 * centred)
        self.key_mix = nn.Parameter(torch.full((d_model,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, self.head_dim), -0.04))
        self.norm = HeadNorm(heads, self.head_dim, eps=self.head_dim * 1e-5, bias=True)
        nn.init.constant_(self.norm.weight, ((layer + 1) / layers) ** 0.7)

    def _rank(self, factor: float, scaled: bool = True) -> int:
        """The authors' rank, a multiple of 32 that grows as √d_model; not more than d_model."""
        wide = factor * math.sqrt(self.d_model) * (self.head_dim / 64 if scaled else 1)
        return min(self.d_model, max(32, round(wide / 32) * 32))

    def initial_state(self, batch_size: int) -> RWKV7State:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.head_dim, self.head_dim)
        return RWKV7State(memory, self.zeros(batch_size, self.d_model, dtype=self.to_keys.weight.dtype))

    def mix(self, x: Tensor, state: RWKV7State, reset: Tensor | None) -> tuple[Tensor, RWKV7State]:
        """The recurrence, over the whole sequence, as a first layer."""
        y, state, _ = self.mix_values(x, state, reset, None)
        return y, state

    def mix_values(
        self, x: Tensor, state: RWKV7State, reset: Tensor | None, first_values: Tensor | None
    ) -> tuple[Tensor, RWKV7State, Tensor]:
        """The recurrence, given the values of the first layer (None: this is it); returns those too.

        Raises `ConfigurationError` where `value_residual` and `first_values` do not go together.
        """
        before, previous = self.shift(x, state.previous, reset)
        for_r, for_w, for_k, for_v, for_a, for_g = (x + (before - x) * mu for mu in self.shift_mix)
        receptance, keys, values = self.to_receptance(for_r), self.to_keys(for_k), self.to_values(for_v)
        if first_values is None and self.to_residual is None:
            first_values = values
        elif first_values is not None and self.to_residual is not None:
            values = torch.lerp(values, first_values, torch.sigmoid(self.to_residual(for_v)))
        else:
            raise ConfigurationError(
                "an RWKV-7 layer with value_residual=True needs first_values (call mix_values with those that the "
                "first layer returned); one without cannot use them"
            )
        log_decay = self._split(-math.exp(-0.5) * torch.sigmoid(widened(self.to_decay(for_w))))
        rate = torch.sigmoid(self.to_rate(for_a))
        erased = l2_normalize(self._split(keys * self.key_scale), eps=1e-12)
        keys = self._split(keys * (1 + (rate - 1) * self.key_mix))
        receptance, values = self._split(receptance), self._split(values)
        outputs, memory = delta_rule(
            receptance,
            keys,
            values,
            None,
            log_decay,
            state.memory,
            # The engine reads the decayed memory: undo the decay on the key, so that the old one is read.
            read_keys=erased * (-log_decay).exp(),
            erase_keys=erased * self._split(rate),
            reset=reset,
        )
        bonus = (receptance * keys * self.bonus).sum(-1, keepdim=True) * values
        y = self.to_output((self.norm(outputs) + bonus.flatten(-2)) * self.to_gate(for_g))
        return y, RWKV7State(memory, previous), first_values

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
