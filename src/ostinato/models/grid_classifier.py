"""The grid classifier: vectors on a grid, blocks that read the whole of it, and one answer from the mean.

    x ← TPE(W x) (or W x);   x ← x + mixer(norm(x)), x ← x + swiglu(norm(x)), …;   y = W mean(norm(x))

Source: LightNet (arXiv 2405.21022), its image classifier, made small.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, StateError
from ostinato.mixers.base import Mixer
from ostinato.models.backbone import Backbone
from ostinato.models.plan import Plan
from ostinato.ops.checks import check_sequence


class GridClassifier(nn.Module):
    """Vectors (batch, places, features) -> logits (batch, places, num_classes), the same at every place.

    Args:
        features: width of the vectors.
        num_classes: labels.
        d_model, plan, depth: see `Backbone`; mixers may read the whole sequence.
        positions: a module that puts places into the embeddings, as `MDTPE`; None for none.

    Raises `ConfigurationError` for sizes below 1.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        d_model: int,
        plan: str | Plan,
        depth: int | None = None,
        *,
        positions: nn.Module | None = None,
        channel_mixer: str | None = "swiglu",
    ) -> None:
        super().__init__()
        if features < 1 or num_classes < 1:
            raise ConfigurationError(f"features and num_classes must be positive, got {features} and {num_classes}")
        self.encoder = nn.Linear(features, d_model)
        self.positions = positions
        self.backbone = Backbone(d_model, plan, depth, channel_mixer=channel_mixer)
        self.head = nn.Linear(d_model, num_classes)

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixers, first layer first."""
        return self.backbone.mixers

    def forward(
        self, x: Float[Tensor, "batch places features"], state: Any = None, *, reset: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch places classes"], None]:
        """The logits, and None where other models give their state.

        Raises:
            StateError: a state or resets, which a whole grid has not.
            ShapeError, DtypeError: x does not fit.
        """
        if state is not None or reset is not None:
            raise StateError("a grid is read as a whole: it takes neither a state nor resets")
        check_sequence("x", x, "batch places features")
        y = self.encoder(x)
        y = y if self.positions is None else self.positions(y)
        logits = self.head(self.backbone(y)[0].mean(1, keepdim=True))
        return logits.expand(-1, x.shape[1], -1), None
