"""linear_attention's Triton kernels against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import BackendError
from ostinato.ops.kernels.triton.launch import INTERPRETED
from ostinato.ops.linear_attention import linear_attention

DECAYS = ("none", "scalar", "vector")
NAMES = ("y", "last", "dq", "dk", "dv", "dg", "ds")


def arguments(
    device: torch.device,
    decay: str,
    time: int,
    sizes: tuple[int, int, int, int] = (2, 2, 16, 16),
    dtype: torch.dtype = torch.float32,
    strength: float | str = 0.1,
) -> list[Any]:
    """Queries, keys, values, log-decays and a state; strength "mixed" is −20 or −1e-4 a step, "never" also −∞."""
    batch, heads, key_dim, value_dim = sizes
    q, k = (torch.randn(batch, time, heads, key_dim, device=device) for _ in range(2))
    v = torch.randn(batch, time, heads, value_dim, device=device)
    state = torch.randn(batch, heads, key_dim, value_dim, device=device)
    g = None
    if decay != "none":
        uniform = torch.rand((batch, time, heads, key_dim)[: 3 if decay == "scalar" else 4], device=device)
        if isinstance(strength, float):
            g = -strength * uniform if strength < 1 and strength > 1e-3 else torch.full_like(uniform, -strength)
        else:
            g = torch.where(uniform < 0.5, -20.0, -1e-4)
            g = g.masked_fill(uniform > 0.9, -torch.inf) if strength == "never" else g
    return [q.to(dtype), (k / key_dim**0.5).to(dtype), v.to(dtype), g, state]


def results(
    args: list[Any],
    reset: Tensor | None,
    backend: str,
    dtype: torch.dtype | None = None,
    function: Any = None,
) -> dict[str, Tensor]:
    """Outputs, the last state, and the gradients of a fixed random combination of both."""
    leaves: list[Any] = [None if a is None else a.detach().to(dtype or a.dtype).requires_grad_() for a in args]
    with ostinato.backend(linear_attention=backend):
        found = (function or linear_attention)(*leaves, reset=reset)
    torch.manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=found[0].device)
    for tensor, as_input in zip(found, (args[2], args[4]), strict=True):
        # The gradient of the outputs comes in the inputs' type: the same numbers for both.
        weight = torch.randn(tensor.shape, device=tensor.device).to(
            torch.float32 if as_input is None else as_input.dtype
        )
        loss = loss + (tensor.double() * weight.double()).sum()
    live = [(name, leaf) for name, leaf in zip(NAMES[2:], leaves, strict=True) if leaf is not None]
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in live])
    return dict(zip(NAMES, found, strict=False)) | {n: g for (n, _), g in zip(live, gradients, strict=True)}


def reference(args: list[Any], reset: Tensor | None) -> dict[str, Tensor]:
    """In float64: by the definition, or where that takes too long by the parallel route, which is tested with it."""
    time = args[0].shape[1] if args[0] is not None else 0
    return results(args, reset, "reference" if time <= 200 else "parallel", torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    assert all(value <= bound for value in errors.values()), errors


LENGTHS = (1, 64, 65) if INTERPRETED else (1, 63, 64, 65, 1000, 4096)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", LENGTHS)
def test_float32(device: torch.device, decay: str, time: int) -> None:
    args = arguments(device, decay, time, (1, 2, 16, 16))
    assert_close(results(args, None, "triton"), reference(args, None), 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_odd_sizes_and_strides(device: torch.device, decay: str) -> None:
    args = arguments(device, decay, 40, (1, 2, 20, 40))
    spread = [None if a is None else a.transpose(-1, -2).contiguous().transpose(-1, -2) for a in args]
    assert_close(results(spread, None, "triton"), reference(args, None), 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_of_time(device: torch.device, decay: str) -> None:
    """Few heads and a long sequence: time is cut, and the state goes from one piece to the next."""
    time = 300 if INTERPRETED else 65_536
    args = arguments(device, decay, time, (1, 1, 16, 16))
    for mask in (None, torch.rand(1, time, device=device) < 2 / time):
        assert_close(results(args, mask, "triton"), reference(args, mask), 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_resets(device: torch.device, decay: str) -> None:
    """At the start, around edges of chunks, everywhere, and nowhere."""
    args = arguments(device, decay, 70, (3, 1, 16, 16))
    reset = torch.zeros(3, 70, dtype=torch.bool, device=device)
    reset[0, [0, 31, 32, 33, 64]] = True
    reset[1] = True
    assert_close(results(args, reset, "triton"), reference(args, reset), 1e-5)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("strength", [20.0, 1e-4, "mixed", "never"])
def test_strong_and_weak_decays(device: torch.device, decay: str, strength: float | str) -> None:
    args = arguments(device, decay, 70, (1, 1, 16, 16), strength=strength)
    assert_close(results(args, None, "triton"), reference(args, None), 1e-5)


# An exact result rounded to bfloat16 errs by 1.66e-3 of its norm, to float16 by an eighth of that. The products err by
# more: of a score and of the state, which are rounded where they enter products. What is decayed enters them in two
# terms in bfloat16; in float16 in one, and the gradient of the decays is a sum of differences of such products.
ROUNDING = {torch.bfloat16: 1.66e-3, torch.float16: 2.07e-4}


def assert_rounded(found: dict[str, Tensor], wanted: dict[str, Tensor], decay: str) -> None:
    dtype = found["y"].dtype
    errors = {name: error(found[name], wanted[name]) / ROUNDING[dtype] for name in wanted}
    bounds = dict.fromkeys(NAMES, 1.5)
    if dtype == torch.float16:
        bounds = dict.fromkeys(NAMES, 2.2 if decay == "vector" else 1.5) | {"dg": 8.0}
    assert all(errors[name] <= bounds[name] for name in errors), errors


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ROUNDING if INTERPRETED else [torch.bfloat16])
def test_half_precision(device: torch.device, decay: str, dtype: torch.dtype) -> None:
    sizes = (1, 1, 32, 32) if INTERPRETED else (1, 2, 128, 64)
    for strength in (0.1, 0.01) if dtype == torch.bfloat16 else (0.1,):
        args = arguments(device, decay, 130 if INTERPRETED else 1000, sizes, dtype, strength)
        reset = torch.rand(1, args[0].shape[1], device=device) < 0.01
        found = results(args, reset, "triton")
        assert found["y"].dtype == dtype
        assert found["last"].dtype == torch.float32
        assert_rounded(found, reference(args, reset), decay)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("sizes", [(24, 40)] if INTERPRETED else [(16, 16), (24, 100), (32, 16), (64, 32), (100, 24)])
def test_any_channels_of_bfloat16(device: torch.device, decay: str, sizes: tuple[int, int]) -> None:
    args = arguments(device, decay, 70 if INTERPRETED else 300, (1, 2, *sizes), torch.bfloat16)
    assert_rounded(results(args, None, "triton"), reference(args, None), decay)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_tiles_by_the_copy_engine(
    device: torch.device, decay: str, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors through descriptors or not: bfloat16, powers of two; the last chunk is not whole."""
    from ostinato.ops.kernels.triton.linear_attention_channels_launch import ChannelWalks
    from ostinato.ops.kernels.triton.linear_attention_heads import HeadWalks

    monkeypatch.setattr(HeadWalks, "copies", copies)
    monkeypatch.setattr(ChannelWalks, "copies", copies)
    args = arguments(device, decay, 130, (2, 2, 32, 32) if INTERPRETED else (2, 2, 128, 128), torch.bfloat16)
    assert_rounded(results(args, None, "triton"), reference(args, None), decay)


