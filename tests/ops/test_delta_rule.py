from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ostinato.errors import ConfigurationError, DtypeError, NonFiniteError, ShapeError
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.routes import backend
from ostinato.testing.gradients import assert_same, with_gradients

DECAYS = ("none", "scalar", "vector")
ROUTES = ("reference", "parallel")


def formula(q, k, v, beta, g, state, r=None, e=None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S ← exp(g) S once a token; then n times S ← (I − β e rᵀ) S + β k vᵀ, as it is written."""
    n, dim = k.shape[1] // q.shape[1], k.shape[-1]
    r, e = k if r is None else r, k if e is None else e
    identity = torch.eye(dim, dtype=q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], torch.zeros_like(state), state)
        if g is not None:
            state = g[:, t].exp().reshape(*q.shape[:1], q.shape[2], -1, 1) * state
        for i in range(t * n, t * n + n):
            rate = torch.ones_like(k[:, i, :, 0]) if beta is None else beta[:, i]
            matrix = identity - torch.einsum("bh,bhk,bhl->bhkl", rate, e[:, i], r[:, i])
            state = matrix @ state + torch.einsum("bh,bhk,bhv->bhkv", rate, k[:, i], v[:, i])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def arguments(time: int, decay: str, n: int = 1, *, untied=False, sizes=(2, 2, 4, 3), dtype=torch.float64) -> list:
    batch, heads, key_dim, value_dim = sizes
    q = torch.randn(batch, time, heads, key_dim, dtype=dtype)
    k, r, e = F.normalize(torch.randn(3, batch, n * time, heads, key_dim, dtype=dtype), dim=-1)
    v = torch.randn(batch, n * time, heads, value_dim, dtype=dtype)
    # Within [0, 2], both ends included; with keys of their own the state would grow at such rates.
    beta = (2.4 * torch.rand(batch, n * time, heads, dtype=dtype) - 0.2).clamp(0, 2)
    shape = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    g = None if shape is None else -torch.rand(shape, dtype=dtype) * 0.3
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return [q, k, v, beta * 0.3, g, state, r, e] if untied else [q, k, v, beta, g, state, None, None]


def ours(q, k, v, beta, g, state, r=None, e=None, **options) -> tuple[Tensor, Tensor]:
    return delta_rule(q, k, v, beta, g, state, read_keys=r, erase_keys=e, **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("time", "n"), [(1, 1), (2, 1), (15, 1), (16, 1), (33, 1), (1, 3), (9, 2), (8, 3), (17, 3)])
def test_is_the_formula(route: str, decay: str, untied: bool, time: int, n: int) -> None:
    args = arguments(time, decay, n, untied=untied)
    reset = torch.rand(2, time) < 0.15
    with backend(route):
        for mask in (None, reset):
            found = with_gradients(lambda *a, m=mask: ours(*a, reset=m, chunk_size=16), args)
            assert_same(found, with_gradients(lambda *a, m=mask: formula(*a, m), args), 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [31, 32, 33, 63, 64, 65])
def test_around_the_default_chunk(decay: str, time: int) -> None:
    args = arguments(time, decay, sizes=(1, 1, 2, 2))
    with backend("parallel"):
        assert_same(with_gradients(ours, args), with_gradients(formula, args), 1e-10)


@pytest.mark.parametrize("given", ["read", "erase", "neither", "no beta"])
def test_keys_left_out(given: str) -> None:
    args = arguments(12, "vector", untied=True)
    if given != "read":
        args[6] = None
    if given != "erase":
        args[7] = None
    if given == "no beta":
        args[3] = None
    with backend("parallel"):
        found = with_gradients(lambda *a: ours(*a, chunk_size=8), args)
    assert_same(found, with_gradients(formula, args), 1e-10)


@pytest.mark.parametrize("route", ROUTES)
def test_normalize(route: str) -> None:
    """Queries and keys of any length, divided by it inside; keys of their own to read and to erase are left alone."""
    q, k, v, beta, g, state, r, e = arguments(12, "scalar", 2, untied=True)
    q, k = 3 * q, torch.rand(k.shape[:3], dtype=k.dtype).unsqueeze(-1) * k
    with backend(route):
        found = with_gradients(lambda *a: ours(*a, chunk_size=8, normalize=True), [q, k, v, beta, g, state, r, e])

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    wanted = with_gradients(lambda q, k, *a: formula(unit(q), unit(k), *a), [q, k, v, beta, g, state, r, e])
    assert_same(found, wanted, 1e-10)


def test_equal_keys_given_apart() -> None:
    """The two chunk forms meet where read, erase and write keys are equal."""
    q, k, v, beta, g, state, *_ = arguments(20, "scalar", 2)
    tied = delta_rule(q, k, v, beta, g, state, chunk_size=16)
    apart = delta_rule(q, k, v, beta, g, state, read_keys=k, erase_keys=k.clone(), chunk_size=16)
    torch.testing.assert_close(apart, tied, rtol=0, atol=1e-11)


def test_rwkv7_is_a_call() -> None:
    """S_t = diag(w) S_{t-1} − (κ ⊙ a)(κᵀ S_{t-1}) + k vᵀ erases the undecayed state: r = κ / w."""
    q, k, v, _, g, state, kappa, _ = arguments(20, "vector", untied=True)
    a = torch.rand_like(k)
    y, last = delta_rule(q, k, v, None, g, state, read_keys=kappa * torch.exp(-g), erase_keys=kappa * a, chunk_size=8)
    outputs = []
    for t in range(20):
        removed = torch.einsum("bhk,bhkv->bhv", kappa[:, t], state)
        state = g[:, t].exp()[..., None] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = state - torch.einsum("bhk,bhv->bhkv", (kappa * a)[:, t], removed)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    torch.testing.assert_close(y, torch.stack(outputs, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-10)


def test_several_steps_are_an_interleaved_delta_rule() -> None:
    """DeltaProduct's other form: n steps a token are n tokens, the decay at the first, the read at the last."""
    n, time = 3, 10
    q, k, v, beta, g, state, *_ = arguments(time, "scalar", n)
    spread_q, spread_g = q.new_zeros(2, n * time, 2, 4), g.new_zeros(2, n * time, 2)
    spread_q[:, n - 1 :: n], spread_g[:, ::n] = q, g
    y, last = delta_rule(q, k, v, beta, g, state, chunk_size=16)
    spread, end = delta_rule(spread_q, k, v, beta, spread_g, state, chunk_size=16)
    torch.testing.assert_close(y, spread[:, n - 1 :: n], rtol=0, atol=1e-11)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-11)


