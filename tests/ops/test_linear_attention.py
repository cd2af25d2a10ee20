from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.errors import ConfigurationError, DtypeError, NonFiniteError, ShapeError
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.routes import backend
from ostinato.testing.gradients import assert_same, with_gradients

DECAYS = ("none", "scalar", "vector")
ROUTES = ("reference", "parallel")


def formula(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None = None):
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, as it is written."""
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], torch.zeros_like(state), state)
        if g is not None:
            state = torch.einsum(
                "bhk,bhkv->bhkv",
                g[:, t].exp().reshape(*g.shape[:1], g.shape[2], -1).expand(-1, -1, state.shape[2]),
                state,
            )
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def arguments(time: int, decay: str, *, strength: float = 0.3, sizes=(2, 2, 4, 3), dtype=torch.float64) -> list:
    batch, heads, key_dim, value_dim = sizes
    q, k = (torch.randn(batch, time, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, heads, value_dim, dtype=dtype)
    shape = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    g = None if shape is None else -torch.rand(shape, dtype=dtype) * strength
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return [q, k, v, g, state]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 40])
def test_is_the_formula(route: str, decay: str, time: int) -> None:
    args = arguments(time, decay)
    reset = torch.rand(2, time) < 0.15
    with backend(route):
        for mask in (None, reset):
            found = with_gradients(lambda *a, m=mask: linear_attention(*a, reset=m, chunk_size=16), args)
            assert_same(found, with_gradients(lambda *a, m=mask: formula(*a, m), args), 1e-11)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [63, 64, 65])
def test_around_the_default_chunk(decay: str, time: int) -> None:
    args = arguments(time, decay, sizes=(1, 1, 2, 2))
    with backend("parallel"):
        assert_same(with_gradients(linear_attention, args), with_gradients(formula, args), 1e-11)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("where", [[0], [8], [7], [0, 8, 16], [3, 4, 5], list(range(24))])
def test_resets_at_edges(decay: str, where: list[int]) -> None:
    args = arguments(24, decay)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[0, where] = True
    with backend("parallel"):
        found = with_gradients(lambda *a: linear_attention(*a, reset=reset, chunk_size=8), args)
    assert_same(found, with_gradients(lambda *a: formula(*a, reset), args), 1e-11)


def test_a_reset_is_a_new_call() -> None:
    q, k, v, g, state = arguments(20, "vector")
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 9] = True
    whole, last = linear_attention(q, k, v, g, state, reset=reset, chunk_size=8)
    second, alone = linear_attention(q[:, 9:], k[:, 9:], v[:, 9:], g[:, 9:], chunk_size=8)
    torch.testing.assert_close(whole[:, 9:], second, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_split_anywhere(decay: str) -> None:
    q, k, v, g, state = arguments(21, decay)
    whole, last = linear_attention(q, k, v, g, state, chunk_size=8)
    for cut in (1, 8, 13, 20):
        one, between = linear_attention(*(a if a is None else a[:, :cut] for a in (q, k, v, g)), state, chunk_size=8)
        two, end = linear_attention(*(a if a is None else a[:, cut:] for a in (q, k, v, g)), between, chunk_size=8)
        torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(end, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", ("scalar", "vector"))
@pytest.mark.parametrize("strength", ["weak", "strong", "mixed", "infinite"])
def test_any_decay_in_float32(decay: str, strength: str) -> None:
    """−1e-4 and −20 a step, and a weak decay right after a strong one, to float32's own accuracy."""
    args = arguments(80, decay, dtype=torch.float32)
    g = args[3]
    strong = torch.rand(g.shape) < 0.5
    args[3] = {
        "weak": torch.full_like(g, -1e-4),
        "strong": torch.full_like(g, -20.0),
        "mixed": torch.where(strong, -20.0, -1e-4),
        "infinite": torch.where(strong, -torch.inf, -1e-2),
    }[strength]
    with backend("parallel"):
        found = with_gradients(linear_attention, args)
    wanted = with_gradients(formula, [a.double() for a in args])
    if strength == "infinite":  # The formula's own gradient at exp(−∞) is right, too: 0.
        assert all(torch.isfinite(w).all() for w in wanted)
    assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_two_derivatives(route: str, decay: str, with_reset: bool) -> None:
    args = [a if a is None else a.requires_grad_() for a in arguments(5, decay, sizes=(1, 1, 2, 2))]
    reset = torch.tensor([[False, False, False, True, False]]) if with_reset else None
    with backend(route):
        assert gradcheck(lambda *a: linear_attention(*a, reset=reset, chunk_size=2), args)
        assert gradgradcheck(lambda *a: linear_attention(*a, reset=reset, chunk_size=2), args)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_is_computed_in_float32(decay: str) -> None:
    args = [a if a is None else a.bfloat16() for a in arguments(100, decay, sizes=(1, 2, 8, 8))]
    y, last = linear_attention(*args)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    wanted, state = formula(*(a if a is None else a.double() for a in args))
    # The inputs are the same numbers, so only the rounding of the output is bfloat16's: half of 2⁻⁷.
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()
    assert_same([last], [state], 1e-5)


