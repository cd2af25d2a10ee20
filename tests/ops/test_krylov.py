"""Krylov matrices against repeated products."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.ops.krylov import krylov, krylov_kernel


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_columns_are_powers(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length)
    matrix, vector = torch.randn(2, 4, 4, dtype=dtype) / 2, torch.randn(2, 4, dtype=dtype)
    found = krylov(matrix, vector, length)
    assert found.shape == (2, 4, length)
    for t in range(length):
        wanted = torch.linalg.matrix_power(matrix, t) @ vector.unsqueeze(-1)
        torch.testing.assert_close(found[..., t], wanted.squeeze(-1))


def test_kernel_is_the_impulse_response() -> None:
    torch.manual_seed(0)
    matrix, inputs, outputs = (torch.randn(*shape, dtype=torch.float64) / 2 for shape in ((3, 3), (3,), (3,)))
    x, wanted = inputs, []
    for _ in range(10):
        wanted.append(outputs @ x)
        x = matrix @ x
    torch.testing.assert_close(krylov_kernel(matrix, inputs, outputs, 10), torch.stack(wanted))


def test_no_columns() -> None:
    with pytest.raises(ConfigurationError, match="at least one column"):
        krylov(torch.eye(2), torch.ones(2), 0)
