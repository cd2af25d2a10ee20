"""SwiGLU: its formula, its width, its errors."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.layers.swiglu import SwiGLU


def test_the_formula() -> None:
    layer, x = SwiGLU(6, hidden=10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ layer.to_gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.to_value.weight.T)) @ layer.to_output.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("d_model", "hidden"), [(3, 8), (16, 48), (96, 256), (256, 688)])
def test_the_inner_width_is_eight_thirds_rounded_up(d_model: int, hidden: int) -> None:
    assert SwiGLU(d_model).hidden == hidden
    assert hidden % 8 == 0 and 0 <= hidden - 8 * d_model / 3 < 8


def test_the_scale_of_the_input_is_kept_at_every_width() -> None:
    for d_model in (32, 512):
        x = torch.randn(64, d_model)
        assert 0.4 < SwiGLU(d_model).to_value(x).std() < 1.6
        assert 0.3 < SwiGLU(d_model)(x).std() < 1.2


def test_a_width_of_nothing() -> None:
    with pytest.raises(ConfigurationError, match="positive, got 0"):
        SwiGLU(6, hidden=0)
