"""The law, over every registered mixer, every plain route and three types; and that it catches what breaks it."""

from __future__ import annotations

import pytest
import torch

from ostinato.mixers import registry
from ostinato.testing import FREE, PLAIN_ROUTES, check_mixer, law

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", [FREE, *PLAIN_ROUTES])
@pytest.mark.parametrize("name", registry.mixers())
def test_the_law_holds(name: str, route: str, dtype: str) -> None:
    mixer = registry.mixer(name, 16)
    kind = DTYPES[dtype]
    if route != FREE and not law.serves(mixer, route, kind, "cpu"):
        # Not every engine has both routes; the free choice is always held to the law.
        assert route == "parallel", f"{name} has no reference"
        return
    report = check_mixer(mixer, name=name, dtypes=(kind,), routes=(route,), compile=False)
    assert len(report.rows) > 20
    assert any(row.check == "step by step: gradient of parameters" for row in report.rows)


@pytest.mark.parametrize("name", registry.mixers())
def test_forward_compiles_and_step_exports(name: str) -> None:
    report = check_mixer(registry.mixer(name, 16), name=name, routes=(), length=8)
    assert {row.check for row in report.rows} >= {"torch.compile", "torch.export"}
