"""`outer_gated_attention` is its formula by every route, stays finite, and is linear attention where β = 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.errors import ConfigurationError, NonFiniteError, ShapeError
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.outer_gated_attention import outer_gated_attention
from ostinato.ops.routes import backend
from ostinato.testing.gradients import assert_same, with_gradients

DECAYS = ("none", "scalar", "vector")
ROUTES = ("reference", "parallel")


def formula(q: Tensor, k: Tensor, v: Tensor, e: Tensor, g: Tensor | None, state: Tensor, reset: Tensor | None = None):
    """S_t = (exp(g_t) exp(e_t)ᵀ) ⊙ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, as it is written."""
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], torch.zeros_like(state), state)
        alpha = torch.ones_like(k[:, t]) if g is None else g[:, t].exp().reshape(*g.shape[:1], g.shape[2], -1)
        gate = torch.einsum("bhk,bhv->bhkv", alpha.expand(k[:, t].shape), e[:, t].exp())
        state = gate * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def arguments(time: int, decay: str, *, strength: float = 0.3, sizes=(2, 2, 4, 3), dtype=torch.float64) -> list:
    batch, heads, key_dim, value_dim = sizes
    q, k = (torch.randn(batch, time, heads, key_dim, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, heads, value_dim, dtype=dtype)
    shape = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    g = None if shape is None else -torch.rand(shape, dtype=dtype) * strength
    e = -torch.rand(batch, time, heads, value_dim, dtype=dtype) * strength
    return [q, k, v, e, g, torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 40])
def test_is_the_formula(route: str, decay: str, time: int) -> None:
    args = arguments(time, decay)
    reset = torch.rand(2, time) < 0.15
    with backend(route):
        for mask in (None, reset):
            found = with_gradients(lambda *a, m=mask: outer_gated_attention(*a, reset=m, chunk_size=16), args)
            assert_same(found, with_gradients(lambda *a, m=mask: formula(*a, m), args), 1e-11)


@pytest.mark.parametrize("where", [[0], [7], [8], [0, 8, 16], [3, 4, 5], list(range(24))])
def test_resets_at_edges(where: list[int]) -> None:
    args = arguments(24, "vector")
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[0, where] = True
    with backend("parallel"):
        found = with_gradients(lambda *a: outer_gated_attention(*a, reset=reset, chunk_size=8), args)
    assert_same(found, with_gradients(lambda *a: formula(*a, reset), args), 1e-11)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 5, 1), (1, 2, 1, 5)])
def test_a_single_channel(sizes: tuple[int, ...]) -> None:
    args = arguments(70, "vector", sizes=sizes)
    with backend("parallel"):
        assert_same(with_gradients(outer_gated_attention, args), with_gradients(formula, args), 1e-11)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_a_gate_on_values_it_is_linear_attention(decay: str) -> None:
    q, k, v, e, g, state = arguments(75, decay)
    found = outer_gated_attention(q, k, v, torch.zeros_like(e), g, state)
    for ours, wanted in zip(found, linear_attention(q, k, v, g, state), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_within_a_chunk_it_is_linear_attention_of_scaled_values() -> None:
    q, k, v, e, g, _ = arguments(30, "vector")
    total = e.cumsum(1).exp()
    wanted = linear_attention(q, k, v / total, g)[0] * total
    torch.testing.assert_close(outer_gated_attention(q, k, v, e, g)[0], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("strength", ["weak", "strong", "mixed", "infinite"])
def test_any_decay_in_float32(strength: str) -> None:
    """−1e-4 and −20 a step, and a weak decay right after a strong one, to float32's own accuracy."""
    args = arguments(80, "vector", dtype=torch.float32)
    for place in (3, 4):
        decay = args[place]
        strong = torch.rand(decay.shape) < 0.5
        args[place] = {
            "weak": torch.full_like(decay, -1e-4),
            "strong": torch.full_like(decay, -20.0),
            "mixed": torch.where(strong, -20.0, -1e-4),
            "infinite": torch.where(strong, -torch.inf, -1e-2),
        }[strength]
    with backend("parallel"):
        found = with_gradients(outer_gated_attention, args)
    wanted = with_gradients(formula, [a.double() for a in args])
    assert all(torch.isfinite(one).all() for one in (*found, *wanted))
    assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_two_derivatives(route: str) -> None:
    args = [a.requires_grad_() for a in arguments(5, "vector", sizes=(1, 1, 2, 2))]
    reset = torch.tensor([[False, False, False, True, False]])
    with backend(route):
        assert gradcheck(lambda *a: outer_gated_attention(*a, reset=reset, chunk_size=2), args)
        assert gradgradcheck(lambda *a: outer_gated_attention(*a, reset=reset, chunk_size=2), args)


def test_half_precision_is_computed_in_float32() -> None:
    args = [a.bfloat16() for a in arguments(100, "vector", sizes=(1, 2, 8, 8))]
    y, last = outer_gated_attention(*args)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    wanted, state = formula(*(a.double() for a in args))
    # The inputs are the same numbers, so only the rounding of the output is bfloat16's: half of 2⁻⁷.
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()
    assert_same([last], [state], 1e-5)


def test_vmap_over_seeds() -> None:
    q, k, v, e, g, state = arguments(11, "vector")
    many = torch.randn(3, *k.shape, dtype=torch.float64)

    def loss(keys: Tensor) -> Tensor:
        y, last = outer_gated_attention(q, keys, v, e, g, state, chunk_size=4)
        return y.square().sum() + last.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], torch.func.grad(loss)(many[seed]), rtol=1e-12, atol=1e-12)


def test_compiles_as_one_graph() -> None:
    args = arguments(18, "vector")
    compiled = torch.compile(lambda *a: outer_gated_attention(*a, chunk_size=8), fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, args), with_gradients(formula, args), 1e-11)


def test_what_does_not_fit_is_said() -> None:
    q, k, v, e, g, state = arguments(6, "vector")
    with pytest.raises(ShapeError, match="log_value_decay"):
        outer_gated_attention(q, k, v, e[..., :2], g, state)
    with pytest.raises(ShapeError, match="log_value_decay"):
        outer_gated_attention(q, k, v, e[..., 0], g, state)
    with pytest.raises(ShapeError, match="log_decay"):
        outer_gated_attention(q, k, v, e, e, state)
    with pytest.raises(ConfigurationError, match="chunk_size"):
        outer_gated_attention(q, k, v, e, g, state, chunk_size=0)
    e[0, 1, 0, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="log_value_decay"):
        outer_gated_attention(q, k, v, e, g, state, validate=True)
