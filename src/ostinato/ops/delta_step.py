"""`delta_step`: one step of a gated delta rule from its raw gates, in place: what streaming a delta-rule mixer runs.

    S ← exp(−A softplus(a + b)) S;   n times: S ← S + β_j k_j (v_j − S^T k_j)ᵀ, β_j = c σ(r_j);   y = scale · Sᵀ q

with q and k of unit length. The recurrence is that of `delta_rule`, the gates are those of Gated DeltaNet
(arXiv 2412.06464), section 3.4, and without a, A and b those of DeltaNet (arXiv 2406.06484).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import accumulation_dtype, check_sequence, check_shape
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.routes import Engine

_engine = Engine("delta_step")


@_engine.route("reference")
@_engine.route("parallel", priority=10)
def _plainly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    steps: Tensor | None,
    log_rate: Tensor | None,
    step_bias: Tensor | None,
    memory: Tensor,
    largest_rate: float,
    unit: bool,
    scale: float,
) -> Tensor:
    beta = torch.sigmoid(rates) * largest_rate
    log_decay = None
    if steps is not None and log_rate is not None and step_bias is not None:
        wide = accumulation_dtype(steps.dtype)
        softplus = F.softplus(steps.to(wide) + step_bias.to(wide))
        log_decay = (-log_rate.to(accumulation_dtype(log_rate.dtype)).exp() * softplus).unsqueeze(1)
    outputs, after = delta_rule(queries.unsqueeze(1), keys, values, beta, log_decay, memory, normalize=unit)
    memory.copy_(after)
    return outputs.squeeze(1) * scale


def delta_step(
    queries: Float[Tensor, "batch heads key_dim"],
    keys: Float[Tensor, "batch writes heads key_dim"],
    values: Float[Tensor, "batch writes heads value_dim"],
    rates: Float[Tensor, "batch writes heads"],
    steps: Float[Tensor, "batch heads"] | None,
    log_rate: Float[Tensor, " heads"] | None,
    step_bias: Float[Tensor, " heads"] | None,
    memory: Float[Tensor, "batch heads key_dim value_dim"],
    *,
    largest_rate: float = 1.0,
    unit: bool = True,
    scale: float = 1.0,
) -> Float[Tensor, "batch heads value_dim"]:
    """y of one step; `memory` becomes that after it.

    Args:
        queries, keys, values: q, k_j, v_j.
        rates: r_j, before the sigmoid.
        steps, log_rate, step_bias: a, log A and b of the decay; all None for none.
        memory: S, changed in place.
        largest_rate: c.
        unit: divide queries and keys by their length, as `delta_rule` does with `normalize`.
        scale: factor of y.

    In the type of `queries`, summed in float32 at least. No derivatives on the GPU's route.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
    """
    check_sequence("queries", queries, "batch heads key_dim")
    check_sequence("keys", keys, "batch writes heads key_dim")
    check_sequence("values", values, "batch writes heads value_dim")
    (batch, heads, key_dim), writes, value_dim = queries.shape, keys.shape[1], values.shape[-1]
    check_shape("keys", keys, (batch, writes, heads, key_dim), "batch writes heads key_dim, as queries")
    check_shape("values", values, (batch, writes, heads, value_dim), "batch writes heads value_dim, as keys")
    check_shape("rates", rates, (batch, writes, heads), "batch writes heads")
    check_shape("memory", memory, (batch, heads, key_dim, value_dim), "batch heads key_dim value_dim")
    if (steps is None, log_rate is None, step_bias is None) not in ((True,) * 3, (False,) * 3):
        raise ShapeError("a decay needs steps, log_rate and step_bias, all three")
    if steps is not None and log_rate is not None and step_bias is not None:
        check_shape("steps", steps, (batch, heads), "batch heads")
        check_shape("log_rate", log_rate, (heads,), "heads")
        check_shape("step_bias", step_bias, (heads,), "heads")
    result: Tensor = _engine(
        queries, keys, values, rates, steps, log_rate, step_bias, memory, largest_rate, unit, scale
    )
    return result
