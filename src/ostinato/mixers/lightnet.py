"""LightNet: linear attention whose memory is a running mean, with weights e^k, causal or over a whole grid at once.

Source: LightNet (arXiv 2405.21022), section 4, and the first author's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.md_lrpe import MDLRPE, check_grid, grid_places, rotate_on_grid
from ostinato.layers.rotary import check_rotary_dim, positions, rotate
from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import elu_plus_one, widened
from ostinato.mixers.parts import GatedNorm
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.additive_attention import running_log_weights
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import places, sequence_softmax, whole_attention

POSITIONS = ("cosine", "rotary", None)


class LightNetState(NamedTuple):
    """The memory, log Δ, and how many steps of its sequence each row has seen (None without positions)."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    log_weight: Float[Tensor, "batch heads logit_dim"] | Float[Tensor, "batch heads"]
    position: Int[Tensor, " batch"] | None


class LightNetProjections(nn.Module):
    """q = silu(W_q x), k = W_k x, v = W_v x, by heads; and y = W_o [RMSNorm(o) ⊙ act(W_g2 W_g1 x)].

    `norm` is "full", over all channels, with act = silu after it; or "heads", each head for itself, with a sigmoid
    before it. Weights start at N(0, 0.02).
    """

    def __init__(self, d_model: int, heads: int, gate_rank: int | None, norm: str, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, split_heads(d_model, heads)
        if norm not in ("full", "heads"):
            raise ConfigurationError(f"norm is 'full' or 'heads', got {norm!r}")
        self.by_heads = norm == "heads"
        rank = min(128, d_model) if gate_rank is None else gate_rank
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.to_gate = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model, bias=False))
        gate = "sigmoid" if self.by_heads else "silu"
        width = self.head_dim if self.by_heads else d_model
        self.norm = GatedNorm(width, gate=gate, gate_first=self.by_heads, eps=eps)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, time, heads, head_dim)."""
        maps = self.to_queries, self.to_keys, self.to_values
        queries, keys, values = (to(x).unflatten(-1, (self.heads, -1)) for to in maps)
        return F.silu(queries), keys, values

    def read_out(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The way out."""
        gate = self.to_gate(x)
        if self.by_heads:
            return self.to_output(self.norm(outputs, gate.unflatten(-1, (self.heads, -1))).flatten(-2))
        return self.to_output(self.norm(outputs.flatten(-2), gate))