@pytest.mark.parametrize("decay", DECAYS)
def test_strong_decays_in_half_precision(device: torch.device, decay: str) -> None:
    """One sequence of strong decays beside one of mild: with a decay per channel, two kernels share the work."""
    args = arguments(device, decay, 70, dtype=torch.bfloat16)
    if args[3] is not None:
        args[3][:1] = torch.where(torch.rand_like(args[3][:1]) < 0.5, -20.0, -1e-4)
    assert_close(results(args, None, "triton"), reference(args, None), 1e-2)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_a_state(device: torch.device, decay: str) -> None:
    args = arguments(device, decay, 33)
    wanted = results([*args[:4], torch.zeros_like(args[4])], None, "reference", torch.float64)
    del wanted["ds"]
    assert_close(results([*args[:4], None], None, "triton"), wanted, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_is_left_unwritten(device: torch.device, decay: str) -> None:
    """What empty memory holds does not matter: NaN in it stays out of the results."""
    args = arguments(device, decay, 50)
    torch.use_deterministic_algorithms(True)  # Fills empty tensors with NaN.
    try:
        found = results(args, None, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_close(found, reference(args, None), 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_compiles_as_one_graph(device: torch.device, decay: str) -> None:
    args = arguments(device, decay, 20)
    function = torch.compile(linear_attention, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    assert_close(results(args, None, "triton", function=function), reference(args, None), 1e-5)


def test_types_of_decays_and_states(device: torch.device) -> None:
    """A bfloat16 decay and a float16 state beside bfloat16 inputs: gradients in their own types."""
    args = arguments(device, "scalar", 40, dtype=torch.bfloat16)
    args[3], args[4] = args[3].bfloat16(), args[4].half()
    found, wanted = results(args, None, "triton"), reference(args, None)
    assert (found["dg"].dtype, found["ds"].dtype) == (torch.bfloat16, torch.float16)
    assert all(error(found[name], wanted[name]) < 1e-2 for name in wanted)


def test_only_outputs_or_only_the_last_state(device: torch.device) -> None:
    args = [a.requires_grad_() for a in arguments(device, "scalar", 40) if a is not None]
    for which in (0, 1):
        gradients = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            with ostinato.backend(linear_attention=backend):
                loss = linear_attention(*(a.to(dtype) for a in args))[which].square().sum()
            gradients.append(torch.autograd.grad(loss, args, allow_unused=True))
        for one, other in zip(*gradients, strict=True):
            wanted = torch.zeros_like(one) if other is None else other
            assert one is None or (one - wanted).norm() <= 1e-5 * wanted.norm()


def test_no_second_derivative(device: torch.device) -> None:
    args = [a.requires_grad_() for a in arguments(device, "scalar", 8) if a is not None]
    with ostinato.backend(linear_attention="triton"):
        loss = linear_attention(*args)[0].square().sum()
    first = torch.autograd.grad(loss, args[0], create_graph=True)[0]
    with pytest.raises(BackendError, match="no derivative of its own"):
        first.square().sum().backward()


def test_refuses(device: torch.device) -> None:
    with ostinato.backend(linear_attention="triton"):
        for sizes, dtype, words in (((1, 1, 16, 16), torch.float64, "float64"), ((1, 1, 16, 300), None, "up to 256")):
            with pytest.raises(BackendError, match=words):
                linear_attention(*arguments(device, "none", 4, sizes, dtype or torch.float32))
        q, k, v, g, state = arguments(device, "none", 4)
        with pytest.raises(BackendError, match="one type"):
            linear_attention(q, k.bfloat16(), v, g, state)
