"""Hydra: a state space model in both directions, as one quasiseparable matrix.

Source: Hydra (arXiv 2407.09941), section 3 and the authors' module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits, split_heads
from ostinato.mixers.centred_convolution import CentredConvolution
from ostinato.mixers.heads import softplus_steps, step_biases, widened
from ostinato.mixers.parts import GatedNorm
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.quasiseparable import Direction, quasiseparable, quasiseparable_matrix, two_scans

JOINS = ("quasiseparable", "add", "multiply", "concatenate")


class Hydra(WholeMixer):
    """y = shift(SS→ x) + shift←(SS← x) + (W_D x + D) ⊙ x;   out = W_o [RMSNorm(y) ⊙ silu(z)].

    [z, x, (B, C)→, (B, C)←, Δ'→, Δ'←] = W_in u; x and all B, C = silu(conv(·)), which looks both ways;
    Δ = softplus(Δ' + b). SS is Mamba-2's S_t = e^{−A Δ_t} S_{t−1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t. The directions
    share x, A and b; A starts at 1. They keep of the law what `WholeMixer` says.

    Args:
        d_model: width.
        heads: number of heads; must divide expand · d_model. None takes heads of width 64, or one head if it is less.
        state_dim: N, the width of B and C.
        groups: how many B and C there are to a direction; must divide heads.
        expand: inner width over d_model.
        conv: taps of the convolution, odd.
        learned_starts: what each direction's memory holds at the beginning of a sequence is learned, not zero.
        join: "quasiseparable", or what it is compared with, each of the scans keeping its diagonal: "add" (the sum of
            both, the diagonal counted twice), "multiply" (their product), "concatenate" (side by side before W_o).
        eps: of the norm, which is over all channels.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data scalar",
        input_gate="delta",
        state="none: heads × state_dim × head_dim in each direction while it runs",
        paper="Hydra (arXiv 2407.09941)",
    )
    no_weight_decay = frozenset({"log_rate", "step_bias", "skip", "starts"})

    def __init__(
        self,
        d_model: int,
        heads: int | None = None,
        state_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        conv: int = 7,
        learned_starts: bool = False,
        join: str = "quasiseparable",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        if join not in JOINS:
            raise ConfigurationError(f"join is one of {', '.join(JOINS)}, got {join!r}")
        inner = expand * d_model
        heads = (inner // 64 if inner % 64 == 0 else 1) if heads is None else heads
        split_heads(inner, heads, "expand · d_model")
        if groups < 1 or heads % groups:
            raise ConfigurationError(f"groups={groups} must divide heads={heads}")
        self.heads, self.groups, self.join = heads, groups, join
        self.inner_widths = [inner, *[groups * state_dim] * 4]
        self.outer_widths = [inner, sum(self.inner_widths), heads, heads]
        self.to_input = nn.Linear(d_model, sum(self.outer_widths), bias=False)
        self.convolution = CentredConvolution(sum(self.inner_widths), conv)
        self.log_rate = nn.Parameter(torch.zeros(heads))
        self.step_bias = step_biases(heads)
        shape = (2, heads, state_dim, inner // heads)
        self.starts = nn.Parameter(torch.zeros(shape)) if learned_starts else None
        self.to_diagonal = nn.Linear(inner, heads, bias=False)
        self.skip = nn.Parameter(torch.ones(heads))
        parts = 2 if join == "concatenate" else 1
        self.norm = GatedNorm(parts * inner, gate="silu", eps=eps)
        self.to_output = nn.Linear(parts * inner, d_model, bias=False)

    def parameters_of_matrix(
        self, u: Tensor, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Direction, Direction, Tensor]:
        """The output gate z, and what makes the matrix: x by heads, the past, the future, the diagonal."""
        gate, mixed, *raw = self.to_input(u).split(self.outer_widths, dim=-1)
        mixed = F.silu(self.convolution(mixed, reset))
        x, *matrices = mixed.split(self.inner_widths, dim=-1)
        keys_past, queries_past, keys_future, queries_future = (self._per_head(part) for part in matrices)
        steps = [softplus_steps(part, self.step_bias) for part in raw]
        decays = [-widened(self.log_rate).exp() * part for part in steps]
        starts = (None, None) if self.starts is None else self.starts.unbind(0)
        past = Direction(queries_past, keys_past, decays[0], steps[0], starts[0])
        future = Direction(queries_future, keys_future, decays[1], steps[1], starts[1])
        return gate, x.unflatten(-1, (self.heads, -1)), past, future, self.to_diagonal(x) + self.skip

    def matrix(self, u: Tensor) -> Tensor:
        """The mixing matrices of a "quasiseparable" join, (batch, heads, time, time), from their definition.

        Learned starts are not in them: they add to y what does not depend on x.
        """
        _, _, past, future, diagonal = self.parameters_of_matrix(u)
        return quasiseparable_matrix(past, future, diagonal)

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """Both scans at once, the diagonal, the norm and the gate."""
        gate, values, past, future, diagonal = self.parameters_of_matrix(x, reset)
        if self.join == "quasiseparable":
            y = quasiseparable(values, past, future, diagonal, reset=reset).flatten(-2)
        else:
            y = self._joined(values, past, future, widened(diagonal).unsqueeze(-1) * widened(values), reset)
        return self.to_output(self.norm(y, gate if y.shape == gate.shape else torch.cat([gate, gate], dim=-1)))

    def _joined(
        self, values: Tensor, past: Direction, future: Direction, skipped: Tensor, reset: Tensor | None
    ) -> Tensor:
        """What the quasiseparable matrix is compared with: two whole state space models, each with half the skip."""
        forward, backward = (out + skipped / 2 for out in two_scans(values, past, future, reset=reset))
        if self.join == "add":
            return (forward + backward).flatten(-2)
        if self.join == "multiply":
            return (forward * backward).flatten(-2)
        return torch.cat([forward.flatten(-2), backward.flatten(-2)], dim=-1)

    def _per_head(self, x: Tensor) -> Tensor:
        """(batch, time, groups · state_dim) -> (batch, time, heads, state_dim): a group's is its heads'."""
        grouped = x.unflatten(-1, (self.groups, 1, -1)).expand(-1, -1, -1, self.heads // self.groups, -1)
        return grouped.flatten(2, 3)
