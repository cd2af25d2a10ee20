"""Kernels are tested on a GPU where there is one, else in Triton's interpreter (`TRITON_INTERPRET=1`), else not."""

from __future__ import annotations

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


if _INSTALLED and INTERPRETED:
    # Triton 3.6's interpreter takes int() of arrays of one element, which NumPy 2.4 refuses: bounds of loops.
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patched(tensor: Any, scope: Any) -> None:
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patched
