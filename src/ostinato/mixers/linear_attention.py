"""Linear attention: an additive memory, read by feature maps of queries.

Source: Transformers are RNNs (arXiv 2006.16236), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Traits
from ostinato.mixers.heads import KeyValueMixer, MatrixState, cleared, find_feature_map, padding


class LinearAttention(KeyValueMixer):
    """S_t = S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t with q = φ(W_q x) K^{−1/2}, k = φ(W_k x); y = W_o RMSNorm(o).

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        feature_map: φ: "elu" (elu + 1), "relu", "silu" or "identity".
        normalize: divide o_t by z_tᵀ q_t, with z_t = Σ k; needs a φ that is not negative.
        output_norm: RMSNorm of every head before W_o.
        conv: taps of a short convolution over q, k and v, followed by SiLU; None for none.
        eps: added to the normaliser.

    With `normalize` the memory has one more value channel, which holds z: it is written with the value 1.
    """

    traits = Traits(
        engine="linear_attention",
        transition="identity",
        state="heads × key_dim × value_dim",
        paper="Linear Transformer (arXiv 2006.16236)",
    )

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "elu",
        normalize: bool = False,
        output_norm: bool = True,
        conv: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, heads, expand_k=expand_k, expand_v=expand_v, conv=conv, gate=None)
        if normalize and feature_map not in ("elu", "relu"):
            raise ConfigurationError(
                f"normalize divides by Σ φ(k)ᵀφ(q), which can have any sign under {feature_map!r}; use 'elu' or 'relu'"
            )
        self.features = find_feature_map(feature_map, "feature_map")
        self.normalize, self.eps = normalize, eps
        if not output_norm:
            self.norm = torch.nn.Identity()

    def initial_state(self, batch_size: int) -> MatrixState:
        """Zeros."""
        memory = self.zeros(batch_size, self.heads, self.key_dim, self.value_dim + self.normalize)
        return MatrixState(memory, self.project.initial_state(batch_size))

    def read_out(self, outputs: Tensor, x: Tensor) -> Tensor:
        """W_o RMSNorm(o)."""
        return self.to_output(self.norm(outputs).flatten(-2))

    def remember(
        self, x: Tensor, state: MatrixState, reset: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        """What is read from the memory at every step."""
        queries, keys, values, window = self.project(x, state.window, reset, lengths)
        if window is not None:
            queries, keys, values = F.silu(queries), F.silu(keys), F.silu(values)
        queries, keys = self.features(queries) * self.key_dim**-0.5, self.features(keys)
        if self.normalize:
            values = F.pad(values, (0, 1), value=1.0)
        keys = cleared(keys, padding(lengths, x.shape[1]))
        outputs, memory = self.scan(queries, keys, values, None, state.memory, reset=reset)
        if self.normalize:
            outputs = outputs[..., :-1] / (outputs[..., -1:] + self.eps)
        return outputs, MatrixState(memory, window)
