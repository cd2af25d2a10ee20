"""`attention`: routes against each other and against a dense formula, cache, window, openings, derivatives."""

from __future__ import annotations

import itertools
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ostinato
from ostinato.errors import BackendError, ConfigurationError, DtypeError, NonFiniteError, ShapeError
from ostinato.ops.attention import AttentionState, attention, attention_step, empty_cache, softmax_weight
from ostinato.ops.routes import ENGINES, Route

HEADS, KV_HEADS, KEY, VALUE = 4, 2, 4, 3


def draw(time: int, *, batch: int = 2, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    shapes = [(batch, time, HEADS, KEY), (batch, time, KV_HEADS, KEY), (batch, time, KV_HEADS, VALUE)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def draw_cache(cached: int, *, batch: int = 2, grad: bool = False) -> AttentionState:
    return AttentionState(
        torch.randn(batch, cached, KV_HEADS, KEY, dtype=torch.float64, requires_grad=grad),
        torch.randn(batch, cached, KV_HEADS, VALUE, dtype=torch.float64, requires_grad=grad),
        torch.rand(batch, cached) < 0.7,
    )


def softplus_weight(scores: Tensor, visible: Tensor) -> Tensor:
    """The first stage of arXiv 2501.13428, with the number of visible keys of each row."""
    count = visible.sum(-1, keepdim=True)
    weights = F.softplus(count.log() * scores).masked_fill(~visible, 0)
    return weights / weights.sum(-1, keepdim=True)


OPENINGS = {
    "none": {},
    "bias": {"bias": lambda distance: -0.3 * distance.double().unsqueeze(0)},
    "weight": {"weight": softplus_weight},
    "multiplier": {"multiplier": torch.linspace(-1, 1, 4 * HEADS, dtype=torch.float64).view(HEADS, 4)},
}


def dense(queries: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """The textbook: one big masked matrix."""
    time = queries.shape[1]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (keys, values))
    scores = torch.einsum("bihd,bjhd->bhij", queries, k) / KEY**0.5
    i, j = torch.arange(time)[:, None], torch.arange(time)
    hidden = (j > i) | (i - j >= (window or time))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("route", ["reference", "parallel", "fused"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_equals_the_dense_formula(route: str, window: int | None) -> None:
    dtype = torch.float32 if route == "fused" else torch.float64
    inputs = draw(40, dtype=dtype)
    with ostinato.backend(attention=route):
        outputs, state = attention(*inputs, window=window)
    torch.testing.assert_close(outputs, dense(*inputs, window), atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    kept = 40 if window is None else window - 1
    assert state.keys.shape[1] == kept
    torch.testing.assert_close(state.keys, inputs[1][:, 40 - kept :], atol=0, rtol=0)


# The longest runs once: all openings pass through the same code.
@pytest.mark.parametrize(("time", "opening"), [*itertools.product([1, 2, 63, 65], OPENINGS), (300, "weight")], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 70])
def test_parallel_equals_reference(time: int, window: int | None, opening: str) -> None:
    cached = 5 if window is None else window - 1
    inputs, cache = draw(time, grad=True), draw_cache(cached, grad=True)
    reset = torch.rand(2, time) < 0.1
    probe = torch.randn(2, time, HEADS, VALUE, dtype=torch.float64)
    results = []
    for route in ("reference", "parallel"):
        with ostinato.backend(attention=route):
            outputs, state = attention(*inputs, cache, window=window, reset=reset, **OPENINGS[opening])
        loss = (outputs * probe).sum() + state.keys.square().sum() + state.values.square().sum()
        gradients = torch.autograd.grad(loss, [*inputs, cache.keys, cache.values])
        results.append((outputs, *state, *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_fused_equals_reference(window: int | None, dtype: torch.dtype) -> None:
    inputs = draw(290, dtype=dtype)
    reset = torch.rand(2, 290) < 0.02
    exact, _ = attention(*(x.double() for x in inputs), window=window, reset=reset)
    with ostinato.backend(attention="fused"):
        first, state = attention(*(x[:, :130] for x in inputs), window=window, reset=reset[:, :130])
        second, state = attention(*(x[:, 130:] for x in inputs), state, window=window, reset=reset[:, 130:])
    outputs = torch.cat([first, second], dim=1)
    assert outputs.dtype == dtype and state.keys.dtype == dtype
    torch.testing.assert_close(outputs.double(), exact, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32_on_the_explicit_routes(dtype: torch.dtype) -> None:
    inputs = draw(20, dtype=dtype)
    exact, _ = attention(*(x.double() for x in inputs))
    for route in ("reference", "parallel"):
        with ostinato.backend(attention=route):
            outputs, _ = attention(*inputs)
        assert outputs.dtype == dtype
        torch.testing.assert_close(outputs, exact.to(dtype), atol=1e-5 if dtype == torch.float32 else 8e-3, rtol=0)


@pytest.mark.parametrize("route", ["reference", "parallel"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("opening", OPENINGS)
def test_first_and_second_derivatives(route: str, window: int | None, opening: str) -> None:
    cache = draw_cache(2, batch=1, grad=True)
    reset = torch.tensor([[False, False, True]])

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        state = AttentionState(keys, values, cache.valid)
        outputs, state = attention(q, k, v, state, window=window, reset=reset, **OPENINGS[opening])
        return outputs, state.keys, state.values

    arguments = (*draw(3, batch=1, grad=True), cache.keys, cache.values)
    with ostinato.backend(attention=route):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=opening != "weight" or window is not None)


def test_derivatives_through_recomputed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, blocks = import_module("ostinato.ops.attention_blocks"), []
    monkeypatch.setattr(module, "_block_size", lambda window: 2)
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: (blocks.append(1), checkpoint(*a, **k))[1])
    inputs = draw(5, batch=1, grad=True)
    table = torch.randn(HEADS, 3, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heat: Tensor) -> Tensor:
        # The weight closes over a parameter: recomputation must not lose its gradient.
        def weight(scores: Tensor, visible: Tensor) -> Tensor:
            return softmax_weight(scores * heat, visible)

        return attention(q, k, v, bias=bias, weight=weight, multiplier=bias)[0]

    arguments = (*inputs, table, temperature)
    with ostinato.backend(attention="parallel"):
        function(*arguments)
        assert len(blocks) == 3
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("value_dim", [KEY, VALUE])
@pytest.mark.parametrize("time", [5, 300])
@pytest.mark.parametrize("window", [None, 3])
def test_the_fused_route_twice_differentiated_raises_or_is_right(time: int, window: int | None, value_dim: int) -> None:
    # torch takes its kernel where key and value widths agree, and plain operations where they do not.
    inputs = [torch.randn(1, time, 2, width, requires_grad=True) for width in (KEY, KEY, value_dim)]

    def second(route: str) -> tuple[Tensor, ...]:
        with ostinato.backend(attention=route):
            outputs, _ = attention(*inputs, window=window)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs)

    right = second("parallel")
    if value_dim == KEY:
        with pytest.raises(RuntimeError, match="not implemented"):
            second("fused")
    else:
        for expected, found in zip(right, second("fused"), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_choice_of_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, taken = ENGINES["attention"], []
    choose = engine.choose

    def watch(*args: object, **kwargs: object) -> Route:
        taken.append(choose(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(engine, "choose", watch)
    attention(*draw(4, dtype=torch.float32))
    attention(*draw(4, dtype=torch.float32), **OPENINGS["weight"])
    attention(*draw(4))
    attention(*draw(1, dtype=torch.float32))
    assert [route.name for route in taken] == ["fused", "parallel", "parallel", "reference"]
    with ostinato.backend(attention="fused"), pytest.raises(BackendError, match="float64"):
        attention(*draw(4))


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients() -> None:
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([[True, False, True], [False, False, False]])
    weights = softmax_weight(scores, visible)
    assert weights[1].tolist() == [0, 0, 0]
    torch.testing.assert_close(weights[0, [0, 2]], scores[0, [0, 2]].softmax(-1))
    assert torch.autograd.gradcheck(softmax_weight, (scores, visible))
    assert torch.autograd.gradgradcheck(softmax_weight, (scores, visible))


def test_entries_that_are_not_valid_are_never_seen() -> None:
    inputs, cache = draw(3), draw_cache(4)
    nothing = cache._replace(valid=torch.zeros_like(cache.valid))
    poisoned = nothing._replace(keys=nothing.keys + 1e6, values=nothing.values * 1e6)
    fresh, _ = attention(*inputs)
    for route in ("reference", "parallel"):
        with ostinato.backend(attention=route):
            outputs, state = attention(*inputs, poisoned)
        torch.testing.assert_close(outputs, fresh, atol=1e-12, rtol=0)
        assert state.keys[:, :4].abs().max() == 0 and not state.valid[:, :4].any()


def test_reset_forgets_the_cache_and_the_earlier_sequence() -> None:
    inputs = draw(6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 0], reset[0, 4] = True, True
    outputs, state = attention(*inputs, draw_cache(3), reset=reset)
    first, _ = attention(*(x[:1, :4] for x in inputs))
    second, alone = attention(*(x[:1, 4:] for x in inputs))
    torch.testing.assert_close(outputs[:1], torch.cat([first, second], dim=1), atol=1e-12, rtol=0)
    torch.testing.assert_close(state.keys[:1][state.valid[:1]], alone.keys[0])
    assert state.valid[0].tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize("at_once", [1, 2, 64])
@pytest.mark.parametrize("window", [1, 5, 64, 90, 200])
def test_the_blocks_of_a_window_are_one_batch_or_several(
    window: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ostinato.ops.attention_blocks"], "_BLOCKS_AT_ONCE", at_once)
    inputs, cache = draw(410), draw_cache(window - 1)
    reset = torch.rand(2, 410) < 0.01
    with ostinato.backend(attention="parallel"):
        outputs, state = attention(*inputs, cache, window=window, reset=reset)
    with ostinato.backend(attention="reference"):
        expected, last = attention(*inputs, cache, window=window, reset=reset)
    torch.testing.assert_close(outputs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last, atol=0, rtol=0)


def test_a_window_keeps_its_state_small_and_owns_it() -> None:
    state = None
    for time in (1, 2, 50):
        _, state = attention(*draw(time), state, window=4)
        assert state.keys.shape[1] == 3
        assert state.keys.untyped_storage().nbytes() == state.keys.numel() * state.keys.element_size()
    assert ostinato.state.num_bytes(state) == 2 * 3 * (KV_HEADS * (KEY + VALUE) * 8 + 1)


def test_step_is_the_definition() -> None:
    inputs = draw(9)
    whole, last = attention(*inputs, window=4)
    state = empty_cache(2, KV_HEADS, KEY, VALUE, 4, dtype=torch.float64)
    for t in range(9):
        output, state = attention_step(*(x[:, t] for x in inputs), state, window=4)
        torch.testing.assert_close(output, whole[:, t], atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_very_long_sequence(dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, 100_003, 1, 2, dtype=dtype, requires_grad=True) for _ in range(3)]
    outputs, _ = attention(*inputs, window=8)
    outputs[:, -1].sum().backward()
    tail, _ = attention(*(x[:, -8:].double() for x in inputs))
    torch.testing.assert_close(outputs[:, -1].double(), tail[:, -1], atol=1e-5, rtol=0)
    assert inputs[0].grad is not None and inputs[0].grad[:, :-1].abs().max() == 0
    assert inputs[2].grad is not None and inputs[2].grad[:, -8:].abs().min() > 0


def test_memory_is_linear_in_time() -> None:
    """What autograd keeps, counted: four times the time keeps four times the bytes, not sixteen."""

    def kept(time: int) -> int:
        inputs = [torch.randn(1, time, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(*inputs)
        return sum(seen.values())

    assert kept(2048) < 6 * kept(512)


def test_bias_can_be_a_table_or_a_function_and_its_last_column_goes_on() -> None:
    inputs = draw(7)
    table = torch.randn(1, 3, dtype=torch.float64)
    given, _ = attention(*inputs, bias=table)
    called, _ = attention(*inputs, bias=lambda distance: table[:, distance.clamp(max=2)])
    torch.testing.assert_close(given, called, atol=1e-12, rtol=0)
    assert (given - attention(*inputs)[0]).abs().max() > 1e-3


def test_torch_func_and_compile() -> None:
    inputs = torch.randn(3, 2, 9, HEADS, KEY)

    def loss(x: Tensor) -> Tensor:
        return attention(x, x[:, :, :KV_HEADS], x[:, :, KV_HEADS:], window=4)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(inputs)
    torch.testing.assert_close(together[1], torch.func.grad(loss)(inputs[1]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs[0]), loss(inputs[0]))


def test_what_does_not_fit_is_said() -> None:
    q, k, v = draw(5)
    with pytest.raises(ShapeError, match="cannot share"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ShapeError, match="keys must have shape"):
        attention(q, k[:, :4], v)
    with pytest.raises(ShapeError, match="empty along time"):
        attention(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(DtypeError, match="floating"):
        attention(q.long(), k, v)
    with pytest.raises(DtypeError, match="real"):
        attention(q.to(torch.complex128), k, v)
    with pytest.raises(ConfigurationError, match="window"):
        attention(q, k, v, window=0)
    with pytest.raises(ShapeError, match=r"state\.valid"):
        attention(q, k, v, draw_cache(2), window=4)
    with pytest.raises(ShapeError, match=r"state\.keys"):
        attention(q, k, v, draw_cache(2)._replace(keys=torch.zeros(2, 2, 1, KEY)))
    with pytest.raises(ShapeError, match="bias"):
        attention(q, k, v, bias=torch.zeros(3, 5))
    with pytest.raises(DtypeError, match="reset"):
        attention(q, k, v, reset=torch.zeros(2, 5))
    q[1, 2, 0, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"queries holds nan at index \(1, 2, 0, 3\)"):
        attention(q, k, v, validate=True)
