"""SwiGLU: the gated channel mixer that stands between sequence mixers.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    """y = W_o (silu(W_g x) ⊙ W_v x), every time step for itself.

    Args:
        d_model: width.
        hidden: inner width; None takes 8/3 · d_model, rounded up to a multiple of 8, at which the three
            matrices have as many parameters as an ungated layer with inner width 4 · d_model.

    Weights start at N(0, 1 / inputs), so that the layer keeps the scale of what it is given at every width.
    """

    def __init__(self, d_model: int, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is None:
            hidden = 8 * -(-d_model // 3)
        if hidden < 1:
            raise ConfigurationError(f"the inner width of SwiGLU must be positive, got {hidden}")
        self.hidden = hidden
        self.to_gate = nn.Linear(d_model, hidden, bias=False)
        self.to_value = nn.Linear(d_model, hidden, bias=False)
        self.to_output = nn.Linear(hidden, d_model, bias=False)
        for projection in (self.to_gate, self.to_value, self.to_output):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The map itself."""
        return self.to_output(swiglu(self.to_gate(x), self.to_value(x)))
