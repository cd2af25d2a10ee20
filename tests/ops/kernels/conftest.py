"""Kernels are tested on a GPU where there is one, else in Triton's interpreter (`TRITON_INTERPRET=1`), else not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato.ops.kernels.triton.launch import _INSTALLED, INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say how it would."""
    runnable = _INSTALLED and (INTERPRETED or torch.cuda.is_available())
    for item in items:
        if "ops/kernels" in item.nodeid and not runnable:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1 and triton installed"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., str]:
    """Runs a script in a process of its own, kernels compiled anew, and returns what it printed.

    It can import `offline`, to compile for a card that is not there, and `machine_code`.
    """

    def run(script: str, *arguments: str) -> str:
        cache, path = str(tmp_path / "cache"), os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


if _INSTALLED and INTERPRETED:
    # Triton 3.6's interpreter takes int() of arrays of one element, which NumPy 2.4 refuses: bounds of loops.
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patched(tensor: Any, scope: Any) -> None:
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patched

    # It keeps bfloat16 as integers: it multiplies them as such, and drops digits where the card rounds to even.
    _convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def _rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
        return _convert(data, source, target, mode)

    def _widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(_convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return _dot(self, a, b, *rest)

    interpreter._convert_float = _rounded
    interpreter.InterpreterBuilder.create_dot = _widened
