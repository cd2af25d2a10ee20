"""MD-TPE: positions on a grid put into the embeddings, by a decaying sum along each axis.

    y = Σ_axes T_axis x,   (T x)_n = Σ_{s ≤ n} t_{n−s} x_s,   t_j = Σ_{r ≤ e} b_{c,r} λ_r^j   ("channels")
                                                             t_j = (q_h · k_h) λ_h^j          ("heads")

along every line of the grid, from its beginning: a place is told by how much lies before it. Not symmetric: it runs
from the first corner to the last.

Source: LightNet (arXiv 2405.21022), section 4.2; the form by heads is the first author's later code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.md_lrpe import check_grid

FORMS = ("heads", "channels")


class MDTPE(nn.Module):
    """What goes before the first layer: y = W RMSNorm_heads(Σ_axes T x) by heads, Σ_axes T x by channels.

    Args:
        d_model: width.
        heads: of the norm and, in the form by heads, of the exponentials; must divide d_model.
        axes: the sizes of the grid, walked row by row; (None,) is one dimension of any length.
        rank: e, exponentials for each channel (by heads there is one).
        form: "heads" or "channels".
        key_dim: of q and k in the form by heads; they start at 1 / √key_dim, so that t_0 starts at 1.
        num_prefix: tokens before the grid, which pass as they are.

    By heads the output replaces the embeddings, as the source has it; by channels too. Raises `ConfigurationError`.
    """

    no_weight_decay = frozenset({"raw_decay", "queries", "keys", "weights"})

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        axes: Sequence[int | None] = (None,),
        rank: int = 1,
        *,
        form: str = "heads",
        key_dim: int = 16,
        num_prefix: int = 0,
    ) -> None:
        super().__init__()
        check_grid(axes)
        if form not in FORMS:
            raise ConfigurationError(f"form is one of {', '.join(FORMS)}, got {form!r}")
        if d_model < 1 or heads < 1 or d_model % heads or rank < 1 or (form == "heads" and rank != 1):
            raise ConfigurationError(
                f"heads={heads} must divide d_model={d_model}, and rank={rank} be at least 1 (exactly 1 by heads)"
            )
        self.d_model, self.heads, self.axes, self.form = d_model, heads, tuple(axes), form
        self.num_prefix = num_prefix
        count = len(self.axes)
        if form == "heads":
            self.raw_decay = nn.Parameter(torch.randn(count, heads, 1))
            self.queries = nn.Parameter(torch.full((count, heads, key_dim), key_dim**-0.5))
            self.keys = nn.Parameter(torch.full((count, heads, key_dim), key_dim**-0.5))
            self.norm = nn.RMSNorm(d_model // heads, eps=1e-5)
            self.to_output = nn.Linear(d_model, d_model, bias=False)
        else:
            self.raw_decay = nn.Parameter(torch.randn(count, d_model, rank))
            self.weights = nn.Parameter(torch.ones(count, d_model, rank) / rank)

    def kernel(self, axis: int, length: int) -> Float[Tensor, "length channels"]:
        """t_0 … t_{length−1} of one axis, for every channel."""
        log_decay = nn.functional.logsigmoid(self.raw_decay[axis])
        powers = torch.exp(log_decay * torch.arange(length, device=log_decay.device).view(-1, 1, 1))
        if self.form == "channels":
            return (powers * self.weights[axis]).sum(-1)
        scale = (self.queries[axis] * self.keys[axis]).sum(-1)
        return (powers.squeeze(-1) * scale).repeat_interleave(self.d_model // self.heads, dim=1)

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        """The embeddings with their places in them."""
        prefix, x = x[:, : self.num_prefix], x[:, self.num_prefix :]
        sizes = [x.shape[1]] if self.axes == (None,) else [int(size or 0) for size in self.axes]
        if x.shape[1] != math.prod(sizes):
            raise ConfigurationError(f"a grid of {sizes} and a prefix of {self.num_prefix} do not hold {x.shape[1]}")
        grid = x.unflatten(1, sizes)
        total = torch.zeros_like(grid)
        for axis, size in enumerate(sizes):
            total = total + _along(grid, self.kernel(axis, size).to(x.dtype), axis + 1)
        y = total.flatten(1, len(sizes))
        if self.form == "heads":
            y = self.to_output(self.norm(y.unflatten(-1, (self.heads, -1))).flatten(-2))
        return torch.cat([prefix, y], dim=1)


def _along(grid: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """The causal convolution of every line along an axis, by Fourier transform."""
    length = 2 * grid.shape[axis]
    lines = grid.movedim(axis, -2)
    wide = lines.float() if lines.dtype in (torch.bfloat16, torch.float16) else lines
    spectrum = torch.fft.rfft(wide, n=length, dim=-2) * torch.fft.rfft(kernel.to(wide.dtype), n=length, dim=0)
    y = torch.fft.irfft(spectrum, n=length, dim=-2)[..., : grid.shape[axis], :]
    return y.to(grid.dtype).movedim(-2, axis)
