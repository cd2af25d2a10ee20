"""Batch normalisation of sequences: every channel by its mean and variance over batch and time.

Unlike a layer norm it leaves the steps of a sequence as loud, one against another, as they were.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class SequenceBatchNorm(nn.BatchNorm1d):
    """y = γ (x − μ)/√(σ² + ε) + β, channel by channel.

    In training μ and σ² are those of all steps of the batch, so outputs depend on later steps too; in evaluation
    they are running averages, and a sequence may come in parts. Keeps the type of x. One value per channel in
    training is a `ValueError` of PyTorch.

    Source: batch normalisation (arXiv 1502.03167); between S4 layers, S4 (arXiv 2111.00396), appendix D.5.
    """

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The normed sequence."""
        return super().forward(x.flatten(0, 1)).view(x.shape)
