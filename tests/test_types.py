"""The shapes and types that signatures declare are those that run: jaxtyping and beartype watch every call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the package must be imported anew under the checker.
SCRIPT = """
import sys, torch
from jaxtyping import install_import_hook
with install_import_hook("ostinato", "typed.check"):
    import ostinato
    from ostinato.mixers import registry
    from ostinato.testing.runs import route
    broken = 0
    for name in registry.mixers():
        for dtype in (torch.float32, torch.bfloat16):
            for forced in ("free", "reference"):
                try:
                    mixer = registry.mixer(name, 16).to(dtype)
                    x = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
                    with route(forced):
                        _, state = mixer(x)
                        y, state = mixer(x, state, reset=torch.rand(2, 9) < 0.3)
                        last, _ = mixer.step(x[:, 0], state)
                        (y.sum() + last.sum()).backward()
                except Exception as error:
                    broken += 1
                    print(name, dtype, forced, type(error).__name__, str(error)[:1500])
sys.exit(bool(broken))
"""


def test_signatures_tell_the_truth() -> None:
    pytest.importorskip("beartype")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
