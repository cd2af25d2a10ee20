"""`swiglu`: y = silu(gate) ⊙ value, the middle of a gated channel mixer, in one pass over memory.

Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import DtypeError
from ostinato.ops.checks import check_shape, in_accumulation_dtype
from ostinato.ops.routes import Engine

_engine = Engine("swiglu")


@_engine.route("reference")
@in_accumulation_dtype
def _reference(gate: Tensor, value: Tensor) -> Tensor:
    return gate * gate.sigmoid() * value


@_engine.route("parallel", priority=10)
def _parallel(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def swiglu(gate: Float[Tensor, "... dim"], value: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """silu(gate) ⊙ value = gate σ(gate) ⊙ value, in the type of `gate`.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
    """
    for name, tensor in (("gate", gate), ("value", value)):
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be floating point, got {tensor.dtype}; convert it, e.g. {name}.float()")
    check_shape("value", value, tuple(gate.shape), "that of gate")
    result: Tensor = _engine(gate, value)
    return result.to(gate.dtype)
