"""The matrix-mixer family: each product is its matrix, the entries are the formulas, and it keeps what it states."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from ostinato.analysis.mixing_matrix import materialize, off_diagonal_ranks
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.mixers.hydra import Hydra
from ostinato.mixers.matrix_kinds import KINDS, LEARNED_ALONE, scale_of
from ostinato.mixers.matrix_mixer import MatrixMixer
from ostinato.ops.toeplitz import toeplitz, toeplitz_matrix
from ostinato.testing.whole import check_whole_mixer

VARIANTS = [
    (kind, dependent) for kind, dependent in product(KINDS, (True, False)) if not (dependent and kind in LEARNED_ALONE)
]
RESET = torch.tensor([[False, False, True, False, False, False, True, True, False], [False] * 9])


def _mixer(kind: str, dependent: bool, **options: Any) -> MatrixMixer:
    return MatrixMixer(8, kind, dependent, heads=2, qk_dim=3, max_len=13, **options).double()


@pytest.mark.parametrize(("kind", "dependent"), VARIANTS)
def test_every_kind_is_its_dense_matrix(kind: str, dependent: bool) -> None:
    mixer, x = _mixer(kind, dependent), torch.randn(2, 9, 8, dtype=torch.float64)
    assert torch.allclose(materialize(mixer, x), mixer.matrix(x), atol=1e-12)
    for reset in (None, RESET):
        gate, values, _ = mixer._made(x, reset)
        y = torch.einsum("bhtl,blhd->bthd", mixer.matrix(x, reset), values) + values
        wanted = mixer.to_output(mixer.norm(y.flatten(-2), gate))
        assert torch.allclose(mixer(x, reset=reset)[0], wanted, atol=1e-12)


@pytest.mark.parametrize(("kind", "dependent"), VARIANTS)
def test_every_kind_keeps_what_it_states(kind: str, dependent: bool) -> None:
    report = check_whole_mixer(_mixer(kind, dependent), length=9, compile=False, strict=False)
    # The places that no sequence reached are learned by none: nothing else may be without a gradient.
    assert all(row.check == "gradient reaches" and not dependent for row in report.broken), report.table(report.broken)


def test_entries_are_their_formulas() -> None:
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    t, at, head = 4, 1, 1
    for kind in ("low_rank", "cauchy", "vandermonde", "attention", "toeplitz"):
        mixer = _mixer(kind, True)
        parts = mixer._made(x, None)[2]
        found = mixer.matrix(x)[0, head, t, at] / scale_of(kind, 6, 3)
        if kind == "toeplitz":
            assert torch.allclose(found, parts["below"][0, t - at, head])
            above = mixer.matrix(x)[0, head, at, t] / scale_of(kind, 6, 3)
            assert torch.allclose(above, parts["above"][0, t - at, head])
            continue
        q, k = parts["queries"][0, :, head], parts["keys"][0, :, head]
        turn = 2 * math.pi * 1e-3
        wanted = {
            "low_rank": q[t] @ k[at],
            "cauchy": (1 / (q[t].exp() + k[at].exp() + 1.0 + 1e-8)).sum(),
            "vandermonde": ((turn * q[t] * at).cos() - (turn * k[at] * t).cos()).sum(),
            "attention": (q[t] @ k.T / math.sqrt(3)).softmax(-1)[at],
        }
        assert torch.allclose(found, wanted[kind]), kind
    mixer = _mixer("vandermonde", False)
    q, k = (mixer.learned[f"{name}_at"].view(13, 2, 3)[:, head] for name in ("queries", "keys"))
    wanted_sum = ((2 * math.pi * q[t] * at).cos() + (2 * math.pi * k[at] * t).cos()).sum()
    assert torch.allclose(mixer.matrix(x)[0, head, t, at] / scale_of("vandermonde", 6, 3), wanted_sum)
    fourier = _mixer("dft", False).matrix(x)[0, 0]
    assert fourier[t, at] * math.sqrt(6) == pytest.approx(math.cos(2 * math.pi * t * at / 6))


def test_aligned_matrices_of_a_prefix_are_prefixes_of_the_matrix() -> None:
    """What a token gives depends on it alone (here: without the convolution); more tokens only add rows and columns."""
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    for kind in ("low_rank", "cauchy", "vandermonde", "toeplitz", "quasiseparable"):
        mixer = _mixer(kind, True, conv=1)
        whole = mixer.matrix(x)[..., :5, :5] / scale_of(kind, 9, 3)
        assert torch.allclose(mixer.matrix(x[:, :5]) / scale_of(kind, 5, 3), whole, atol=1e-12), kind


def test_ranks_tell_the_kinds_apart() -> None:
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    cuts = (6, 12, 18)
    ranks = {
        kind: off_diagonal_ranks(MatrixMixer(8, kind, heads=2, qk_dim=3).double().matrix(x), cuts)
        for kind in ("low_rank", "quasiseparable", "attention", "toeplitz")
    }
    assert ranks["low_rank"] == (3, 3) and ranks["quasiseparable"] == (3, 3)
    assert min(ranks["attention"]) > 3 and min(ranks["toeplitz"]) > 3
    assert torch.linalg.matrix_rank(MatrixMixer(8, "quasiseparable", heads=2, qk_dim=3).double().matrix(x)).min() > 6


@pytest.mark.parametrize("time", [1, 2, 7])
def test_toeplitz_by_transform_and_the_released_indices(time: int) -> None:
    f, r = torch.randn(2, 2, 3, time, dtype=torch.float64)
    v = torch.randn(2, 3, time, 4, dtype=torch.float64)
    assert torch.allclose(toeplitz(f, r, v), toeplitz_matrix(f, r) @ v, atol=1e-12)
    if time > 2:
        moved = toeplitz(f, r, torch.eye(time, dtype=torch.float64).expand(2, 3, -1, -1), displaced=True)
        assert torch.allclose(moved.diagonal(dim1=-2, dim2=-1), f[..., 1:2].expand(-1, -1, time))
        assert torch.allclose(moved[..., 0, 1], f[..., 0]) and torch.allclose(moved[..., 0, 2], r[..., 1])
        assert torch.allclose(moved[..., -1, 0], r[..., -1]) and torch.allclose(moved[..., -2, 0], f[..., -1])
    with pytest.raises(ShapeError, match="one number for each step"):
        toeplitz(f[:1], r, v)


def test_what_cannot_be_is_said() -> None:
    for options, message in (
        ({"kind": "sparse"}, "kind is one of"),
        ({"kind": "dense"}, "cannot be made by tokens"),
        ({"kind": "cauchy", "displaced": True}, "displaced is for"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            MatrixMixer(8, **options)
    with pytest.raises(ConfigurationError, match="learned for 13 places, got 14"):
        _mixer("dense", False)(torch.randn(1, 14, 8, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match="wraps around"):
        _mixer("toeplitz", True, displaced=True)(torch.randn(2, 9, 8, dtype=torch.float64), reset=RESET)
    with pytest.raises(ConfigurationError, match="one matrix a head"):
        materialize(Hydra(8, join="add"), torch.randn(1, 3, 8))
