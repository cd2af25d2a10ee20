"""Softmax attention that is not causal, with rotary positions on any grid: the yardstick of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.md_lrpe import check_grid, grid_places, rotate_on_grid
from ostinato.mixers.base import Traits, split_heads
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.sequences import places, same_sequence


class WholeAttention(WholeMixer):
    """y_t = W_o Σ_s softmax_s(q_t · k_s / √d) v_s over all steps s of the sequence.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        grid: the sizes of a grid, walked row by row; None is one dimension of any length.
        rope: turn queries and keys to their places, the channels dealt out to the axes of the grid.
        base: of the rotary frequencies.

    Keeps of the law what `WholeMixer` says. Source: Attention Is All You Need (arXiv 1706.03762).
    """

    traits = Traits(
        engine="attention",
        transition="identity",
        state="none: all keys and values while it runs",
        linear=False,
        paper="Attention Is All You Need (arXiv 1706.03762)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        grid: Sequence[int] | None = None,
        rope: bool = True,
        base: float = 10000.0,
    ) -> None:
        super().__init__(d_model)
        self.heads, self.head_dim, self.rope, self.base = heads, split_heads(d_model, heads), rope, base
        self.grid: tuple[int | None, ...] = (None,) if grid is None else tuple(grid)
        check_grid(self.grid)
        if rope and self.head_dim % (2 * len(self.grid)):
            raise ConfigurationError(f"{len(self.grid)} axes turn pairs of channels; heads are {self.head_dim} wide")
        self.to_query, self.to_key, self.to_value, self.to_output = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """Projections, places, attention."""
        queries, keys, values = (
            to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_query, self.to_key, self.to_value)
        )
        if reset is not None and self.grid != (None,):
            raise ConfigurationError(f"a row is one grid of {self.grid}: several cannot be packed, pass no resets")
        if self.rope:
            if reset is None:
                here = grid_places(self.grid, x.shape[1], x.device).unsqueeze(0)
            else:
                here = places(reset, x.shape[0], x.shape[1], x.device).unsqueeze(-1)
            queries, keys = (rotate_on_grid(part, here, self.base) for part in (queries, keys))
        # Written out: the fused function cannot be mapped over seeds (`torch.func.vmap`) without a loop.
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) * self.head_dim**-0.5
        if reset is not None:
            scores = scores.masked_fill(~same_sequence(reset).unsqueeze(1), torch.finfo(scores.dtype).min)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
        return self.to_output(y.flatten(-2))
