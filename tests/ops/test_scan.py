from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.ops import scan
from ostinato.ops.scan import (
    BLOCK,
    DENSE,
    DIAGONAL,
    MAX_PLUS,
    SOFTMAX,
    STRUCTURES,
    Affine,
    affine_scan,
    associative_scan,
)


@pytest.fixture(params=["by size", "in blocks"], autouse=True)
def both_algorithms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small, and small sequences are scanned by doubling; every test runs on the blocked scan too."""
    if request.param == "in blocks":
        monkeypatch.setattr(scan, "_SMALL", 0)


TIMES = [1, 2, 8, 9, 10, 63, 64, 65, 130]


def arguments(structure: Affine, time: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Transitions that neither explode nor vanish over the test's lengths."""
    channels, k = 3, 2
    shapes = {"diagonal": ((channels,),) * 2, "block": ((k, k, channels), (k, channels)), "dense": ((4, 4), (4,))}
    transition, point = shapes[structure.name]
    a = torch.randn(batch, time, *transition, dtype=dtype)
    a = a * {"diagonal": 0.9, "block": 0.6, "dense": 0.5}[structure.name]
    return [a, torch.randn(batch, time, *point, dtype=dtype), torch.randn(batch, *point, dtype=dtype)]


def formula(structure: Affine, a: Tensor, b: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """h = A h + b by einsum, one step at a time."""
    product = {"diagonal": "...c,...c->...c", "block": "...ijc,...jc->...ic", "dense": "...ij,...j->...i"}
    states: list[Tensor] = []
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        h = torch.einsum(product[structure.name], a[:, t], h) + b[:, t]
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1)


def gradients(function, args: list[Tensor]) -> list[Tensor]:
    args = [a.detach().requires_grad_() for a in args]
    result = function(*args)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result.dtype)
    return [result, *torch.autograd.grad((result * weights).sum().real, args)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=list(STRUCTURES))
@pytest.mark.parametrize("time", TIMES)
def test_affine_scan_is_the_loop(structure: Affine, reverse: bool, time: int, dtype: torch.dtype) -> None:
    args = arguments(structure, time, dtype=dtype)
    found = gradients(lambda *x: affine_scan(*x, structure=structure, reverse=reverse), args)
    wanted = gradients(lambda a, b, h: formula(structure, a, b, h, reverse), args)
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).abs().max() <= 1e-11 * (1 + w.abs().max())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=list(STRUCTURES))
def test_affine_scan_two_derivatives(structure: Affine, reverse: bool) -> None:
    args = [x.requires_grad_() for x in arguments(structure, 9, batch=1)]
    function = lambda *x: affine_scan(*x, structure=structure, reverse=reverse)  # noqa: E731
    assert gradcheck(function, args)
    assert gradgradcheck(function, args)


@pytest.mark.parametrize("structure", (DIAGONAL, BLOCK, DENSE), ids=lambda s: s.name)
def test_affine_maps_multiply_associatively(structure: Affine) -> None:
    """combine is associative and agrees with acting twice: what the scan rests on."""
    (a, b, h) = arguments(structure, 3)
    one, two, three = ((a[:, t], b[:, t]) for t in range(3))
    left = structure.combine(structure.combine(one, two), three)
    right = structure.combine(one, structure.combine(two, three))
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y)
    (twice,) = structure.act(two, structure.act(one, (h,)))
    torch.testing.assert_close(structure.act(structure.combine(one, two), (h,))[0], twice)


def test_vmap_over_seeds() -> None:
    a, b, h = arguments(BLOCK, 20)
    many = torch.randn(3, *b.shape, dtype=torch.float64)
    found = torch.func.vmap(lambda x: affine_scan(a, x, h, structure=BLOCK))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], affine_scan(a, many[seed], h, structure=BLOCK))


