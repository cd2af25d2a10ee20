"""`rms_norm`: y = w ⊙ x / √(mean x² + eps) over the last axis, alone, behind a sum, or with a gate.

No recurrence, but what stands before and behind every one of them. Written as separate operations it costs more passes
over memory than the recurrence itself; here each is one, and writes the type that the next matrix product reads.

Source: RMSNorm (arXiv 1910.07467), section 4; gate behind the norm: Gated DeltaNet (arXiv 2412.06464), section 3.4;
gate before it: Mamba-2 (arXiv 2405.21060), section 7.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DtypeError, ShapeError
from ostinato.ops.checks import accumulation_dtype, check_shape, own_precision
from ostinato.ops.routes import Engine

_engine = Engine("rms_norm")

GATES = ("silu", "sigmoid")
"""Activations of a gate: silu(g) = g σ(g), and σ(g)."""


def _definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _plainly(
    norm: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    wide = accumulation_dtype(torch.promote_types(total.dtype, weight.dtype))
    with own_precision(x):
        y, weight = total.to(wide), weight.to(wide)
        if gate is None:
            return norm(y, weight, eps).to(dtype), total
        opened = F.silu(gate.to(wide)) if activation == "silu" else torch.sigmoid(gate.to(wide))
        y = norm(y * opened, weight, eps) if gate_first else norm(y, weight, eps) * opened
    return y.to(dtype), total


@_engine.route("reference")
def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _plainly(_definition, *arguments)


@_engine.route("parallel", priority=10)
def _parallel(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _plainly(_fused, *arguments)


def _check(x: Tensor, weight: Tensor, **others: Tensor) -> None:
    for name, tensor in {"x": x, "weight": weight, **others}.items():
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {tensor.dtype}; convert it, e.g. {name}.float()")
    if x.ndim == 0:
        raise ShapeError("x has no axis to take the norm over")
    check_shape("weight", weight, (x.shape[-1],), "dim, as the last axis of x")
    for name, tensor in others.items():
        check_shape(name, tensor, tuple(x.shape), "that of x")


def rms_norm(
    x: Float[Tensor, "... dim"],
    weight: Float[Tensor, " dim"],
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... dim"]:
    """w ⊙ x / √(mean x² + eps) over the last axis.

    Args:
        x, weight: x and w.
        eps: added to the mean square.
        dtype: of the result; None is that of `x`. Computed in float32 at least, and rounded once.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
    """
    _check(x, weight)
    result: Tensor = _engine(x, None, None, weight, eps, "silu", False, dtype or x.dtype)[0]
    return result


def add_rms_norm(
    x: Float[Tensor, "... dim"],
    branch: Float[Tensor, "... dim"],
    weight: Float[Tensor, " dim"],
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... dim"]]:
    """The sum x + branch, and its `rms_norm`: a residual connection and the norm of the next branch, in one pass.

    The sum is in the wider type of the two; `dtype` is that of the norm, the sum's if None. Raises as `rms_norm`.
    """
    _check(x, weight, branch=branch)
    y, total = _engine(x, branch, None, weight, eps, "silu", False, dtype or torch.promote_types(x.dtype, branch.dtype))
    return total, y


def gated_rms_norm(
    x: Float[Tensor, "... dim"],
    gate: Float[Tensor, "... dim"],
    weight: Float[Tensor, " dim"],
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    gate_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... dim"]:
    """rms_norm(x) ⊙ act(gate), or rms_norm(x ⊙ act(gate)) with `gate_first`; act is "silu" or "sigmoid".

    `dtype` is that of the result, of `x` if None; computed in float32 at least, and rounded once. Raises as `rms_norm`,
    and `ConfigurationError` for another activation.
    """
    if activation not in GATES:
        raise ConfigurationError(f"activation must be one of {', '.join(GATES)}, got {activation!r}")
    _check(x, weight, gate=gate)
    result: Tensor = _engine(x, None, gate, weight, eps, activation, gate_first, dtype or x.dtype)[0]
    return result
