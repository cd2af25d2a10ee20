"""RMSNorm in front of matrix products: it writes the type that they read.

Source: Root Mean Square Layer Normalization (arXiv 1910.07467), section 4.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ostinato.ops.checks import product_dtype
from ostinato.ops.normalization import add_rms_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """y = w ⊙ x / √(mean x² + eps) over the last axis: torch's module, by the engine `rms_norm`.

    Under autocast y is in autocast's type: rounded once, here, and not again for every product that takes it.
    """

    weight: nn.Parameter
    eps: float

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """The norm."""
        return rms_norm(x, self.weight, self.eps, dtype=product_dtype(x))

    def behind_sum(
        self, x: Float[Tensor, "... dim"], branch: Float[Tensor, "... dim"]
    ) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... dim"]]:
        """x + branch, and its norm: a residual connection and the norm behind it, in one pass over memory."""
        return add_rms_norm(x, branch, self.weight, self.eps, dtype=product_dtype(x))
