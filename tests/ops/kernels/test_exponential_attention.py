"""`exponential_attention` in Triton against the plain route in float64: outputs, last state, all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.errors import BackendError
from ostinato.ops.exponential_attention import ExponentialState, exponential_attention
from ostinato.ops.kernels.triton.launch import INTERPRETED

FLOAT32 = 1e-5
ROUNDINGS = {torch.bfloat16: 1.5, torch.float16: 2.5}
"""How many times the error of rounding the exact result: see `exponential_attention_backward`."""

LENGTHS = [1, 31, 33, 65] if INTERPRETED else [1, 63, 64, 65, 1000, 4096]
SIZES = [(5, 3, torch.float32), (24, 40, torch.float32)]
if not INTERPRETED:
    # Float32 multiplied in full compiles slowly for wide heads.
    wide = [(72, 40), (256, 256), (16, 16), (24, 100), (64, 32)]
    SIZES[1:] = [(*sizes, torch.bfloat16) for sizes in wide]
NAMES = ("h", "C", "n", "m", "dq", "dk", "dv", "di", "df", "dC", "dn", "dm")
CANCELS = ("dn", "dm")
"""Not judged in half precision: small differences of what is rounded, as h hardly depends on the units of its state."""


def problem(
    device: torch.device,
    time: int,
    sizes: tuple[int, int, int, int] = (1, 2, 16, 24),
    dtype: torch.dtype = torch.float32,
    log_forget: float | None = None,
    positive: bool = False,
) -> list[Tensor]:
    """Arguments for (batch, heads, key_dim, value_dim); with `positive` no denominator comes near 0."""
    torch.manual_seed(time)
    batch, heads, key_dim, value_dim = sizes
    q, k = torch.randn(2, batch, time, heads, key_dim)
    v = torch.randn(batch, time, heads, value_dim)
    i, f = torch.randn(2, batch, time, heads)
    f = F.logsigmoid(f + 2) if log_forget is None else torch.full_like(f, log_forget)
    n = torch.randn(batch, heads, key_dim)
    if positive:
        q, k, n = q.abs(), k.abs(), n.abs()
    state = [torch.randn(batch, heads, key_dim, value_dim), n, torch.randn(batch, heads)]
    q, k, v = ((x * s).to(dtype) for x, s in ((q, key_dim**-0.5), (k, 1), (v, 1)))
    return [x.to(device) for x in (q, k, v, i, f, *state)]


def differentiated(route: str, arguments: list[Tensor], dtype: torch.dtype | None = None, **options) -> list[Tensor]:
    """Outputs, last state, and the gradients of a fixed random combination of both; new memory holds NaN."""
    given = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in arguments]
    torch.use_deterministic_algorithms(True)
    try:
        with ostinato.backend(exponential_attention=route):
            state = ExponentialState(*given[5:]) if len(given) > 5 else None
            outputs, last = exponential_attention(*given[:5], state, **options)
            results = [outputs, *last]
            weights = torch.Generator().manual_seed(0)
            loss = sum((x * torch.randn(x.shape, generator=weights).bfloat16().to(x)).sum() for x in results)
            return [*(x.detach() for x in results), *torch.autograd.grad(loss, given)]
    finally:
        torch.use_deterministic_algorithms(False)


def error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; of zeros, ‖found‖."""
    size = wanted.double().norm().item()
    return (found.double() - wanted.double()).norm().item() / (size or 1.0)


def check(
    arguments: list[Tensor], bound: float = FLOAT32, skip: tuple[str, ...] = (), route: str = "parallel", **options
) -> None:
    """All results are within the bound of those of `route` in float64, but for those to `skip`.

    In half precision the bound is `ROUNDINGS` times what rounding the exact result costs.
    """
    found = differentiated("triton", arguments, **options)
    wanted = differentiated(route, arguments, torch.float64, **options)
    for name, f, w in zip(NAMES[: 4 + len(arguments)], found, wanted, strict=True):
        if name not in skip:
            dtype = arguments[0].dtype
            limit = bound if dtype == torch.float32 else ROUNDINGS[dtype] * error(w.to(dtype), w)
            assert error(f, w) <= limit, f"{name}: {error(f, w):.1e} > {limit:.1e}"


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_float32(device: torch.device, time: int, with_reset: bool) -> None:
    reset = torch.rand(2, time).to(device) < 0.1 if with_reset else None
    check(problem(device, time, (2, 1, 16, 24)), reset=reset)


