"""Gated linear attention scanned in several orders: what a multiplicative decay needs to see a whole grid.

    one scan      row by row, from the first token on
    two scans     that, and backwards
    four scans    those, and column by column, on and backwards

Source: the comparison of LightNet (arXiv 2405.21022); four orders: VMamba (arXiv 2401.10166), cross-scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.md_lrpe import check_grid
from ostinato.mixers.base import Traits
from ostinato.mixers.gla import GLA
from ostinato.mixers.heads import widened
from ostinato.mixers.whole import WholeMixer
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import reversed_reset


class _Order(nn.Module):
    """The queries, keys and decays of one order."""

    def __init__(self, gla: GLA, rank: int = 16) -> None:
        super().__init__()
        keys = gla.heads * gla.key_dim
        self.heads, self.temperature = gla.heads, gla.temperature
        self.to_queries, self.to_keys = (nn.Linear(gla.d_model, keys, bias=False) for _ in range(2))
        self.to_decay = nn.Sequential(nn.Linear(gla.d_model, rank, bias=False), nn.Linear(rank, keys))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and log α, (batch, time, heads, key_dim)."""
        log_decay = F.logsigmoid(widened(self.to_decay(x))) / self.temperature
        found = (self.to_queries(x), self.to_keys(x), log_decay)
        queries, keys, log_decay = (part.unflatten(-1, (self.heads, -1)) for part in found)
        return queries, keys, log_decay


class MultiScanGLA(WholeMixer):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t in each order; out goes the sum.

    The scans run as one, stacked along the batch. With the same q, k, v and α in every order the sum weighs what lies
    before a step as what lies behind it at the same distance; with its `own` q, k and α an order can differ. Keeps of
    the law what `WholeMixer` says (with one scan it is causal too); on a grid a row cannot be packed.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        scans: 1, 2, or 4, which needs a grid.
        grid: (rows, columns), walked row by row; None is one dimension.
        expand_k: total width of keys over d_model.
        own: whether every order has queries, keys and decays of its own; the values are shared.
    """

    traits = Traits(
        engine="linear_attention",
        transition="data vector",
        state="none: scans × heads × key_dim × value_dim while it runs",
        paper="LightNet (arXiv 2405.21022)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        scans: int = 2,
        grid: Sequence[int] | None = None,
        expand_k: float = 1.0,
        own: bool = False,
    ) -> None:
        super().__init__(d_model)
        if scans not in (1, 2, 4) or (scans == 4) > (grid is not None) or (grid is not None and len(grid) != 2):
            raise ConfigurationError(f"scans are 1, 2, or 4 on a grid of two axes; got {scans} on {grid}")
        check_grid((None,) if grid is None else tuple(grid))
        self.gla, self.scans, self.grid = GLA(d_model, heads, expand_k=expand_k), scans, grid
        self.others = nn.ModuleList(_Order(self.gla) for _ in range(scans - 1 if own else 0))

    def mix_whole(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """Every order at once."""
        if reset is not None and self.grid is not None:
            raise ConfigurationError(f"a row is one grid of {tuple(self.grid)}: several cannot be packed")
        gla = self.gla
        queries, keys, values, _ = gla.project(x, None, reset)
        made = [(queries, keys, gla.log_decay(x)), *(other(x) for other in self.others)]
        each = made if self.others else made * self.scans
        queries, keys, log_decay = (self._ordered(list(parts)) for parts in zip(*each, strict=True))
        marks = None
        if reset is not None:
            marks = torch.cat([reset, reversed_reset(reset)]) if self.scans == 2 else reset
        values = self._ordered([values] * self.scans)
        outputs, _ = linear_attention(queries * gla.key_dim**-0.5, keys, values, log_decay, reset=marks)
        return gla.read_out(self._gathered(outputs), x)

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        """One tensor for each order, put in that order, stacked along the batch."""
        half = max(1, self.scans // 2)
        found = [self._turned(part, on=True) if index % half else part for index, part in enumerate(parts)]
        return torch.cat([part.flip(1) if index >= half else part for index, part in enumerate(found)])

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
