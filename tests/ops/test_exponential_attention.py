from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.errors import ConfigurationError, DtypeError, NonFiniteError, ShapeError
from ostinato.ops.exponential_attention import ExponentialState, exponential_attention
from ostinato.ops.routes import backend

ROUTES = ("reference", "parallel")


def formula(q, k, v, i, f, memory, normalizer, maximum, reset: Tensor | None = None, eps: float = 1e-6) -> tuple:
    """mLSTMexp, equations (1) to (3) of the paper, as they are written."""
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            keep = (~reset[:, t]).to(q.dtype)
            memory, normalizer = memory * keep[:, None, None, None], normalizer * keep[:, None, None]
            maximum = maximum * keep[:, None]
        new = torch.maximum(f[:, t] + maximum, i[:, t])
        forget, write = torch.exp(f[:, t] + maximum - new), torch.exp(i[:, t] - new)
        memory = forget[..., None, None] * memory + torch.einsum("bh,bhk,bhv->bhkv", write, k[:, t], v[:, t])
        normalizer = forget[..., None] * normalizer + write[..., None] * k[:, t]
        maximum = new
        bottom = torch.maximum(torch.einsum("bhk,bhk->bh", normalizer, q[:, t]).abs(), torch.exp(-new)) + eps
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]) / bottom[..., None])
    return torch.stack(outputs, 1), memory, normalizer, maximum


def ours(*args: Tensor, **options) -> tuple:
    output, state = exponential_attention(*args[:5], ExponentialState(*args[5:]), **options)
    return output, *state


def arguments(time: int, *, scale: float = 2.0, sizes=(2, 2, 4, 3), dtype=torch.float64) -> list[Tensor]:
    batch, heads, key_dim, value_dim = sizes
    q, k = (torch.randn(batch, time, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, heads, value_dim, dtype=dtype)
    i, f = torch.randn(2, batch, time, heads, dtype=dtype) * scale
    memory = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    normalizer = torch.randn(batch, heads, key_dim, dtype=dtype)
    maximum = torch.randn(batch, heads, dtype=dtype)
    return [q, k, v, i, F.logsigmoid(f), memory, normalizer, maximum]


def with_gradients(function, args: list[Tensor]) -> list[Tensor]:
    """Outputs, the last state, and the gradients of a fixed random combination of both."""
    args = [a.detach().requires_grad_() for a in args]
    results = function(*args)
    weights = torch.Generator().manual_seed(0)
    loss = sum((r * torch.randn(r.shape, generator=weights).to(r.dtype)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, args)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f.double() - w.double()).abs().max() <= tolerance * (1 + w.abs().max())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 40, 63, 64, 65])
def test_is_the_formula(route: str, scale: float, time: int) -> None:
    args = arguments(time, scale=scale)
    reset = torch.rand(2, time) < 0.15
    with backend(route):
        for mask in (None, reset):
            found = with_gradients(lambda *a, m=mask: ours(*a, reset=m, chunk_size=16), args)
            assert_same(found, with_gradients(lambda *a, m=mask: formula(*a, m), args), 1e-9)


@pytest.mark.parametrize("where", [[0], [8], [7], [0, 8, 16], [3, 4, 5], list(range(24))])
def test_resets_at_edges(where: list[int]) -> None:
    args = arguments(24)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[0, where] = True
    with backend("parallel"):
        found = with_gradients(lambda *a: ours(*a, reset=reset, chunk_size=8), args)
    assert_same(found, with_gradients(lambda *a: formula(*a, reset), args), 1e-10)


def test_split_anywhere() -> None:
    args = arguments(21)
    whole, last = exponential_attention(*args[:5], ExponentialState(*args[5:]), chunk_size=8)
    for cut in (1, 8, 13, 20):
        one, between = exponential_attention(*(a[:, :cut] for a in args[:5]), ExponentialState(*args[5:]), chunk_size=8)
        two, end = exponential_attention(*(a[:, cut:] for a in args[:5]), between, chunk_size=8)
        torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(tuple(end), tuple(last), rtol=0, atol=1e-12)


def test_starts_from_zero() -> None:
    args = arguments(9)
    found = exponential_attention(*args[:5], chunk_size=4)[0]
    wanted = formula(*args[:5], *(torch.zeros_like(a) for a in args[5:]))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("level", [-200.0, -10.0, 200.0])
def test_extreme_gates_in_float32(route: str, level: float) -> None:
    """At input gates of e^±200 everything stays finite, and right where float32 can say it."""
    args = arguments(70, dtype=torch.float32)
    args[:2] = [a.abs() for a in args[:2]]  # So that no denominator comes near 0, which enlarges every error.
    args[3] = args[3] + level
    args[5:] = [torch.zeros_like(a) for a in args[5:]]
    with backend(route):
        found = with_gradients(ours, args)
    assert all(torch.isfinite(f).all() for f in found)
    wanted = formula(*(a.double() for a in args))
    # m is about ±200 in float32, so each exponent carries an error of 200 · 2⁻²⁴ ≈ 1e-5.
    assert_same(found[:4], list(wanted), 1e-4)


