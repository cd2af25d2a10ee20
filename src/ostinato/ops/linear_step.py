"""Products of a single step: a few vectors, whose cost is reading the weights once and launching kernels.

    linear_step          y = W z + residual,                  z = x, gated and to RMS norm 1, as asked for
    swiglu_step          y = silu(W_g z) ⊙ W_v z
    projections_step     y_i = W_i z for several W_i, then a short convolution over some of them, then silu

Each is one launch on a GPU. The plain route is the same modules one after the other: z is rounded to the weights' type,
products are summed in float32 at least and rounded once. For steps without derivatives; windows are changed in place.

Source: RMSNorm (arXiv 1910.07467), section 4; SwiGLU (arXiv 2002.05202), section 2; the short convolution as in
`ostinato.ops.short_convolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DtypeError, ShapeError
from ostinato.ops.checks import check_shape
from ostinato.ops.normalization import GATES, gated_rms_norm, rms_norm
from ostinato.ops.routes import Engine
from ostinato.ops.short_convolution import joint_short_convolution

_linear = Engine("linear_step")
_projections = Engine("projections_step")


class Window(NamedTuple):
    """The short convolution of a step: its taps, its bias, and its last inputs, oldest first."""

    weight: Float[Tensor, "width channels"]
    bias: Float[Tensor, " channels"] | None
    inputs: Float[Tensor, "batch taps channels"]


def _entering(
    x: Tensor,
    norm: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    dtype: torch.dtype,
) -> Tensor:
    """z: x with its gate and its norm, rounded once."""
    if norm is None:
        if gate is None:
            return x.to(dtype)
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return (x * (F.silu(wide) if activation == "silu" else torch.sigmoid(wide))).to(dtype)
    x = x.unflatten(-1, (-1, len(norm)))
    if gate is None:
        return rms_norm(x, norm, eps, dtype=dtype).flatten(1)
    gate = gate.unflatten(-1, (-1, len(norm)))
    z = gated_rms_norm(x, gate, norm, eps, activation=activation, gate_first=gate_first, dtype=dtype)
    return z.flatten(1)


@_linear.route("reference")
@_linear.route("parallel", priority=10)
def _linear_plainly(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    entered: Tensor | None,
) -> Tensor:
    z = _entering(x, norm, gate, eps, activation, gate_first, weights[0].dtype)
    y = F.linear(z, weights[0])
    if len(weights) == 2:
        y = F.silu(y) * F.linear(z, weights[1])
    if entered is not None:
        entered.copy_(z)
    return y if residual is None else residual + y


@_projections.route("reference")
@_projections.route("parallel", priority=10)
def _projections_plainly(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    taps: Tensor | None,
    bias: Tensor | None,
    window: Tensor | None,
    eps: float,
    silu: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    z = _entering(x, norm, None, eps, "silu", False, weights[0].dtype)
    parts = [F.linear(z, weight).unsqueeze(1) for weight in weights]
    count = 0
    if taps is not None and window is not None:
        widths = [part.shape[-1] for part in parts]
        count = next(n for n in range(len(widths) + 1) if sum(widths[:n]) == taps.shape[1])
        parts[:count], after = joint_short_convolution(parts[:count], taps, window, bias=bias, silu=silu[:count])
        window.copy_(after)
    return tuple(
        F.silu(part.squeeze(1)) if activated and i >= count else part.squeeze(1)
        for i, (part, activated) in enumerate(zip(parts, silu, strict=True))
    )


def _check(x: Tensor, weights: Sequence[Tensor], norm: Tensor | None, **rows: Tensor | None) -> None:
    for name, tensor in [("x", x), ("norm", norm), *rows.items(), *(("a weight", weight) for weight in weights)]:
        if tensor is not None and not tensor.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {tensor.dtype}")
    if x.ndim != 2 or x.numel() == 0:
        raise ShapeError(f"x must be (batch, inputs), neither of them empty, got shape {tuple(x.shape)}")
    inputs = x.shape[1]
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != inputs:
            raise ShapeError(f"a weight must be (outputs, {inputs}), as x has {inputs}, got {tuple(weight.shape)}")
    if norm is not None and (norm.ndim != 1 or inputs % max(len(norm), 1)):
        raise ShapeError(f"norm must be (dim,) with dim a divisor of {inputs}, got {tuple(norm.shape)}")
    for name, tensor in rows.items():
        if tensor is not None:
            width = len(weights[0]) if name == "residual" else inputs
            check_shape(name, tensor, (len(x), width), "batch channels")


def linear_step(
    x: Float[Tensor, "batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    *,
    norm: Float[Tensor, " dim"] | None = None,
    gate: Float[Tensor, "batch inputs"] | None = None,
    residual: Float[Tensor, "batch outputs"] | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    gate_first: bool = False,
    entered: Float[Tensor, "batch inputs"] | None = None,
) -> Float[Tensor, "batch outputs"]:
    """y = W z + residual.

    Args:
        x: the vectors.
        weight: W.
        norm: w of an RMS norm, z = w ⊙ x / √(mean x² + eps); with dim less than `inputs`, every dim channels (a head)
            for themselves. None takes x as it is.
        gate: z is multiplied by act(gate) after its norm, or before it with `gate_first`.
        residual: added to the product.
        activation: of the gate, "silu" or "sigmoid".
        entered: z is written into it, where it is wanted too.

    z is in W's type, y in the wider one of W's and the residual's. No derivatives on the GPU's route.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: another activation.
    """
    if activation not in GATES:
        raise ConfigurationError(f"activation must be one of {', '.join(GATES)}, got {activation!r}")
    _check(x, [weight], norm, gate=gate, residual=residual, entered=entered)
    result: Tensor = _linear(x, (weight,), norm, gate, residual, eps, activation, gate_first, entered)
    return result


def swiglu_step(
    x: Float[Tensor, "batch inputs"],
    gate_weight: Float[Tensor, "outputs inputs"],
    value_weight: Float[Tensor, "outputs inputs"],
    *,
    norm: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "batch outputs"]:
    """silu(W_g z) ⊙ W_v z, with z the norm of x as in `linear_step`; in the weights' type. Raises as `linear_step`."""
    _check(x, [gate_weight, value_weight], norm)
    check_shape("value_weight", value_weight, tuple(gate_weight.shape), "outputs inputs, as gate_weight")
    result: Tensor = _linear(x, (gate_weight, value_weight), norm, None, None, eps, "silu", False, None)
    return result