def softmax_points(logits: Tensor, values: Tensor, start: tuple[Tensor, ...] | None = None, reverse: bool = False):
    batch, _, dim = values.shape
    if start is None:
        nothing = logits.new_zeros(batch)
        start = (nothing - torch.inf, nothing, values.new_zeros(batch, dim))
    return associative_scan(SOFTMAX, (logits, torch.ones_like(logits), values), start, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("time", [1, 2, 9, 65, 100])
def test_softmax_is_a_scan(time: int, scale: float, reverse: bool) -> None:
    logits = torch.randn(2, time, dtype=torch.float64).sign() * scale + torch.randn(2, time, dtype=torch.float64)
    values = torch.randn(2, time, 3, dtype=torch.float64)

    def ours(s: Tensor, v: Tensor) -> Tensor:
        _, total, weighted = softmax_points(s, v, reverse=reverse)
        return weighted / total.unsqueeze(-1)

    def direct(s: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(time, time, dtype=torch.bool).tril(-1) if reverse else torch.ones(time, time).triu(1).bool()
        return s.unsqueeze(1).expand(-1, time, -1).masked_fill(later, -torch.inf).softmax(-1) @ v

    for f, w in zip(gradients(ours, [logits, values]), gradients(direct, [logits, values]), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10)


def test_softmax_with_empty_elements() -> None:
    """Logits of −∞ are tokens that are not there; a set of none has weight 0 and no NaN, forwards or backwards."""
    logits = torch.randn(1, 20, dtype=torch.float64)
    logits[0, [0, 1, 2, 7, 8]] = -torch.inf
    values = torch.randn(1, 20, 2, dtype=torch.float64)
    present = torch.isfinite(logits)

    def ours(v: Tensor) -> Tensor:
        maximum, total, weighted = associative_scan(
            SOFTMAX,
            (logits, present.to(v.dtype), v * present.unsqueeze(-1)),
            (torch.full((1,), -torch.inf, dtype=v.dtype), v.new_zeros(1), v.new_zeros(1, 2)),
        )
        assert (maximum[0, :3] == -torch.inf).all()
        assert (total[0, :3] == 0).all()
        return weighted[:, 3:] / total[:, 3:].unsqueeze(-1)

    found, grad = gradients(ours, [values])
    assert torch.isfinite(found).all()
    assert torch.isfinite(grad).all()
    for t in range(3, 20):
        weights = logits[0, : t + 1].softmax(-1)
        torch.testing.assert_close(found[0, t - 3], weights @ values[0, : t + 1])


def test_softmax_extremes_in_float32() -> None:
    logits = torch.tensor([[-200.0, 200.0] * 40])
    values = torch.randn(1, 80, 2)
    for result in softmax_points(logits, values):
        assert torch.isfinite(result).all()
    _, total, weighted = softmax_points(logits, values)
    torch.testing.assert_close((weighted / total.unsqueeze(-1))[0, -1], values[0, 1::2].mean(0), rtol=1e-5, atol=1e-6)


def test_softmax_two_derivatives() -> None:
    logits = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 9, 1, dtype=torch.float64, requires_grad=True)

    def mean(s: Tensor, v: Tensor) -> Tensor:
        _, total, weighted = softmax_points(s, v)
        return weighted / total.unsqueeze(-1)

    assert gradcheck(mean, (logits, values))
    assert gradgradcheck(mean, (logits, values))


def max_plus_loop(a: Tensor, b: Tensor, m: Tensor, reverse: bool) -> Tensor:
    points: list[Tensor] = []
    for t in reversed(range(a.shape[1])) if reverse else range(a.shape[1]):
        m = torch.maximum(a[:, t] + m, b[:, t])
        points.append(m)
    return torch.stack(points[::-1] if reverse else points, 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [1, 2, 9, 65, 100])
def test_max_plus(time: int, reverse: bool) -> None:
    a, b = torch.randn(2, 2, time, 3, dtype=torch.float64)
    m = torch.randn(2, 3, dtype=torch.float64)
    # Maps that forget where they start from: a = −∞.
    a[0, time // 2] = -torch.inf
    found = gradients(lambda *x: associative_scan(MAX_PLUS, x[:2], x[2:], reverse=reverse)[0], [a, b, m])
    wanted = gradients(lambda *x: max_plus_loop(*x, reverse), [a, b, m])
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-11)


def test_max_plus_of_nothing() -> None:
    """The unit of max is −∞: b = −∞ throughout is plain addition, and a maximum of nothing stays −∞."""
    a = torch.randn(1, 20, 1, dtype=torch.float64)
    b = torch.full_like(a, -torch.inf)
    (added,) = associative_scan(MAX_PLUS, (a, b), (torch.zeros(1, 1, dtype=torch.float64),))
    torch.testing.assert_close(added, a.cumsum(1))
    (nothing,) = associative_scan(MAX_PLUS, (a, b), (torch.full((1, 1), -torch.inf, dtype=torch.float64),))
    assert (nothing == -torch.inf).all()


def test_long_scan() -> None:
    time = 100_003
    a, b = torch.rand(2, 1, time, dtype=torch.float64)
    (found,) = associative_scan(MAX_PLUS, (-a, b), (torch.zeros(1, dtype=torch.float64),))
    m, wanted = 0.0, []
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        m = max(m - x, y)
        wanted.append(m)
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-11)
