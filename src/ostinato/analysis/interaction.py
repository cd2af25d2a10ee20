"""The interaction operator of a sequence layer: y_i = Σ_j W_ij(X) x_j, its rank over all pairs, its reach.

    w = interaction_operator(mixer("mamba2", 16), x)      # (n, n, outputs, features)
    interaction_rank(w), effective_rank(w)
    gradient_highway(layer, x, [1, 10, 100])

W is not unique for a layer that is not linear. The convention here: everything that decides how much is passed on
(scores, decays, steps, gates, norms' scales) is frozen at X, and the values pass through linearly; a pointwise
activation on their way, s(u), counts as the gate s(u)/u. The Jacobian ∂y_i/∂x_j, which also moves the gates, is
another object.

Source: Ghodsi, How Many Heads Make an SSM? (arXiv 2512.15115); definitions by our reading.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.mixers.attention import Attention
from ostinato.mixers.heads import KeyValueMixer
from ostinato.mixers.lru import LRU
from ostinato.mixers.mamba import Mamba
from ostinato.mixers.mamba2 import Mamba2
from ostinato.mixers.s5 import S5
from ostinato.mixers.time_invariant import TimeInvariant
from ostinato.ops.routes import backend

Layer = Callable[[Tensor], Any]
"""A map (batch, time, features) -> (batch, time, outputs), or a tuple that starts with it; a module or a function."""


def interaction_operator(
    layer: Layer, x: Float[Tensor, "n d"], *, frozen: bool | None = None
) -> Float[Tensor, "n n p d"]:
    """W_ij(X) for all pairs; zero above the diagonal for a causal layer.

    Args:
        layer: a module, or a function. Batch rows must not touch each other.
        x: one sequence.
        frozen: True for the convention above, False for the Jacobian ∂y_i/∂x_j; None freezes the layers that it knows
            (`can_freeze`), and takes the Jacobian elsewhere, which is the same for a layer that is linear.

    In the type of x; use float64, float32 hides small singular values. Raises `ShapeError` for another shape, and
    `ConfigurationError` for `frozen=True` on a layer whose gates are not known.

    Source: arXiv 2512.15115, the unified map.
    """
    if x.ndim != 2 or not x.numel():
        raise ShapeError(f"x is one sequence, (time, features) and not empty, got {tuple(x.shape)}")
    if frozen and not can_freeze(layer):
        raise ConfigurationError(
            f"{type(layer).__name__} has gates that are not known here; frozen=False gives the Jacobian"
        )
    with torch.no_grad():
        width = _outputs(layer, x.unsqueeze(0)).shape[-1]
    n, d = x.shape
    copies = x.detach().expand(n * width, n, d).contiguous().requires_grad_()
    with torch.enable_grad(), _frozen_gates(layer) if frozen or frozen is None else contextlib.nullcontext():
        y = _outputs(layer, copies)
        # One copy of the sequence for each output: one backward pass gives all rows.
        (rows,) = torch.autograd.grad(y.flatten(1).diagonal().sum(), copies)
    return rows.view(n, width, n, d).permute(0, 2, 1, 3)


def can_freeze(layer: Layer) -> bool:
    """Whether `interaction_operator` knows which parts of the layer are gates."""
    return isinstance(layer, Attention | KeyValueMixer | Mamba | Mamba2 | S5 | LRU | TimeInvariant)


def singular_values(w: Float[Tensor, "*pairs p d"]) -> Float[Tensor, " k"]:
    """Of the matrix whose rows are vec W over all pairs, falling."""
    if w.ndim < 3:
        raise ShapeError(f"operators are (…, outputs, features), got {tuple(w.shape)}")
    return torch.linalg.svdvals(w.flatten(0, -3).flatten(1))


def interaction_rank(w: Float[Tensor, "*pairs p d"], tol: float = 1e-10) -> int:
    """dim span{vec W_ij}: how many singular values exceed tol · σ₁. Zero operators do not count.

    An attention layer of H heads has at most H, for every X and all scores. Source: arXiv 2512.15115.
    """
    values = singular_values(w)
    return int((values > tol * values[0]).sum()) if float(values[0]) > 0 else 0


def effective_rank(w: Float[Tensor, "*pairs p d"]) -> float:
    """exp of the entropy of σ²/Σσ²: how many dimensions carry the operators, small ones weighed."""
    share = singular_values(w).square()
    share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
    return math.exp(float(torch.special.entr(share).sum()))


def gradient_highway(
    layer: Layer, x: Float[Tensor, "n d"], distances: Sequence[int], *, at: int = -1, frozen: bool = False
) -> Float[Tensor, " distances"]:
    """J(i − j) = ‖∂y_i/∂x_j‖_F at the position i = `at` (the last), for each distance.

    With `frozen` the values' path only (‖W_ij‖_F), else the full Jacobian. Raises `ShapeError` for a distance that
    leads out of the sequence.
    """
    here = at % x.shape[0]
    if not all(0 <= distance <= here for distance in distances):
        raise ShapeError(f"distances from position {here} are 0 … {here}, got {list(distances)}")
    with torch.no_grad():
        width = _outputs(layer, x.unsqueeze(0)).shape[-1]
    copies = x.detach().expand(width, *x.shape).contiguous().requires_grad_()
    with torch.enable_grad(), _frozen_gates(layer) if frozen else contextlib.nullcontext():
        y = _outputs(layer, copies)[:, here]
        (rows,) = torch.autograd.grad(y.diagonal().sum(), copies)
    return rows[:, [here - distance for distance in distances]].square().sum(dim=(0, 2)).sqrt()


def _outputs(layer: Layer, x: Tensor) -> Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


class _FrozenActivations(TorchFunctionMode):
    """Pointwise activations as multiplications by a gate that has no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x: Any = args[0] if args else None
        if func is F.silu:
            return x * torch.sigmoid(x.detach())
        if func is F.gelu:
            return x * torch.special.ndtr(x.detach())
        if func is F.glu:
            values, gates = x.chunk(2, dim=kwargs.get("dim", args[1] if len(args) > 1 else -1))
            return values * torch.sigmoid(gates.detach())
        if func is F.rms_norm:
            with torch.no_grad():
                scale = func(*args, **kwargs) / torch.where(x == 0, torch.ones_like(x), x)
            return x * scale
        if func in (torch.sigmoid, torch.Tensor.sigmoid, F.softplus):
            return func(x.detach(), *args[1:], **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _frozen_gates(layer: Layer) -> Iterator[None]:
    """While it lasts, nothing but the values of a known layer passes gradients."""
    if not can_freeze(layer):
        yield
        return
    assert isinstance(layer, nn.Module)
    handles = [module.register_forward_hook(_cut(live)) for module, live in _gates(layer)]
    try:
        # The plain routes, whose operations a mode sees.
        with _FrozenActivations(), backend(rms_norm="parallel", swiglu="parallel", short_convolution="parallel"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _cut(live: slice | None) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        fixed = output.detach()
        if live is None:
            return fixed
        return torch.cat([fixed[..., : live.start], output[..., live], fixed[..., live.stop :]], dim=-1)

    return hook


def _gates(layer: nn.Module) -> list[tuple[nn.Module, slice | None]]:
    """The linear maps that make scores, decays and gates, with the slice of their outputs that is values."""
    if isinstance(layer, Attention):
        return [(layer.to_query, None), (layer.to_key, None)]
    if isinstance(layer, KeyValueMixer):
        values = (layer.project.to_values, layer.to_output)
        return [(part, None) for part in layer.modules() if isinstance(part, nn.Linear) and part not in values]
    if isinstance(layer, Mamba):
        return [(layer.to_input, slice(0, layer.inner)), (layer.to_selection, None)]
    if isinstance(layer, Mamba2):
        inner = layer.outer_widths[0]
        return [(layer.to_input, slice(inner, 2 * inner))]
    return []