def projections_step(
    x: Float[Tensor, "batch inputs"],
    weights: Sequence[Float[Tensor, "_ inputs"]],
    *,
    norm: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
    convolution: Window | None = None,
    silu: Sequence[bool] | None = None,
) -> tuple[Float[Tensor, "batch _"], ...]:
    """W_i z for every W_i, z the norm of x; the first maps then convolved in time, and those with `silu` activated.

    Args:
        x, norm, eps: as for `linear_step`.
        weights: W_i, of one type.
        convolution: over the first maps, as many as its channels are (queries, keys and values, say). Its `inputs`
            are changed in place: the oldest leaves, W_i z comes in.
        silu: which outputs are silu(y), after the convolution; None for none.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
    """
    _check(x, weights, norm)
    silu = (False,) * len(weights) if silu is None else tuple(silu)
    if len(silu) != len(weights) or not weights:
        raise ShapeError(f"silu names {len(silu)} outputs, and there are {len(weights)} weights")
    if norm is not None:
        check_shape("norm", norm, (x.shape[1],), "inputs")
    taps, bias, window = (None, None, None) if convolution is None else convolution
    if taps is not None and window is not None:
        width, channels = taps.shape
        widths = [len(weight) for weight in weights]
        if channels not in [sum(widths[:n]) for n in range(1, len(widths) + 1)]:
            raise ShapeError(f"a convolution of {channels} channels does not end with a map, of widths {widths}")
        check_shape("the window's inputs", window, (len(x), width - 1, channels), "batch taps channels")
        if bias is not None:
            check_shape("the window's bias", bias, (channels,), "channels")
    result: tuple[Tensor, ...] = _projections(x, tuple(weights), norm, taps, bias, window, eps, silu)
    return result
