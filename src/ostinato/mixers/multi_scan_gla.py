"""Gated linear attention scanned in several orders: what a multiplicative decay needs to see a whole grid.

    one scan      row by row, from the first token on
    two scans     that, and backwards
    four scans    those, and column by column, on and backwards

Source: the comparison of LightNet (arXiv 2405.21022); four orders: VMamba (arXiv 2401.10166), cross-scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.layers.md_lrpe import check_grid
from ostinato.mixers.base import Traits
from ostinato.mixers.gla import GLA
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import reversed_reset


class MultiScanGLA(WholeMixer):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t in each order, with the same q, k, v, α; out goes the sum.

    The projections are computed once, the scans as one, stacked along the batch. Keeps of the law what `WholeMixer`
    says (with one scan it is causal too); on a grid a row cannot be packed.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        scans: 1, 2, or 4, which needs a grid.
        grid: (rows, columns), walked row by row; None is one dimension.
        expand_k: total width of keys over d_model.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        state="none: scans × heads × key_dim × value_dim while it runs",
        paper="LightNet (arXiv 2405.21022)",
    )

    def __init__(
        self, d_model: int, heads: int = 4, scans: int = 2, grid: Sequence[int] | None = None, expand_k: float = 1.0
    ) -> None:
        super().__init__(d_model)
        if scans not in (1, 2, 4) or (scans == 4) > (grid is not None) or (grid is not None and len(grid) != 2):
            raise ConfigurationError(f"scans are 1, 2, or 4 on a grid of two axes; got {scans} on {grid}")
        check_grid((None,) if grid is None else tuple(grid))
        self.gla, self.scans, self.grid = GLA(d_model, heads, expand_k=expand_k), scans, grid

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """Every order at once."""
        if reset is not None and self.grid is not None:
            raise ConfigurationError(f"a row is one grid of {tuple(self.grid)}: several cannot be packed")
        gla = self.gla
        queries, keys, values, _ = gla.project(x, None, reset)
        parts = (queries * gla.key_dim**-0.5, keys, values, gla.log_decay(x))
        orders = [self._ordered(part) for part in parts]
        marks = None
        if reset is not None:
            marks = torch.cat([reset, reversed_reset(reset)]) if self.scans == 2 else reset
        outputs, _ = linear_attention(*orders, reset=marks)
        return gla.read_out(self._gathered(outputs), x)

    def _ordered(self, x: Tensor) -> Tensor:
        """The sequence in every order, stacked along the batch."""
        found = [x]
        if self.scans == 4:
            found.append(self._turned(x, on=True))
        if self.scans > 1:
            found += [one.flip(1) for one in found]
        return torch.cat(found)

    def _gathered(self, y: Tensor) -> Tensor:
        """The outputs of all orders at their places, summed."""
        found = list(y.chunk(self.scans))
        if self.scans > 1:
            half = self.scans // 2
            found = found[:half] + [one.flip(1) for one in found[half:]]
        if self.scans == 4:
            found[1], found[3] = self._turned(found[1], on=False), self._turned(found[3], on=False)
        return torch.stack(found).sum(0)

    def _turned(self, x: Tensor, *, on: bool) -> Tensor:
        """Row by row -> column by column (`on`), or back."""
        assert self.grid is not None
        rows, columns = self.grid
        if x.shape[1] != rows * columns:
            raise ConfigurationError(f"a grid of {rows} × {columns} does not hold {x.shape[1]} tokens")
        return x.unflatten(1, (rows, columns) if on else (columns, rows)).transpose(1, 2).flatten(1, 2)
