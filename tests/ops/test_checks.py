from __future__ import annotations

import pytest
import torch

from ostinato.errors import DtypeError, NonFiniteError, ShapeError
from ostinato.ops.checks import accumulation_dtype, check_finite, check_reset, check_sequence, check_shape


def test_half_precision_is_accumulated_in_float32() -> None:
    assert accumulation_dtype(torch.bfloat16) == torch.float32
    assert accumulation_dtype(torch.float16) == torch.float32
    for dtype in (torch.float32, torch.float64, torch.complex64):
        assert accumulation_dtype(dtype) == dtype


def test_check_sequence() -> None:
    check_sequence("x", torch.zeros(1, 2, 3), "batch time dim")
    check_sequence("x", torch.zeros(1, 2, dtype=torch.complex64), "batch time")
    with pytest.raises(ShapeError, match=r"x must have 3 axes \(batch time dim\), got shape \(1, 2\)"):
        check_sequence("x", torch.zeros(1, 2), "batch time dim")
    with pytest.raises(ShapeError, match=r"x is empty along time"):
        check_sequence("x", torch.zeros(1, 0, 3), "batch time dim")
    with pytest.raises(DtypeError, match=r"floating point, got torch\.int64; convert it, e\.g\. x\.float\(\)"):
        check_sequence("x", torch.zeros(1, 2, dtype=torch.long), "batch time")
    with pytest.raises(DtypeError, match=r"must be a tensor .*got list"):
        check_sequence("x", [1.0, 2.0], "batch time")  # type: ignore[arg-type]
    assert issubclass(ShapeError, ValueError)
    assert issubclass(DtypeError, TypeError)


def test_check_shape() -> None:
    check_shape("x", torch.zeros(2, 3), (2, 3), "batch dim")
    with pytest.raises(ShapeError, match=r"x must have shape \(2, 4\) \(batch dim\), got \(2, 3\)"):
        check_shape("x", torch.zeros(2, 3), (2, 4), "batch dim")


def test_check_reset() -> None:
    check_reset(None, 2, 3)
    check_reset(torch.zeros(2, 3, dtype=torch.bool), 2, 3)
    with pytest.raises(DtypeError, match="reset must be bool"):
        check_reset(torch.zeros(2, 3), 2, 3)
    with pytest.raises(ShapeError, match="reset must have shape"):
        check_reset(torch.zeros(3, 2, dtype=torch.bool), 2, 3)


def test_check_finite_says_where() -> None:
    x = torch.zeros(2, 3)
    check_finite(x=x, nothing=None)
    x[1, 2] = -torch.inf
    x[0, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"x holds nan at index \(0, 1\) \(2 of 6"):
        check_finite(fine=torch.zeros(1), x=x)
