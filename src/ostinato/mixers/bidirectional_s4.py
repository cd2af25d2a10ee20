"""S4 in both directions: two kernels, one for the past and one for the future, and one output part.

    y_t = Σ_{k ≥ 0} K_k u_{t−k} + Σ_{k ≥ 0} K'_k u_{t+1+k} + D u_t;   then GELU, Linear(d → 2d), GLU

The future begins at t + 1, so that no input is counted twice.

Source: S4 (arXiv 2111.00396), section 4.3 and the authors' code (two kernels, joined in a circle).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import StateError
from ostinato.mixers.s4 import S4


class BidirectionalS4(nn.Module):
    """Reads a whole sequence, and so keeps nothing of the law: it has no state, and stands not in the registry.

    It takes the place of a mixer in a block that reads whole sequences, and accepts only the arguments of that case.

    Args:
        d_model: width.
        options: of `S4`, but for `output`.
    """

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__()
        self.d_model = d_model
        self.past, self.future = (S4(d_model, output="none", **options) for _ in range(2))
        self.future.skip.requires_grad_(False).zero_()
        self.to_output = nn.Linear(d_model, 2 * d_model)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: None = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], None]:
        """All outputs, and None where mixers give their state.

        Raises:
            StateError: a state or resets, which it has not.
            ShapeError, DtypeError: x does not fit.
        """
        if state is not None or reset is not None:
            raise StateError("a bidirectional S4 reads whole sequences: it takes neither a state nor resets")
        behind, _ = self.past(x)
        # The future of t in the order of time reversed, without t itself: everything before it there.
        turned = torch.cat([torch.zeros_like(x[:, :1]), x.flip(1)[:, :-1]], dim=1)
        ahead, _ = self.future(turned)
        return F.glu(self.to_output(F.gelu(behind + ahead.flip(1))), dim=-1), None
