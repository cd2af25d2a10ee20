"""A mixer by any structured matrix: Y = std · M(X) V + V, between one input and one output map.

Source: Hydra (arXiv 2407.09941), section 2 and the authors' code: one block for all classes of matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers import matrix_kinds
from ostinato.mixers.base import Traits, split_heads
from ostinato.mixers.centred_convolution import CentredConvolution
from ostinato.mixers.heads import softplus_steps, step_biases, widened
from ostinato.mixers.matrix_kinds import KINDS, LEARNED_ALONE
from ostinato.mixers.parts import GatedNorm
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.quasiseparable import Direction, quasiseparable, quasiseparable_matrix
from ostinato.ops.sequences import places, same_sequence, sequence_sum, whole_attention
from ostinato.ops.toeplitz import toeplitz

_MAKES = {"toeplitz": 0, "vandermonde": 2, "cauchy": 2, "low_rank": 2, "attention": 2, "quasiseparable": 2}
"""How many vectors of qk_dim numbers a step and head give; toeplitz gives two numbers instead."""
_PLAIN = ("vandermonde", "cauchy", "attention")
"""Kinds whose parameters take no activation after the convolution."""


class MatrixMixer(WholeMixer):
    """[z, v, p] = W_in x, v = silu(conv(v));   y = std · M(p) v + v;   out = W_o [RMSNorm(y) ⊙ silu(z)].

    With `data_dependent` every parameter p of M comes from the token that it belongs to (the matrix is aligned with the
    sequence, and goes on to any length); otherwise M is learned for max_len places. A quasiseparable matrix has queries
    and keys shared by its directions, decays for each, and a diagonal. Keeps of the law what `WholeMixer` says.

    Args:
        d_model: width.
        kind: one of `KINDS` (see `ostinato.mixers.matrix_kinds`).
        data_dependent: see above; "dense" and "dft" cannot be.
        heads: number of heads; must divide expand · d_model. None takes heads of width 128, or one head.
        qk_dim: of queries and keys.
        max_len: places of a matrix that does not depend on the data; None takes 128.
        expand: inner width over d_model.
        conv: taps of the convolution, odd; it looks both ways.
        displaced: with "toeplitz", the released code's indices (see `ostinato.ops.toeplitz`); not with resets.
        eps: of the norm.

    Raises `ConfigurationError` for options that do not fit, and for a sequence longer than max_len.
    """

    traits = Traits(
        engine="linear_attention",
        transition="identity",
        state="none: the matrix, or what its kind needs while it runs",
        paper="Hydra (arXiv 2407.09941)",
    )
    no_weight_decay = frozenset({"log_rate", "step_bias", "skip", "offset"})

    def __init__(
        self,
        d_model: int,
        kind: str = "low_rank",
        data_dependent: bool = True,
        heads: int | None = None,
        qk_dim: int = 16,
        max_len: int | None = None,
        expand: int = 2,
        conv: int = 7,
        displaced: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        if kind not in KINDS:
            raise ConfigurationError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
        if data_dependent and kind in LEARNED_ALONE:
            raise ConfigurationError(f"a {kind} matrix cannot be made by tokens: pass data_dependent=False")
        if displaced and kind != "toeplitz":
            raise ConfigurationError("displaced is for kind='toeplitz'")
        inner = expand * d_model
        heads = (inner // 128 if inner % 128 == 0 else 1) if heads is None else heads
        split_heads(inner, heads, "expand · d_model")
        self.kind, self.data_dependent, self.heads, self.qk_dim = kind, data_dependent, heads, qk_dim
        self.displaced, self.max_len = displaced, 128 if max_len is None else max_len
        made = self._sizes()
        given = list(made.values()) if data_dependent else []
        # Step sizes and Toeplitz's numbers bypass the convolution, as Hydra's step sizes do.
        self.convolved = [inner, *(size for name, size in made.items() if name in ("queries", "keys"))]
        self.convolved = self.convolved if data_dependent else [inner]
        self.widths = [inner, inner, *given]
        self.to_input = nn.Linear(d_model, sum(self.widths), bias=False)
        self.convolution = CentredConvolution(sum(self.convolved), conv)
        self.learned = nn.ParameterDict()
        if not data_dependent:
            for name, size in made.items():
                self.learned[f"{name}_at"] = nn.Parameter(torch.randn(self.max_len, size))
        if kind == "dense":
            self.learned["matrix"] = nn.Parameter(torch.empty(heads, self.max_len, self.max_len))
            nn.init.xavier_uniform_(self.learned["matrix"])
        if kind == "cauchy":
            self.offset = nn.Parameter(torch.full((1,), 0.5))
        if kind == "quasiseparable":
            self.log_rate, self.step_bias = nn.Parameter(torch.zeros(heads)), step_biases(heads)
            self.skip = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(inner, gate="silu", eps=eps)
        self.to_output = nn.Linear(inner, d_model, bias=False)

    def _sizes(self) -> dict[str, int]:
        """The parameters of M at one place, and how many numbers each has over all heads."""
        if self.kind == "toeplitz":
            return {"below": self.heads, "above": self.heads}
        if self.kind not in _MAKES:
            return {}
        found = {"queries": self.heads * self.qk_dim, "keys": self.heads * self.qk_dim}
        if self.kind == "quasiseparable":
            found |= {"past_steps": self.heads, "future_steps": self.heads, "diagonal": self.heads}
        return found

    def _made(self, u: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The gate, the values by heads, and the parameters of M, each (batch, time, heads[, qk_dim])."""
        gate, values, *given = self.to_input(u).split(self.widths, dim=-1)
        names = list(self._sizes())
        parts = dict(zip(names, given, strict=True)) if self.data_dependent else {}
        joined = [values, *(parts[name] for name in ("queries", "keys") if name in parts)]
        values, *mixed = self.convolution(torch.cat(joined, dim=-1), reset).split(self.convolved, dim=-1)
        active = mixed if self.kind in _PLAIN else [F.silu(part) for part in mixed]
        parts |= dict(zip(("queries", "keys"), active, strict=False))
        if not self.data_dependent:
            batch, time = u.shape[:2]
            if time > self.max_len:
                raise ConfigurationError(f"this matrix was learned for {self.max_len} places, got {time}")
            tables = {name: self.learned[f"{name}_at"] for name in names}
            if reset is None:  # every row has the same: a slice, whose gradient is a plain sum
                parts = {name: at[:time].expand(batch, -1, -1) for name, at in tables.items()}
            else:
                here = self._places(u, reset)
                parts = {name: at[here] for name, at in tables.items()}
        split = {name: part.unflatten(-1, (self.heads, -1)) for name, part in parts.items()}
        shaped = {name: part if name in ("queries", "keys") else part.squeeze(-1) for name, part in split.items()}
        return gate, F.silu(values).unflatten(-1, (self.heads, -1)), shaped

    def _places(self, u: Tensor, reset: Tensor | None) -> Tensor:
        return places(reset, u.shape[0], u.shape[1], u.device)

    def _directions(self, parts: dict[str, Tensor]) -> tuple[Direction, Direction, Tensor]:
        """The past, the future and the diagonal of a quasiseparable matrix."""
        steps = [softplus_steps(parts[name], self.step_bias) for name in ("past_steps", "future_steps")]
        rate = -widened(self.log_rate).exp()
        past, future = (Direction(parts["queries"], parts["keys"], rate * step, step) for step in steps)
        return past, future, parts["diagonal"] + self.skip

    def matrix(self, u: Tensor, reset: Tensor | None = None) -> Tensor:
        """std · M, (batch, heads, time, time), without the residual; entry by entry, from the definition."""
        return self._matrix(u, self._made(u, reset)[2], reset)

    def _matrix(self, u: Tensor, parts: dict[str, Tensor], reset: Tensor | None) -> Tensor:
        here = self._places(u, reset)
        same = None if reset is None else same_sequence(reset)
        lengths = self._lengths(u, reset)
        if self.kind == "dense":
            found = self.learned["matrix"][:, here.unsqueeze(2), here.unsqueeze(1)].transpose(0, 1)
        elif self.kind == "toeplitz":
            starts = torch.arange(u.shape[1], device=u.device) - here
            found = matrix_kinds.toeplitz_matrix_of(parts["below"], parts["above"], here, starts)
        elif self.kind == "vandermonde":
            found = matrix_kinds.vandermonde_matrix(
                parts["queries"], parts["keys"], here, data_dependent=self.data_dependent
            )
        elif self.kind == "dft":
            found = matrix_kinds.dft_matrix(here, lengths, self.heads, u.dtype)
        elif self.kind == "cauchy":
            found = matrix_kinds.cauchy_matrix(parts["queries"], parts["keys"], self.offset)
        elif self.kind == "low_rank":
            found = matrix_kinds.low_rank_matrix(parts["queries"], parts["keys"])
        elif self.kind == "attention":
            found = matrix_kinds.attention_matrix(parts["queries"], parts["keys"], same)
        else:
            return self._quasiseparable_matrix(parts, same)
        scaled = found * matrix_kinds.scales(self.kind, lengths.to(found.dtype), self.qk_dim)[:, None, :, None]
        return scaled if same is None else scaled * same.unsqueeze(1)

    def _quasiseparable_matrix(self, parts: dict[str, Tensor], same: Tensor | None) -> Tensor:
        past, future, diagonal = self._directions(parts)
        found = quasiseparable_matrix(past, future, diagonal)
        return found if same is None else found * same.unsqueeze(1)

    def _lengths(self, u: Tensor, reset: Tensor | None) -> Tensor:
        """The length of each step's own sequence, (batch, time)."""
        if reset is None:
            return torch.full(u.shape[:2], u.shape[1], device=u.device)
        return sequence_sum(torch.ones_like(reset, dtype=torch.long), reset)

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """M v by the way that its kind affords, the residual, the norm and the gate."""
        gate, values, parts = self._made(x, reset)
        y = self._product(x, values, parts, reset) + values
        return self.to_output(self.norm(y.flatten(-2), gate))

    def _product(self, x: Tensor, values: Tensor, parts: dict[str, Tensor], reset: Tensor | None) -> Tensor:
        """std · M v, (batch, time, heads, dim)."""
        if self.kind == "quasiseparable":
            past, future, diagonal = self._directions(parts)
            return quasiseparable(values, past, future, diagonal, reset=reset)
        if self.kind == "low_rank":
            read = whole_attention(parts["queries"], parts["keys"], values, reset=reset)
            scale = matrix_kinds.scales(self.kind, self._lengths(x, reset).to(values.dtype), self.qk_dim)
            return read * scale[:, :, None, None]
        if self.kind == "toeplitz" and reset is None:
            below, above = parts["below"].transpose(1, 2), parts["above"].transpose(1, 2)
            product = toeplitz(below, above, values.transpose(1, 2), displaced=self.displaced).transpose(1, 2)
            return product * matrix_kinds.scale_of(self.kind, x.shape[1], self.qk_dim)
        if self.displaced:
            raise ConfigurationError("the displaced Toeplitz matrix wraps around: several sequences cannot share a row")
        if not self.data_dependent and reset is None:  # one matrix for all rows
            only = {name: part[:1] for name, part in parts.items()}
            return torch.einsum("htl,blhd->bthd", self._matrix(x[:1], only, None)[0], values)
        return torch.einsum("bhtl,blhd->bthd", self._matrix(x, parts, reset), values)