def test_float32_gradients() -> None:
    args = arguments(70, dtype=torch.float32)
    with backend("parallel"):
        found = with_gradients(ours, args)
    assert_same(found, with_gradients(formula, [a.double() for a in args]), 1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("with_reset", [False, True])
def test_two_derivatives(route: str, with_reset: bool) -> None:
    torch.manual_seed(3)  # Draws that lie on no kink of the maxima.
    args = [a.requires_grad_() for a in arguments(5, sizes=(1, 1, 2, 2))]
    reset = torch.tensor([[False, False, False, True, False]]) if with_reset else None
    with backend(route):
        assert gradcheck(lambda *a: ours(*a, reset=reset, chunk_size=2), args)
        assert gradgradcheck(lambda *a: ours(*a, reset=reset, chunk_size=2), args, atol=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    args = [a.bfloat16() for a in arguments(100, sizes=(1, 2, 8, 8))]
    y, state = exponential_attention(*args[:5], ExponentialState(*args[5:]))
    assert y.dtype == torch.bfloat16
    assert {part.dtype for part in state} == {torch.float32}
    wanted, *last = formula(*(a.double() for a in args))
    # A small denominator enlarges float32's error, hence the second term.
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4 * wanted.abs().max()).all()
    assert_same(list(state), last, 1e-4)


def test_long_sequence() -> None:
    time = 100_003
    q, k, v = torch.randn(3, 1, time, 1, 1, dtype=torch.float64)
    i, f = torch.randn(2, 1, time, 1, dtype=torch.float64)
    f = F.logsigmoid(f + 2)
    output, last = exponential_attention(q, k, v, i, f)
    # In unstabilised units: m drops out of the quotient but for ε, which is 0 here to one part in 10⁶.
    memory, normalizer, wanted = 0.0, 0.0, []
    rows = (x.flatten().tolist() for x in (q, k, v, i.exp(), f.exp()))
    for a, b, c, write, forget in zip(*rows, strict=True):
        memory, normalizer = forget * memory + write * b * c, forget * normalizer + write * b
        wanted.append(memory * a / max(abs(normalizer * a), 1.0))
    torch.testing.assert_close(output.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert last.memory.item() * last.maximum.exp().item() == pytest.approx(memory, rel=1e-9)


def test_vmap_over_seeds() -> None:
    args = arguments(11)
    many = torch.randn(3, *args[3].shape, dtype=torch.float64)

    def loss(log_input: Tensor) -> Tensor:
        return sum(r.square().sum() for r in ours(*args[:3], log_input, *args[4:], chunk_size=4))

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], torch.func.grad(loss)(many[seed]), rtol=1e-10, atol=1e-10)


def test_compiles_as_one_graph() -> None:
    args = arguments(18)
    compiled = torch.compile(lambda *a: ours(*a, chunk_size=8), fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, args), with_gradients(formula, args), 1e-10)


def test_bad_arguments() -> None:
    q, k, v, i, f, *parts = arguments(6)
    state = ExponentialState(*parts)
    with pytest.raises(ShapeError, match="log_input must have shape"):
        exponential_attention(q, k, v, i[:, :5], f)
    with pytest.raises(ShapeError, match="log_forget must have 3 axes"):
        exponential_attention(q, k, v, i, f.unsqueeze(-1))
    with pytest.raises(ShapeError, match=r"state\.normalizer"):
        exponential_attention(q, k, v, i, f, state._replace(normalizer=parts[1][:1]))
    with pytest.raises(DtypeError, match="ExponentialState"):
        exponential_attention(q, k, v, i, f, parts[0])
    with pytest.raises(ConfigurationError, match="eps"):
        exponential_attention(q, k, v, i, f, eps=-1.0)
    with pytest.raises(ConfigurationError, match="chunk_size"):
        exponential_attention(q, k, v, i, f, chunk_size=0)
    i[0, 3, 1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"log_input holds inf at index \(0, 3, 1\)"):
        exponential_attention(q, k, v, i, f, validate=True)
    parts[2][1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="maximum holds nan"):
        exponential_attention(q, k, v, f, f, state, validate=True)


def test_float32_keeps_the_digits_of_weak_decays() -> None:
    """Keys of any sign, log-decays of −1e-4: closer to float64 than the loop in float32, whose maximum loses digits."""
    torch.manual_seed(0)
    shape = (1, 600, 1, 16)
    arguments = [torch.randn(shape) / 4, torch.randn(shape), torch.randn(shape), torch.randn(shape[:3])]
    arguments.append(torch.full(shape[:3], -1e-4))

    def solve(route: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [argument.to(dtype).requires_grad_() for argument in arguments]
        with backend(exponential_attention=route):
            outputs, _ = exponential_attention(*leaves)
        return [outputs.detach(), *torch.autograd.grad(outputs.square().sum(), leaves)]

    exact = solve("reference", torch.float64)

    def error(route: str) -> list[float]:
        found = solve(route, torch.float32)
        return [float((ours - wanted).norm() / wanted.norm()) for ours, wanted in zip(found, exact, strict=True)]

    errors = {route: error(route) for route in ("parallel", "reference")}
    assert max(errors["parallel"]) < 2e-4
    assert all(10 * ours < loop for ours, loop in zip(errors["parallel"], errors["reference"], strict=True))
