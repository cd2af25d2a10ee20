"""Rotary positions: relative, counted per sequence, exact far out."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.layers.rotary import positions, rotate


def test_products_depend_on_the_difference_of_positions() -> None:
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64)
    near, far = ((rotate(q, torch.tensor([[p + 5]])) * rotate(k, torch.tensor([[p]]))).sum(-1) for p in (2, 90_000))
    torch.testing.assert_close(near, far, atol=1e-9, rtol=0)
    torch.testing.assert_close(rotate(q, torch.tensor([[0]])), q)


def test_it_is_a_rotation_of_pairs() -> None:
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64)
    y = rotate(x, torch.arange(4)[None])
    torch.testing.assert_close(y[..., :3] ** 2 + y[..., 3:] ** 2, x[..., :3] ** 2 + x[..., 3:] ** 2)
    angle = torch.atan2(y[0, 1, 0, 4], y[0, 1, 0, 1]) - torch.atan2(x[0, 1, 0, 4], x[0, 1, 0, 1])
    torch.testing.assert_close(torch.cos(angle), torch.cos(torch.tensor(10000.0 ** (-1 / 3), dtype=torch.float64)))


def test_float32_is_exact_far_out() -> None:
    x, far = torch.randn(1, 1, 1, 16), torch.tensor([[1_000_003]])
    torch.testing.assert_close(rotate(x, far), rotate(x.double(), far).float(), atol=1e-6, rtol=0)
    assert rotate(x.bfloat16(), far).dtype == torch.bfloat16


def test_positions_count_on_and_start_again() -> None:
    reset = torch.tensor([[False, False, True, False], [True, False, False, True], [False] * 4])
    counted, following = positions(torch.tensor([3, 3, 7]), 4, reset)
    assert counted.tolist() == [[3, 4, 0, 1], [0, 1, 2, 0], [7, 8, 9, 10]]
    assert following.tolist() == [2, 1, 11]
    assert positions(torch.tensor([3]), 2)[0].tolist() == [[3, 4]]


def test_an_odd_width_cannot_be_rotated() -> None:
    with pytest.raises(ConfigurationError, match="even, got 5"):
        rotate(torch.randn(1, 1, 1, 5), torch.zeros(1, 1, dtype=torch.long))
