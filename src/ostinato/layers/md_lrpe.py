"""MD-LRPE: relative positions on a grid for linear attention, by cosines and sines in more channels.

    Θ_s = (s_1 θ, …, s_m θ), cut to D angles;   x ↦ [x ⊙ cos Θ_s, x ⊙ sin Θ_s] ∈ R^{2D}
    q'_s · k'_t = Σ_c q_c k_c cos(Θ_{s,c} − Θ_{t,c}): a function of s − t alone

and of |s_i − t_i| on every axis: the cosines cannot tell before from after. There is also the rotary form,
which can, turning pairs of channels and keeping their number.

Source: LightNet (arXiv 2405.21022), section 4.3, and the authors' operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.rotary import rotate
from ostinato.ops.checks import accumulation_dtype

PARTS = ("full", "low", "high")


class MDLRPE(nn.Module):
    """Queries and keys with their places on a grid; twice as many channels come out as go in.

    Args:
        head_dim: D.
        grid: the sizes n_1, …, n_m of the grid, walked row by row; (None,) is one dimension of any length.
        base: θ_j = base^{−j/e} for the e = ⌈D/m⌉ angles of an axis.
        num_prefix: tokens before the grid (class tokens, conditions); their angles are 0.
        part: "full", or only the "low" or the "high" half of the frequencies; the others are 0.
        learned: whether θ is learned, from these values.

    Raises `ConfigurationError` for sizes below 1, an unknown part.
    """

    def __init__(
        self,
        head_dim: int,
        grid: Sequence[int | None] = (None,),
        base: float = 10000.0,
        num_prefix: int = 0,
        *,
        part: str = "full",
        learned: bool = False,
    ) -> None:
        super().__init__()
        check_grid(grid)
        if head_dim < 1 or num_prefix < 0 or part not in PARTS:
            raise ConfigurationError(
                f"head_dim is at least 1, num_prefix at least 0 and part one of {', '.join(PARTS)}; "
                f"got {head_dim}, {num_prefix}, {part!r}"
            )
        self.head_dim, self.grid, self.num_prefix = head_dim, tuple(grid), num_prefix
        self.base, self.part = base, part
        self.theta = nn.Parameter(self.frequencies(torch.device("cpu")).float()) if learned else None

    def frequencies(self, device: torch.device) -> Float[Tensor, " angles"]:
        """θ, in float64 where the device has it; learned or not."""
        exact = torch.float32 if device.type == "mps" else torch.float64
        theta: nn.Parameter | None = getattr(self, "theta", None)
        if theta is not None:
            return theta.to(exact)
        count = -(-self.head_dim // len(self.grid))
        index = torch.arange(count, dtype=exact, device=device)
        slow = index >= -(-count // 2)
        kept = {"full": torch.ones_like(slow), "low": slow, "high": ~slow}[self.part]
        return self.base ** (-index / count) * kept

    def angles(self, places: Int[Tensor, "... axes"]) -> Float[Tensor, "... head_dim"]:
        """Θ at these places, in float64 where the device has it."""
        theta = self.frequencies(places.device)
        return (places.to(theta.dtype).unsqueeze(-1) * theta).flatten(-2)[..., : self.head_dim]

    def forward(
        self, x: Float[Tensor, "batch time heads head_dim"], places: Int[Tensor, "... time axes"] | None = None
    ) -> Float[Tensor, "batch time heads twice_head_dim"]:
        """[x ⊙ cos Θ, x ⊙ sin Θ], in the type of x; `places` are those of the grid if None."""
        places = grid_places(self.grid, x.shape[1], x.device, self.num_prefix) if places is None else places
        angles = self.angles(places).unsqueeze(-2)
        wide = x.to(accumulation_dtype(x.dtype))
        cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
        return torch.cat([wide * cos, wide * sin], dim=-1).to(x.dtype)


def grid_places(
    grid: Sequence[int | None], time: int, device: torch.device, num_prefix: int = 0
) -> Int[Tensor, "time axes"]:
    """Where each of `time` tokens stands, walking the grid row by row; a prefix stands at 0.

    Raises `ConfigurationError` if the tokens do not fill the grid.
    """
    count = time - num_prefix
    if tuple(grid) == (None,):
        steps = torch.arange(count, device=device).unsqueeze(-1)
    else:
        sizes = [int(size or 0) for size in grid]
        if count != math.prod(sizes):
            raise ConfigurationError(f"a grid of {sizes} and a prefix of {num_prefix} do not hold {time} tokens")
        axes = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
        steps = torch.stack([axis.flatten() for axis in axes], dim=-1)
    return torch.cat([steps.new_zeros(num_prefix, steps.shape[1]), steps])


def rotate_on_grid(
    x: Float[Tensor, "batch time heads dim"], places: Int[Tensor, "#batch time axes"], base: float = 10000.0
) -> Float[Tensor, "batch time heads dim"]:
    """The rotary form: the channels are dealt out to the axes, and each share turned to its place on its axis.

    Raises `ConfigurationError` if 2 · axes does not divide dim.
    """
    count = places.shape[-1]
    if x.shape[-1] % (2 * count):
        raise ConfigurationError(f"{count} axes turn pairs of channels: {2 * count} must divide {x.shape[-1]}")
    shares = x.chunk(count, dim=-1)
    return torch.cat([rotate(share, places[..., axis], base) for axis, share in enumerate(shares)], dim=-1)


def check_grid(grid: Sequence[int | None]) -> None:
    """Raise `ConfigurationError` unless the sizes are positive; one alone may be None, of any length."""
    if not grid or (len(grid) > 1 and None in grid) or any(size is not None and size < 1 for size in grid):
        raise ConfigurationError(f"a grid has positive sizes, or is (None,) for one of any length; got {tuple(grid)}")