class LightNet(Mixer):
    """S_t = diag(Δ_{t−1}/Δ_t) S_{t−1} + (e^{k_t}/Δ_t) v_tᵀ, o_t = S_tᵀ q_t, Δ_t = Σ_{s ≤ t} e^{k_s}.

    The weights come near 1/t: what is recent is not favoured, and nothing can be forgotten fast.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model. The paper has heads of width 128.
        gate_rank: of W_g2 W_g1; None takes 128, or d_model if that is less.
        decay: "channel", as above; or "head": one logit f = W_f x for each head drives Δ, and the key is silu(k).
        tied: with decay="head", multiply the key by the weight e^f/Δ (one minus the decay).
        position: "cosine" (LRPE: twice the key channels), "rotary", or None. It is applied to q and to e^k/Δ.
        part: with "cosine", the frequencies: "full", "low" or "high" half.
        scale: multiply q by head_dim^{−1/2}.
        initial_logit: weight of the empty memory, as a logarithm: None for nothing (e^{−∞}), or 0, as one of the
            published implementations has it.
        norm: see `LightNetProjections`.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        input_gate="tied",
        state="heads × 2 key_dim × value_dim, heads × key_dim",
        paper="LightNet (arXiv 2405.21022)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        gate_rank: int | None = None,
        decay: str = "channel",
        tied: bool = False,
        position: str | None = "cosine",
        part: str = "full",
        scale: bool = False,
        initial_logit: float | None = None,
        norm: str = "full",
        base: float = 10000.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        if decay not in ("channel", "head") or position not in POSITIONS or (tied and decay == "channel"):
            raise ConfigurationError(
                f"decay is 'channel' or 'head', position 'cosine', 'rotary' or None, and tied is for decay='head'; "
                f"got {decay!r}, {position!r}, tied={tied}"
            )
        self.project = LightNetProjections(d_model, heads, gate_rank, norm, eps)
        self.heads, self.head_dim, self.position, self.base = heads, self.project.head_dim, position, base
        self.tied, self.initial_logit = tied, initial_logit
        self.scale = self.head_dim**-0.5 if scale else 1.0
        self.to_logits = nn.Linear(d_model, heads, bias=False) if decay == "head" else None
        self.encoding = MDLRPE(self.head_dim, base=base, part=part) if position == "cosine" else None
        if position == "rotary":
            check_rotary_dim(self.head_dim)

    @property
    def to_output(self) -> nn.Linear:
        """W_o."""
        return self.project.to_output

    def initial_state(self, batch_size: int) -> LightNetState:
        """Nothing written: a zero memory, and log Δ = −∞ (or the initial logit)."""
        key_dim = self.head_dim * (2 if self.encoding is not None else 1)
        shape = (batch_size, self.heads) if self.to_logits is not None else (batch_size, self.heads, self.head_dim)
        start = -torch.inf if self.initial_logit is None else self.initial_logit
        counted = self.zeros(batch_size, dtype=torch.long) if self.position is not None else None
        return LightNetState(
            self.zeros(batch_size, self.heads, key_dim, self.head_dim), self.zeros(*shape) + start, counted
        )

    def mix(self, x: Tensor, state: LightNetState, reset: Tensor | None) -> tuple[Tensor, LightNetState]:
        """The recurrence, over the whole sequence."""
        queries, keys, values = (widened(part) for part in self.project(x))
        logits = keys if self.to_logits is None else widened(self.to_logits(x))
        initial = None if self.initial_logit is None else float(self.initial_logit)
        totals, log_decay = running_log_weights(logits, state.log_weight.to(logits.dtype), reset, initial)
        weights = torch.exp(logits - totals)
        by_heads = self.to_logits is not None
        weight = weights.unsqueeze(-1) if self.tied else 1.0
        keys = F.silu(keys) * weight if by_heads else weights
        position = state.position
        if position is not None:
            here, position = positions(position, x.shape[1], reset)
            if self.encoding is not None:
                queries, keys = (self.encoding(part, here.unsqueeze(-1)) for part in (queries, keys))
                log_decay = log_decay if by_heads else torch.cat([log_decay, log_decay], dim=-1)
            else:
                queries, keys = (rotate(part, here, self.base) for part in (queries, keys))
        outputs, memory = linear_attention(queries * self.scale, keys, values, log_decay, state.memory, reset=reset)
        return self.project.read_out(outputs.to(x.dtype), x), LightNetState(memory, totals[:, -1], position)


class WholeLightNet(WholeMixer):
    """K̂ = softmax of k over all positions, channel by channel; S = K̂ᵀV once; O = Q S: one pass for any grid.

    Keeps of the law what `WholeMixer` says. On a grid a row is one grid, and cannot be packed.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        gate_rank: of W_g2 W_g1; None takes 128, or d_model if that is less.
        grid: the sizes of the grid, walked row by row; None is one dimension of any length.
        position: "cosine" (MD-LRPE), "rotary" (the channels dealt out to the axes), or None.
        num_prefix: tokens before the grid (class tokens); their angles are 0.
        weights: "softmax", or "elu": k̂ = elu(k) + 1, not normalised: plain linear attention, to compare with.
        learned: whether MD-LRPE's frequencies are learned.
        norm: see `LightNetProjections`.
    """

    traits = Traits(
        engine="linear_attention",
        transition="identity",
        state="none: heads × key_dim × value_dim while it runs",
        paper="LightNet (arXiv 2405.21022)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        gate_rank: int | None = None,
        grid: Sequence[int] | None = None,
        position: str | None = "cosine",
        num_prefix: int = 0,
        weights: str = "softmax",
        learned: bool = False,
        norm: str = "full",
        base: float = 10000.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        if position not in POSITIONS or weights not in ("softmax", "elu"):
            raise ConfigurationError(
                f"position is 'cosine', 'rotary' or None and weights 'softmax' or 'elu', got {position!r}, {weights!r}"
            )
        self.project = LightNetProjections(d_model, heads, gate_rank, norm, eps)
        self.grid: tuple[int | None, ...] = (None,) if grid is None else tuple(grid)
        check_grid(self.grid)
        self.position, self.num_prefix, self.base, self.softmax = position, num_prefix, base, weights == "softmax"
        self.encoding = None
        if position == "cosine":
            self.encoding = MDLRPE(self.project.head_dim, self.grid, base, num_prefix, learned=learned)

    @property
    def to_output(self) -> nn.Linear:
        """W_o."""
        return self.project.to_output

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """One sum over all positions, read at each."""
        queries, keys, values = (widened(part) for part in self.project(x))
        keys = sequence_softmax(keys, reset) if self.softmax else elu_plus_one(keys)
        if self.position is not None:
            here = self._places(x, reset)
            if self.encoding is not None:
                queries, keys = self.encoding(queries, here), self.encoding(keys, here)
            else:
                queries, keys = (rotate_on_grid(part, here, self.base) for part in (queries, keys))
        return self.project.read_out(whole_attention(queries, keys, values, reset=reset).to(x.dtype), x)

    def _places(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """Where the tokens stand, (1 or batch, time, axes)."""
        if reset is None:
            return grid_places(self.grid, x.shape[1], x.device, self.num_prefix).unsqueeze(0)
        if self.grid != (None,):
            raise ConfigurationError(f"a row is one grid of {self.grid}: several cannot be packed, pass no resets")
        return (places(reset, x.shape[0], x.shape[1], x.device) - self.num_prefix).clamp(min=0).unsqueeze(-1)