def test_long_sequence() -> None:
    time = 100_003
    q, k = torch.randn(2, 1, time, 1, 1, dtype=torch.float64)
    v = torch.randn(1, time, 1, 1, dtype=torch.float64)
    g = -torch.rand(1, time, 1, dtype=torch.float64) * 0.1
    state, wanted = 0.0, []
    for a, b, d in zip(k.flatten().tolist(), v.flatten().tolist(), g.exp().flatten().tolist(), strict=True):
        state = d * state + a * b
        wanted.append(state)
    y, last = linear_attention(q, k, v, g)
    torch.testing.assert_close(y.flatten(), q.flatten() * torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(last.item(), state)


@pytest.mark.parametrize("decay", DECAYS)
def test_vmap_over_seeds(decay: str) -> None:
    q, k, v, g, state = arguments(11, decay)
    many = torch.randn(3, *k.shape, dtype=torch.float64)

    def loss(keys: Tensor) -> Tensor:
        y, last = linear_attention(q, keys, v, g, state, chunk_size=4)
        return y.square().sum() + last.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], torch.func.grad(loss)(many[seed]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_compiles_as_one_graph(decay: str) -> None:
    q, k, v, g, state = arguments(18, decay)
    compiled = torch.compile(lambda *a: linear_attention(*a, chunk_size=8), fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled, [q, k, v, g, state])
    assert_same(found, with_gradients(formula, [q, k, v, g, state]), 1e-11)


def test_the_chunk_size_does_not_matter() -> None:
    args = arguments(50, "vector")
    results = [linear_attention(*args, chunk_size=size)[0] for size in (1, 3, 16, 1000)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-11)


def test_bad_arguments() -> None:
    q, k, v, g, state = arguments(6, "scalar")
    with pytest.raises(ShapeError, match="empty along time"):
        linear_attention(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(ShapeError, match="keys must have shape"):
        linear_attention(q, k[:, :5], v)
    with pytest.raises(ShapeError, match="values must have shape"):
        linear_attention(q, k, v[:, :, :1])
    with pytest.raises(ShapeError, match="log_decay"):
        linear_attention(q, k, v, g[:, :5])
    with pytest.raises(ShapeError, match="state must have shape"):
        linear_attention(q, k, v, g, state.mT)
    with pytest.raises(ShapeError, match="reset"):
        linear_attention(q, k, v, reset=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(DtypeError, match="reset must be bool"):
        linear_attention(q, k, v, reset=torch.zeros(2, 6))
    with pytest.raises(DtypeError, match="floating point"):
        linear_attention(q.long(), k, v)
    with pytest.raises(ConfigurationError, match="chunk_size"):
        linear_attention(q, k, v, chunk_size=0)
    v[1, 2, 0, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"values holds nan at index \(1, 2, 0, 1\)"):
        linear_attention(q, k, v, validate=True)
