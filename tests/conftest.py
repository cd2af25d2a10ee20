"""What every test runs under: one thread, its own seed, poisoned memory, no forced route left behind."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from ostinato.ops import routes
from ostinato.testing.runs import poisoned

settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; these are other packages' own, at import or inside, and not ours to mend."""
    for module in ("transformers", "accelerate", "torch._dynamo", "torch.export", "torch.jit", "fla", "mlstm_kernels"):
        config.addinivalue_line("filterwarnings", rf"ignore::Warning:{module}(\..*)?")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers for a test wherever and after whatever it runs."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what other packages draw from)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN: reading what was never written shows."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _routes_stay_free() -> Iterator[None]:
    """A test that leaves a route forced, or a default type or thread count changed, fails: the next would suffer."""
    before = dict(routes._forced)
    yield
    left, dtype, threads = dict(routes._forced), torch.get_default_dtype(), torch.get_num_threads()
    routes._forced.clear()
    routes._forced.update(before)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    assert left == before, f"a route was left forced: {left}"
    assert dtype == torch.float32, f"the default type was left at {dtype}"
    assert threads == 1, f"the number of threads was left at {threads}"
