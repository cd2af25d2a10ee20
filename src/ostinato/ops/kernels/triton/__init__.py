"""Kernels in Triton, for NVIDIA GPUs; in Triton's interpreter (`TRITON_INTERPRET=1`) also on a CPU, for tests.

One file an engine. Each defines `run`, which takes what the engine's routes take, and `refuses`, which
says why it cannot serve a call. They are imported, and Triton with them, at the first call on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ostinato.ops.kernels.triton.launch import INTERPRETED, unavailable
from ostinato.ops.routes import ENGINES

# An import statement for each, not importlib: torch.compile traces the first and not the other.


def _diagonal_scan() -> ModuleType:
    from ostinato.ops.kernels.triton import diagonal_scan

    return diagonal_scan


def _linear_attention() -> ModuleType:
    from ostinato.ops.kernels.triton import linear_attention

    return linear_attention


def _exponential_attention() -> ModuleType:
    from ostinato.ops.kernels.triton import exponential_attention

    return exponential_attention


def _delta_rule() -> ModuleType:
    from ostinato.ops.kernels.triton import delta_rule

    return delta_rule


def _recurrent_scan() -> ModuleType:
    from ostinato.ops.kernels.triton import recurrent_scan

    return recurrent_scan


def _newton_scan() -> ModuleType:
    from ostinato.ops.kernels.triton import newton_scan

    return newton_scan


def _short_convolution() -> ModuleType:
    from ostinato.ops.kernels.triton import short_convolution

    return short_convolution


def _normalization() -> ModuleType:
    from ostinato.ops.kernels.triton import normalization

    return normalization


def _swiglu() -> ModuleType:
    from ostinato.ops.kernels.triton import swiglu

    return swiglu


def _matrix_step() -> ModuleType:
    from ostinato.ops.kernels.triton import matrix_step

    return matrix_step


def _linear_step() -> ModuleType:
    from ostinato.ops.kernels.triton import linear_step

    return linear_step


def _projections_step() -> ModuleType:
    from ostinato.ops.kernels.triton import projections_step

    return projections_step


def _delta_step() -> ModuleType:
    from ostinato.ops.kernels.triton import delta_step

    return delta_step


def _register(engine: str, module: Callable[[], ModuleType]) -> None:
    def refuses(*arguments: Any) -> str | None:
        return unavailable(arguments) or module().refuses(*arguments)

    def declines(*arguments: Any) -> str | None:
        return "Triton's interpreter is for tests" if INTERPRETED else module().declines(*arguments)

    @ENGINES[engine].route("triton", priority=20, refuses=refuses, declines=declines)
    def run(*arguments: Any) -> Any:
        return module().run(*arguments)


for _engine, _module in {
    "diagonal_scan": _diagonal_scan,
    "linear_attention": _linear_attention,
    "exponential_attention": _exponential_attention,
    "delta_rule": _delta_rule,
    "recurrent_scan": _recurrent_scan,
    "newton_scan": _newton_scan,
    "short_convolution": _short_convolution,
    "rms_norm": _normalization,
    "swiglu": _swiglu,
    "linear_step": _linear_step,
    "projections_step": _projections_step,
    "delta_step": _delta_step,
}.items():
    _register(_engine, _module)


def _register_step(engine: str) -> None:
    """A route for single steps without derivatives: one launch."""

    def refuses(*arguments: Any) -> str | None:
        return unavailable(arguments) or _matrix_step().refuses(*arguments)

    def declines(*_: Any) -> str | None:
        return "Triton's interpreter is for tests" if INTERPRETED else None

    @ENGINES[engine].route("triton_step", priority=30, refuses=refuses, declines=declines)
    def run(*arguments: Any) -> Any:
        return getattr(_matrix_step(), f"run_{engine}")(*arguments)


for _engine in ("linear_attention", "exponential_attention", "delta_rule"):
    _register_step(_engine)