@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), SIZES)
def test_any_channels(device: torch.device, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(problem(device, 40, (1, 2, key_dim, value_dim), dtype), skip=CANCELS if dtype == torch.bfloat16 else ())


@pytest.mark.parametrize("log_forget", [-20.0, -1e-4, 0.0])
def test_strong_and_weak_decays(device: torch.device, log_forget: float) -> None:
    check(problem(device, LENGTHS[-1], log_forget=log_forget, positive=True))


def test_denominators_of_any_sign(device: torch.device) -> None:
    """Weak decays and keys of random sign, so that denominators come near 0 and every error grows with 1 / den.

    What float32 can do there is measured: arguments that differ by up to 2⁻²⁴ of themselves, in float64. The kernels
    may err 8 times as much; at 65 to 4096 steps they err up to 5 times as much, the plain routes 10 to 500 times as
    the kernels.
    """
    arguments = problem(device, LENGTHS[-1], log_forget=-1e-4)
    torch.manual_seed(0)
    moved = [x.double() * (1 + torch.rand(x.shape).to(x).double().sub(0.5) * 2**-23) for x in arguments]
    exact, nearby = (differentiated("parallel", given, torch.float64) for given in (arguments, moved))
    for name, f, e, n in zip(NAMES, differentiated("triton", arguments), exact, nearby, strict=True):
        # dm is two numbers: too few for their errors to be compared.
        assert name == "dm" or error(f, e) <= 8 * error(n, e), f"{name}: {error(f, e):.1e} > 8 × {error(n, e):.1e}"


def test_weak_decays_after_strong_ones(device: torch.device) -> None:
    arguments = problem(device, LENGTHS[-1], positive=True)
    f = arguments[4]
    f.copy_(torch.where(torch.arange(f.shape[1], device=device)[:, None] % 16 < 8, -20.0, -1e-4))
    check(arguments)


def test_resets_at_the_edges_of_chunks(device: torch.device) -> None:
    time = 100 if INTERPRETED else 1000
    for where in ([0], [31, 32, 33, 63, 64, 65], list(range(time))):
        reset = torch.zeros(1, time, dtype=torch.bool, device=device)
        reset[:, where] = True
        check(problem(device, time), reset=reset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    sizes = (1, 1, 16, 16) if INTERPRETED else (2, 4, 128, 128)
    for log_forget in (None, -4e-3):
        check(problem(device, LENGTHS[-1], sizes, dtype, log_forget), skip=CANCELS)


def test_exponentials_of_any_size(device: torch.device) -> None:
    """At input gates of e^±60 everything stays finite, and right where float32 can say it."""
    for level in (-60.0, 60.0):
        arguments = problem(device, 40, positive=True)
        arguments[3] += level
        arguments[5:] = [torch.zeros_like(x) for x in arguments[5:]]
        # m is about ±60 in float32: each exponent carries an error of 60 · 2⁻²⁴. The initial maximum has no effect.
        check(arguments, 5e-5, skip=("dm",))


def test_ties_of_the_maximum_share_its_gradient(device: torch.device) -> None:
    arguments = problem(device, 40)
    arguments[3].fill_(0)
    arguments[4].fill_(0)
    arguments[7].fill_(0)
    # With a large ε h depends on m. Half to each side at every step, as the loop has it; a tree of maxima shares
    # otherwise.
    check(arguments, route="reference", eps=0.5)


def test_without_initial_state(device: torch.device) -> None:
    check(problem(device, 40)[:5])


def test_gradient_of_the_last_state_alone(device: torch.device) -> None:
    arguments = [x.requires_grad_() for x in problem(device, 40)]

    def gradients(route: str) -> tuple[Tensor, ...]:
        with ostinato.backend(exponential_attention=route):
            last = exponential_attention(*arguments[:5], ExponentialState(*arguments[5:]))[1]
        return torch.autograd.grad(last.normalizer.sum(), arguments, materialize_grads=True)

    for found, wanted in zip(gradients("triton"), gradients("parallel"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_segments_of_time(device: torch.device) -> None:
    """Few heads and many chunks: time is cut, so that all of the card works."""
    time = 32 * 17 if INTERPRETED else 65536
    reset = torch.zeros(1, time, dtype=torch.bool, device=device)
    reset[:, [100, 300]] = True
    check(problem(device, time, (1, 1, 16, 16), positive=True), reset=reset)
    check(problem(device, time, (1, 1, 16, 16), positive=True, log_forget=-1e-4))


def test_any_strides_and_mixed_types(device: torch.device) -> None:
    arguments = problem(device, 20)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments[:5]]
    moved[2] = moved[2].bfloat16()
    arguments[2] = moved[2].float()
    with ostinato.backend(exponential_attention="triton"):
        found = exponential_attention(*moved, ExponentialState(*arguments[5:]))
        wanted = exponential_attention(*arguments[:5], ExponentialState(*arguments[5:]))
    assert error(found[0], wanted[0]) < 1e-6
    assert error(found[1].memory, wanted[1].memory) < 1e-6


def test_compiles_as_one_graph(device: torch.device) -> None:
    arguments = [x.requires_grad_() for x in problem(device, 20)]

    def loss(*given: Tensor) -> Tensor:
        outputs, last = exponential_attention(*given[:5], ExponentialState(*given[5:]))
        return outputs.square().sum() + last.memory.sum()

    with ostinato.backend(exponential_attention="triton"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
        found = torch.autograd.grad(compiled(*arguments), arguments)
        wanted = torch.autograd.grad(loss(*arguments), arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_second_derivative_is_refused(device: torch.device) -> None:
    q, *rest = problem(device, 20)[:5]
    q.requires_grad_()
    with ostinato.backend(exponential_attention="triton"):
        outputs = exponential_attention(q, *rest)[0]
        (grad,) = torch.autograd.grad(outputs.square().sum(), q, create_graph=True)
        with pytest.raises(BackendError, match="differentiable once"):
            grad.sum().backward()


def test_says_what_it_does_not_serve(device: torch.device) -> None:
    arguments = problem(device, 20)[:5]
    with ostinato.backend(exponential_attention="triton"):
        with pytest.raises(BackendError, match="float64"):
            exponential_attention(*(x.double() for x in arguments))
        with pytest.raises(BackendError, match="at most 256"):
            exponential_attention(*problem(device, 3, (1, 1, 257, 2))[:5])
