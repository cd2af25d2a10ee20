"""mLSTM: a matrix memory with one forget gate and one input gate per head, the input gate exponential or not.

Source: xLSTM (arXiv 2405.04517), section 2.3; Tiled Flash Linear Attention (arXiv 2503.14376), sections 2
and 4; the layer is that of xLSTM-7B (arXiv 2503.13427).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.heads import HeadNorm, MatrixState, QueriesKeysValues, head_width, widened
from ostinato.ops.exponential_attention import ExponentialState, exponential_attention
from ostinato.ops.linear_attention import linear_attention

EXPONENTIAL = Traits(
    engine="exponential_attention",
    transition="data scalar",
    input_gate="exponential",
    state="heads × key_dim × value_dim, heads × key_dim, heads",
    paper="mLSTM (arXiv 2405.04517)",
)
SIGMOID = Traits(
    engine="linear_attention",
    transition="data scalar",
    input_gate="sigmoid",
    state="heads × key_dim × value_dim",
    paper="mLSTMsig (arXiv 2503.14376)",
)


class MLSTM(Mixer):
    """C_t = f_t C_{t−1} + i_t k_t v_tᵀ, n_t = f_t n_{t−1} + i_t k_t, with f = σ(f̃) and q = W_q x K^{−1/2}.

    exponential: i = exp(ĩ),  h_t = C_tᵀ q_t / (max(|n_tᵀ q_t|, 1) + ε), in units of a running maximum;
    sigmoid:     i = σ(ĩ),    h_t = C_tᵀ q_t, with `normalize` divided by max(|n_tᵀ q_t|, 1) + ε.
    The gates are c·tanh((w·x + b)/c); y = W_o [σ(W_g x) ⊙ LayerNorm(h)], the norm over each head.

    Args:
        d_model: width.
        heads: number of heads; must divide d_model.
        expand_k, expand_v: total width of keys and of values over d_model (rounded down per head).
        input_gate: "exponential" or "sigmoid".
        normalize: for the sigmoid gate; the exponential one always normalises.
        soft_cap: c; None for no cap.
        layers: the number of layers of the model, for the initial size of W_o: N(0, (2 / (layers √d_model))²).
        input_bias: initial bias of the input gates.
        eps: ε of the normaliser.
        norm_eps: of the LayerNorm. At the initial input bias h is about 1e-5, so this one matters.
    """

    traits = EXPONENTIAL

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        input_gate: str = "exponential",
        normalize: bool = False,
        soft_cap: float | None = 15.0,
        layers: int = 1,
        input_bias: float = -10.0,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        if input_gate not in ("exponential", "sigmoid"):
            raise ConfigurationError(f"input_gate must be 'exponential' or 'sigmoid', got {input_gate!r}")
        if input_gate == "exponential" and normalize:
            raise ConfigurationError("the exponential gate always normalises; normalize is for input_gate='sigmoid'")
        if input_gate == "sigmoid":
            self.traits = SIGMOID
        self.heads, self.input_gate, self.normalize = heads, input_gate, normalize
        self.soft_cap, self.eps = soft_cap, eps
        self.key_dim, self.value_dim = head_width(d_model, heads, expand_k), head_width(d_model, heads, expand_v)
        self.project = QueriesKeysValues(d_model, heads, self.key_dim, self.value_dim)
        self.to_gate = nn.Linear(d_model, heads * self.value_dim, bias=False)
        self.to_input, self.to_forget = nn.Linear(d_model, heads), nn.Linear(d_model, heads)
        self.norm = HeadNorm(heads, self.value_dim, eps=norm_eps, bias=False)
        self.to_output = nn.Linear(heads * self.value_dim, d_model, bias=False)

        for linear in (self.project.to_queries, self.project.to_keys, self.project.to_values, self.to_gate):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / (5 * d_model)))
        nn.init.normal_(self.to_output.weight, std=2 / (layers * math.sqrt(d_model)))
        nn.init.zeros_(self.to_input.weight)
        nn.init.zeros_(self.to_forget.weight)
        nn.init.constant_(self.to_input.bias, input_bias)
        with torch.no_grad():
            self.to_forget.bias.copy_(torch.linspace(3, 6, heads))

    scan = staticmethod(linear_attention)
    """The engine of the sigmoid gate. An instance may be given another one with the same arguments."""

    def initial_state(self, batch_size: int) -> ExponentialState | MatrixState:
        """Zeros; memory, normaliser and running maximum, or with the sigmoid gate the memory alone."""
        shape = (batch_size, self.heads, self.key_dim)
        if self.input_gate == "sigmoid":
            return MatrixState(self.zeros(*shape, self.value_dim + self.normalize), None)
        return ExponentialState(self.zeros(*shape, self.value_dim), self.zeros(*shape), self.zeros(*shape[:2]))

    def mix(
        self, x: Tensor, state: ExponentialState | MatrixState, reset: Tensor | None
    ) -> tuple[Tensor, ExponentialState | MatrixState]:
        """The recurrence, over the whole sequence."""
        queries, keys, values, _ = self.project(x, None, reset)
        queries = queries * self.key_dim**-0.5
        raw_input = self._capped(self.to_input(x))
        log_forget = F.logsigmoid(self._capped(self.to_forget(x)))
        if isinstance(state, ExponentialState):
            hidden, state = exponential_attention(
                queries, keys, values, raw_input, log_forget, state, reset=reset, eps=self.eps
            )
        else:
            hidden, state = self._sigmoid(queries, keys, values, raw_input, log_forget, state, reset)
        return self.to_output(torch.sigmoid(self.to_gate(x)) * self.norm(hidden)), state

    def _sigmoid(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        raw_input: Tensor,
        log_forget: Tensor,
        state: MatrixState,
        reset: Tensor | None,
    ) -> tuple[Tensor, MatrixState]:
        """Linear attention; the normaliser is one more value channel, written with the value 1."""
        # The gate is float32 under half precision; kernels want keys of the values' type.
        keys = (keys * torch.sigmoid(raw_input).unsqueeze(-1)).to(values.dtype)
        if self.normalize:
            values = F.pad(values, (0, 1), value=1.0)
        hidden, memory = self.scan(queries, keys, values, log_forget, state.memory, reset=reset)
        if self.normalize:
            hidden = hidden[..., :-1] / (hidden[..., -1:].abs().clamp(min=1) + self.eps)
        return hidden, MatrixState(memory, None)

    def _capped(self, gate: Tensor) -> Tensor:
        gate = widened(gate)
        return gate if self.soft_cap is None else self.soft_cap * torch.tanh(gate / self.soft_cap)