def test_two_reflections_are_a_rotation() -> None:
    """β = 2 twice rotates by twice the angle between the keys; 5 rotations by 72° are the identity."""
    angle = torch.tensor(torch.pi / 5, dtype=torch.float64)
    pair = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), torch.stack([angle.cos(), angle.sin()])])
    time = 100
    k = pair.repeat(time, 1).view(1, 2 * time, 1, 2)
    state = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, time, 1, 2)
    v = k.new_zeros(1, 2 * time, 1, 3)
    y, last = delta_rule(q, k, v, torch.full((1, 2 * time, 1), 2.0, dtype=torch.float64), state=state)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)
    torch.testing.assert_close(y[:, :-5], y[:, 5:], rtol=0, atol=1e-12)
    assert (y[:, :-1] - y[:, 1:]).abs().max() > 0.1


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("where", [[0], [4], [3], [0, 4, 8], [1, 2, 3], list(range(12))])
@pytest.mark.parametrize("untied", [False, True])
def test_resets_at_edges(decay: str, where: list[int], untied: bool) -> None:
    args = arguments(12, decay, 2, untied=untied)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, where] = True
    with backend("parallel"):
        found = with_gradients(lambda *a: ours(*a, reset=reset, chunk_size=8), args)
    assert_same(found, with_gradients(lambda *a: formula(*a, reset), args), 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_split_anywhere(decay: str) -> None:
    n = 2
    q, k, v, beta, g, state, *_ = arguments(13, decay, n)
    whole, last = delta_rule(q, k, v, beta, g, state, chunk_size=8)
    for cut in (1, 4, 7, 12):
        one, between = delta_rule(
            q[:, :cut], k[:, : n * cut], v[:, : n * cut], beta[:, : n * cut], g if g is None else g[:, :cut], state
        )
        two, end = delta_rule(
            q[:, cut:], k[:, n * cut :], v[:, n * cut :], beta[:, n * cut :], g if g is None else g[:, cut:], between
        )
        torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(end, last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_near_parallel_keys_in_float32(beta: float, spread: float) -> None:
    """Where an inverse by a power series would lose everything: keys that are nearly one key, β = 2.

    There the condition number of a chunk is C², and its rounding is what is left: 7e-5 at C = 32, 3e-4 at C = 64.
    """
    q, k, v, _, _, state, *_ = arguments(192, "none", sizes=(1, 2, 16, 8), dtype=torch.float32)
    k = F.normalize(torch.ones_like(k) + spread * torch.randn_like(k), dim=-1)
    args = [q, k, v, torch.full(k.shape[:3], beta), None, state]
    with backend("parallel"):
        found = with_gradients(ours, args)
    assert_same(found, with_gradients(formula, [a if a is None else a.double() for a in args]), 3e-4)


@pytest.mark.parametrize("decay", ("scalar", "vector"))
@pytest.mark.parametrize("strength", ["weak", "strong", "mixed", "infinite"])
def test_any_decay_in_float32(decay: str, strength: str) -> None:
    args = arguments(80, decay, dtype=torch.float32)
    strong = torch.rand(args[4].shape) < 0.5
    args[4] = {
        "weak": torch.full_like(args[4], -1e-4),
        "strong": torch.full_like(args[4], -20.0),
        "mixed": torch.where(strong, -20.0, -1e-4),
        "infinite": torch.where(strong, -torch.inf, -1e-2),
    }[strength]
    with backend("parallel"):
        found = with_gradients(ours, args)
    assert_same(found, with_gradients(formula, [a if a is None else a.double() for a in args]), 5e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("untied", [False, True])
def test_two_derivatives(route: str, decay: str, untied: bool) -> None:
    args = arguments(3, decay, 2, untied=untied, sizes=(1, 1, 2, 2))
    args = [a if a is None else a.requires_grad_() for a in args]
    reset = torch.tensor([[False, True, False]]) if untied else None
    with backend(route):
        assert gradcheck(lambda *a: ours(*a, reset=reset, chunk_size=4), args)
        assert gradgradcheck(lambda *a: ours(*a, reset=reset, chunk_size=4), args)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_is_computed_in_float32(decay: str) -> None:
    args = [a if a is None else a.bfloat16() for a in arguments(100, decay, sizes=(1, 2, 8, 8))]
    y, last = ours(*args)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    wanted, state = formula(*(a if a is None else a.double() for a in args))
    # The inputs are the same numbers, so only the rounding of the output is bfloat16's: half of 2⁻⁷.
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()
    assert_same([last], [state], 1e-4)


def test_long_sequence() -> None:
    time = 100_003
    q, v = torch.randn(2, 1, time, 1, 1, dtype=torch.float64)
    k = torch.ones(1, time, 1, 1, dtype=torch.float64)
    beta = 2 * torch.rand(1, time, 1, dtype=torch.float64)
    g = -torch.rand(1, time, 1, dtype=torch.float64) * 0.1
    state, wanted = 0.0, []
    for value, rate, kept in zip(
        v.flatten().tolist(), beta.flatten().tolist(), g.exp().flatten().tolist(), strict=True
    ):
        state = (1 - rate) * kept * state + rate * value
        wanted.append(state)
    y, last = delta_rule(q, k, v, beta, g)
    torch.testing.assert_close(y.flatten(), q.flatten() * torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(last.item(), state)


@pytest.mark.parametrize("untied", [False, True])
def test_vmap_over_seeds(untied: bool) -> None:
    q, k, v, beta, g, state, r, e = arguments(11, "vector", untied=untied)
    many = torch.randn(3, *v.shape, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        y, last = ours(q, k, values, beta, g, state, r, e, chunk_size=4)
        return y.square().sum() + last.square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(many)
    for seed in range(3):
        torch.testing.assert_close(found[seed], torch.func.grad(loss)(many[seed]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("decay", "untied"), [("none", False), ("scalar", False), ("vector", True)])
def test_compiles_as_one_graph(decay: str, untied: bool) -> None:
    args = arguments(9, decay, 2, untied=untied)
    compiled = torch.compile(lambda *a: ours(*a, chunk_size=8), fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, args), with_gradients(formula, args), 1e-10)


def test_compiles_where_only_the_queries_have_gradients() -> None:
    q, *rest = arguments(9, "vector", untied=True)
    compiled = torch.compile(lambda x: ours(x, *rest, chunk_size=8)[0], fullgraph=True, backend="aot_eager")
    x = q.clone().requires_grad_()
    compiled(x).sum().backward()
    y = q.clone().requires_grad_()
    formula(y, *rest)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)


def test_bad_arguments() -> None:
    q, k, v, beta, g, state, r, e = arguments(6, "scalar", 2, untied=True)
    with pytest.raises(ShapeError, match="11 steps for 6 queries"):
        delta_rule(q, k[:, :11], v[:, :11])
    with pytest.raises(ShapeError, match="values must have shape"):
        delta_rule(q, k, v[:, :6])
    with pytest.raises(ShapeError, match="beta must have shape"):
        delta_rule(q, k, v, beta[:, :6])
    with pytest.raises(ShapeError, match="log_decay must have shape"):
        delta_rule(q, k, v, beta, beta)
    with pytest.raises(ShapeError, match="read_keys must have shape"):
        delta_rule(q, k, v, beta, read_keys=r[:, :6])
    with pytest.raises(ShapeError, match="erase_keys must have shape"):
        delta_rule(q, k, v, beta, erase_keys=v)
    with pytest.raises(DtypeError, match="beta must be floating"):
        delta_rule(q, k, v, beta.long())
    with pytest.raises(ConfigurationError, match="chunk_size"):
        delta_rule(q, k, v, chunk_size=0)
    e[0, 1, 0, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="erase_keys holds nan"):
        delta_rule(q, k, v, beta, g, state, erase_keys=e, validate=True)
