from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ostinato.errors import BackendError, UnknownNameError
from ostinato.ops import routes
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.routes import ENGINES, Engine, backend


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine of its own, taken out of the registry afterwards."""
    made = Engine("an_engine_of_this_test")
    made.route("reference")(lambda x: ("reference", x))
    made.route("parallel", priority=10, declines=lambda x: "small" if x < 10 else None)(lambda x: ("parallel", x))
    yield made
    del ENGINES[made.name]


def test_the_highest_priority_that_does_not_decline(engine: Engine) -> None:
    assert engine(20) == ("parallel", 20)
    assert engine(5) == ("reference", 5)
    assert engine.choose(20).priority == 10


def test_forcing(engine: Engine) -> None:
    with backend("reference"):
        assert engine(20)[0] == "reference"
        with backend("parallel"):
            assert engine(5)[0] == "parallel"  # Declining is only for a free choice.
        assert engine(20)[0] == "reference"
    assert engine(20)[0] == "parallel"


def test_forcing_one_engine(engine: Engine) -> None:
    with backend(an_engine_of_this_test="reference"):
        assert engine(20)[0] == "reference"
        assert ENGINES["diagonal_scan"].choose(torch.zeros(1, 9, 1), torch.zeros(1, 9, 1), None).name == "parallel"
    with backend("parallel", an_engine_of_this_test="reference"):
        assert engine(20)[0] == "reference"


def test_an_error_inside_the_block_lifts_the_force(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), backend("reference"):
        _ = 1 / 0
    assert engine(20)[0] == "parallel"


def test_unknown_names(engine: Engine) -> None:
    with (
        pytest.raises(BackendError, match=r"no engine has a route 'refrence'; known: .*reference"),
        backend("refrence"),
    ):
        pass
    with pytest.raises(UnknownNameError, match="did you mean 'delta_rule'"), backend(delta_rul="reference"):
        pass
    with (
        backend(an_engine_of_this_test="nowhere"),
        pytest.raises(BackendError, match=r"has no route 'nowhere' \(it has parallel, reference\)"),
    ):
        engine(1)


def test_a_backend_registers_itself(engine: Engine) -> None:
    """A kernel takes what it can by priority; what it refuses falls to the next; forced, it says why."""

    @engine.route("native", priority=20, refuses=lambda x: "x is odd" if x % 2 else None)
    def kernel(x: int) -> tuple[str, int]:
        return "native", x

    assert engine(20)[0] == "native"
    assert engine(21)[0] == "parallel"
    with backend("native"):
        assert engine(2)[0] == "native"
        with pytest.raises(BackendError, match=r"forced route 'native' of an_engine_of_this_test .*: x is odd"):
            engine(21)
    del engine.routes["native"]
    assert engine(20)[0] == "parallel"
    with pytest.raises(BackendError), backend("native"):
        pass


def test_a_fake_kernel_of_a_real_engine() -> None:
    """Registered from outside, without touching the engine, and gone again."""
    real = ENGINES["diagonal_scan"]
    calls = []

    @real.route("fake", priority=99)
    def fake(transition: torch.Tensor, inputs: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        calls.append(inputs.shape)
        return real.routes["parallel"].function(transition, inputs, *rest)

    a, b = torch.rand(2, 1, 9, 3)
    try:
        found = diagonal_scan(a, b)[0]
        with backend("fake"):
            diagonal_scan(a, b)
        assert calls == [b.shape, b.shape]
    finally:
        del real.routes["fake"]
    assert torch.equal(found, diagonal_scan(a, b)[0])
    assert len(calls) == 2


def test_nothing_can_serve() -> None:
    made = Engine("an_engine_that_refuses")
    try:
        made.route("reference", refuses=lambda x: "never")(lambda x: x)
        with pytest.raises(BackendError, match="no route of an_engine_that_refuses"):
            made(1)
    finally:
        del ENGINES[made.name]


def test_a_single_step_takes_the_definition() -> None:
    q, k, v = torch.randn(3, 1, 1, 1, 2)
    chosen = ENGINES["delta_rule"].choose(q, k, v)
    assert chosen.name == "reference"
    with backend("parallel"):
        assert ENGINES["delta_rule"].choose(q, k, v).name == "parallel"
        forced = delta_rule(q, k, v)
    torch.testing.assert_close(forced, delta_rule(q, k, v))


PROGRAM = """
import torch
from ostinato.ops import routes
from ostinato.ops.diagonal_scan import diagonal_scan
a = torch.rand(1, 9, 1)
try:
    print(routes.ENGINES["diagonal_scan"].choose(a, a, a[:, 0]).name, float(diagonal_scan(a, a)[1]) > 0)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("value", "printed"),
    [(None, "parallel True"), ("reference", "reference True"), ("warp", "BackendError diagonal_scan has no route")],
)
def test_environment_variable(value: str | None, printed: str) -> None:
    environment = {name: old for name, old in os.environ.items() if name != "OSTINATO_BACKEND"}
    if value is not None:
        environment["OSTINATO_BACKEND"] = value
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(printed)


def test_the_force_is_visible_while_it_lasts() -> None:
    before = dict(routes._forced)
    with backend("reference"):
        assert routes._forced[""] == "reference"
    assert routes._forced == before
