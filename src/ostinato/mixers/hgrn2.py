"""HGRN2: a memory whose keys are what its decays forget, with a floor under the decays that rises with depth.

Source: HGRN2 (arXiv 2404.07904), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.rms_norm import RMSNorm
from ostinato.mixers.base import Mixer, Traits, split_heads
from ostinato.mixers.heads import MatrixState, cleared, padding, widened
from ostinato.ops.linear_attention import linear_attention


def lower_bounds(logits: Float[Tensor, "layers d_model"]) -> Float[Tensor, "layers d_model"]:
    """γ of every layer and channel: the cumulative sum over layers of softmax(Γ), less its first row.

    γ is 0 in the first layer and rises towards 1. A model of several HGRN2 layers holds one Γ (zeros at
    first), and passes row l to `HGRN2.mix_above` of layer l.
    """
    share = logits.softmax(dim=0)
    return share.cumsum(dim=0) - share[:1]


class HGRN2(Mixer):
    """S_t = diag(α_t) S_{t−1} + (1 − α_t) v_tᵀ, o_t = S_tᵀ q_t with α_t = γ + (1 − γ) σ(W_f x).

    q = silu(W_q x) K^{−1/2}, v = W_i x; y = W_o RMSNorm(o), the norm over the full width.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model. The paper has heads of width 128.
        lower_bound: γ, in [0, 1): the same for all channels, and fixed. The paper's first layer has 0; in its
            deeper layers γ is learned across layers, see `lower_bounds` and `mix_above`.
        eps: of the norm.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        input_gate="tied",
        state="heads × key_dim × value_dim",
        paper="HGRN2 (arXiv 2404.07904)",
    )

    def __init__(self, d_model: int, heads: int = 4, lower_bound: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.heads, self.key_dim = heads, split_heads(d_model, heads)
        if not 0 <= lower_bound < 1:
            raise ConfigurationError(f"lower_bound is a decay, at least 0 and below 1, got {lower_bound}")
        self.lower_bound = lower_bound
        self.to_queries, self.to_forget, self.to_values = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.norm = RMSNorm(d_model, eps=eps)
        self.to_output = nn.Linear(d_model, d_model, bias=False)

    scan = staticmethod(linear_attention)
    """The engine. An instance may be given another one with the same arguments."""

    def initial_state(self, batch_size: int) -> MatrixState:
        """Zeros."""
        return MatrixState(self.zeros(batch_size, self.heads, self.key_dim, self.key_dim), None)

    def mix(self, x: Tensor, state: MatrixState, reset: Tensor | None) -> tuple[Tensor, MatrixState]:
        """The recurrence, over the whole sequence."""
        return self.mix_above(x, state, reset, self.lower_bound)

    def mix_above(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lower_bound: float | Float[Tensor, " d_model"]
    ) -> tuple[Tensor, MatrixState]:
        """The recurrence, with the decays' lower bound given from outside."""
        outputs, state = self._remember(x, state, reset, lower_bound, None)
        return self.read_out(outputs, x), state

    def remember(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        """What is read from the memory at every step; steps from `lengths` on are padding."""
        return self._remember(x, state, reset, self.lower_bound, lengths)

    def read_out(self, outputs: Tensor, x: Tensor) -> Tensor:
        """W_o RMSNorm(o)."""
        return self.to_output(self.norm(outputs.flatten(-2)))

    def _remember(
        self,
        x: Tensor,
        state: MatrixState,
        reset: Tensor | None,
        lower_bound: float | Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, MatrixState]:
        forget = widened(self.to_forget(x))
        # 1 − α and log α, each from the form that keeps its digits.
        keys = (1 - lower_bound) * torch.sigmoid(-forget)
        decay = lower_bound + (1 - lower_bound) * torch.sigmoid(forget)
        tiny = torch.finfo(decay.dtype).tiny
        log_decay = torch.where(keys < 0.5, torch.log1p(-keys.clamp(max=0.5)), decay.clamp(min=tiny).log())
        padded = padding(lengths, x.shape[1])
        outputs, memory = self.scan(
            self._split(F.silu(self.to_queries(x)) * self.key_dim**-0.5),
            self._split(cleared(keys, padded)),
            self._split(self.to_values(x)),
            self._split(cleared(log_decay, padded)),
            state.memory,
            reset=reset,
        )
        return outputs, MatrixState(memory, None)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
