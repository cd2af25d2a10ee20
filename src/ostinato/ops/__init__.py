"""Engines: pure functions on tensors, one per algebraic class of recurrence.

Each takes its inputs batch first and time second, a state or None, and `reset`; each returns its outputs
and the last state. `ostinato.ops.routes` says how one is computed, and how to choose.
"""

from ostinato.ops.attention import attention
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.delta_step import delta_step
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.exponential_attention import exponential_attention
from ostinato.ops.kernels import load as _load_kernels
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.linear_step import linear_step, projections_step, swiglu_step
from ostinato.ops.long_convolution import long_convolution
from ostinato.ops.newton_scan import newton_scan
from ostinato.ops.normalization import add_rms_norm, gated_rms_norm, rms_norm
from ostinato.ops.outer_gated_attention import outer_gated_attention
from ostinato.ops.recurrent_scan import recurrent_scan
from ostinato.ops.routes import ENGINES, Engine, backend
from ostinato.ops.scan import affine_scan, associative_scan
from ostinato.ops.short_convolution import short_convolution
from ostinato.ops.swiglu import swiglu
from ostinato.ops.taylor_attention import taylor_attention

_load_kernels()

__all__ = [
    "ENGINES",
    "Engine",
    "add_rms_norm",
    "affine_scan",
    "associative_scan",
    "attention",
    "backend",
    "delta_rule",
    "delta_step",
    "diagonal_scan",
    "exponential_attention",
    "gated_rms_norm",
    "linear_attention",
    "linear_step",
    "long_convolution",
    "newton_scan",
    "outer_gated_attention",
    "projections_step",
    "recurrent_scan",
    "rms_norm",
    "short_convolution",
    "swiglu",
    "swiglu_step",
    "taylor_attention",
]
