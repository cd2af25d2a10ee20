"""`delta_rule` in Triton against its other routes in float64: outputs, last state, and the gradients of every input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.errors import BackendError
from ostinato.ops import delta_rule
from ostinato.ops.kernels.triton.launch import INTERPRETED

FLOAT32 = 1e-5
FLOAT16 = 1.5e-3
"""‖error‖ / ‖exact‖. Rounding the exact result alone costs 2e-4; what is multiplied is rounded as often."""
ROUNDINGS = 1.5
"""For bfloat16, ‖error‖ over what rounding the exact result to bfloat16 costs. What is multiplied is rounded to
float16, an eighth as much, and these errors add up in squares."""

# On a card every new size is compiled anew, for some seconds each.
DIMENSIONS = [(40, 16), (24, 33)] if INTERPRETED else [(24, 100), (16, 64), (64, 100), (128, 128), (256, 256)]
LENGTHS = [1, 31, 33, 65] if INTERPRETED else [1, 63, 64, 65, 1000, 4096]


def problem(
    device: torch.device,
    time: int,
    decay: str = "scalar",
    n: int = 1,
    sizes: tuple[int, int, int, int] = (1, 1, 16, 24),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """Queries, keys, values, β, log-decays and initial state, of size (batch, heads, key_dim, value_dim)."""
    batch, heads, key_dim, value_dim = sizes
    q = torch.randn(batch, time, heads, key_dim, device=device)
    k = torch.randn(batch, n * time, heads, key_dim, device=device)
    v = torch.randn(batch, n * time, heads, value_dim, device=device)
    # Within [0, 2], both ends included.
    beta = (2.4 * torch.rand(batch, n * time, heads, device=device) - 0.2).clamp(0, 2)
    shape = {"none": None, "scalar": (batch, time, heads), "vector": (batch, time, heads, key_dim)}[decay]
    g = None if shape is None else -torch.rand(shape, device=device) * 0.3
    state = torch.randn(batch, heads, key_dim, value_dim, device=device)
    return [q.to(dtype), k.to(dtype), v.to(dtype), beta, g, state]


def decays(like: Tensor, strength: str) -> Tensor:
    """Log-decays of the shape of `like`."""
    strong = torch.rand_like(like) < 0.5
    return {
        "weak": torch.full_like(like, -1e-4),
        "strong": torch.full_like(like, -20.0),
        "mixed": torch.where(strong, -20.0, -1e-4),
        "infinite": torch.where(strong, -torch.inf, -1e-2),
    }[strength]


NAMES = "qkvβgsre"


def with_gradients(arguments: list[Tensor | None], **options) -> list[Tensor]:
    """Outputs, last state, and the gradients of all arguments; the cotangents are the same in every precision.

    Beyond those of `problem` there may be two: the keys that read and those that erase.
    """
    given = [None if x is None else x.detach().requires_grad_() for x in arguments]
    read, erase = given[6:] or (None, None)
    results = delta_rule(*given[:6], read_keys=read, erase_keys=erase, **options)
    weights = torch.Generator().manual_seed(0)
    loss = 0
    for x in results:
        weight = torch.randn(x.shape, generator=weights).bfloat16()
        loss = loss + (x * weight.to(x)).sum()
    return [*(x.detach() for x in results), *torch.autograd.grad(loss, [x for x in given if x is not None])]


def poisoned(function, *arguments, **options) -> list[Tensor]:
    """The results where uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        return function(*arguments, **options)
    finally:
        torch.use_deterministic_algorithms(False)


def compared(arguments: list[Tensor | None], **options) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The kernels' results and those in float64, by their names."""
    with ostinato.backend("triton"):
        found = poisoned(with_gradients, arguments, **options)
    wide = [None if x is None else x.double() for x in arguments]
    with ostinato.backend("reference" if arguments[0].shape[1] <= 100 else "parallel"):
        exact = with_gradients(wide, **options)
    names = ["outputs", "last", *(n for n, x in zip(NAMES, arguments, strict=False) if x is not None)]
    for name, ours, theirs in zip(names, found, exact, strict=True):
        assert ours.shape == theirs.shape
        yield name, ours.double(), theirs


def assert_exact(arguments: list[Tensor | None], bound: float, decay_bound: float | None = None, **options) -> None:
    """The kernels' results are within ‖error‖ ≤ bound ‖exact‖ of those in float64."""
    errors, wrong = {}, []
    for name, ours, theirs in compared(arguments, **options):
        limit = decay_bound if name == "g" and decay_bound else bound
        error, size = (ours - theirs).norm(), theirs.norm()
        errors[name] = f"{error / size:.1e}"
        if not error <= limit * size:
            wrong.append(name)
    assert not wrong, f"{wrong} of {errors}"


def assert_rounded(arguments: list[Tensor | None], **options) -> None:
    """The kernels' results are within ROUNDINGS of those in float64, each as much as rounding costs on average.

    Not as much as rounding these results costs: where a few entries make up the norm, that is a matter of chance.
    """
    errors = {}
    for name, ours, theirs in compared(arguments, **options):
        errors[name] = ((ours - theirs).norm() / (1.66e-3 * theirs.norm())).item()
    assert all(error <= ROUNDINGS for error in errors.values()), {name: f"{e:.2f}" for name, e in errors.items()}


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_lengths(device: torch.device, time: int, decay: str) -> None:
    assert_exact(problem(device, time, decay, sizes=(1, 2, 16, 24)), FLOAT32, normalize=True)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_several_steps_a_token(device: torch.device, n: int, decay: str) -> None:
    reset = torch.zeros(1, 35, dtype=torch.bool, device=device)
    reset[:, [0, 10, 11, 21, 32]] = True
    assert_exact(problem(device, 35, decay, n), FLOAT32, normalize=True, reset=reset)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("time", [70, 1000])
def test_bfloat16(device: torch.device, time: int, decay: str) -> None:
    if decay == "vector" and INTERPRETED:
        time = min(time, 200)
    assert_rounded(problem(device, time, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16), normalize=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("factor", [0.05, 10.0])
def test_bfloat16_by_strength_of_decay(device: torch.device, decay: str, factor: float) -> None:
    arguments = problem(device, 150, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    arguments[4] = factor * arguments[4]
    assert_rounded(arguments, normalize=True)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_bfloat16_of_any_size(device: torch.device, decay: str, scale: float) -> None:
    """Values, state and their gradients far outside float16's range, as which they are multiplied."""
    arguments = problem(device, 130, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    arguments[2], arguments[5] = scale * arguments[2], scale * arguments[5]
    assert_rounded(arguments, normalize=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_bfloat16_without_values_at_first(device: torch.device, decay: str) -> None:
    """Tiles of zeros have no largest entry to be scaled by."""
    arguments = problem(device, 200, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    arguments[2][:, :140] = 0
    arguments[5].zero_()
    assert_rounded(arguments, normalize=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_bfloat16_of_keys_of_any_length(device: torch.device, decay: str) -> None:
    """Keys and queries of zero length, some very short among the others, and all as they come, with rates to match."""
    arguments = problem(device, 130, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    q, k, *others = arguments
    assert_rounded([q.index_fill(1, torch.tensor([3, 64, 65], device=device), 0), k, *others], normalize=True)
    some = torch.arange(130, device=device) % 3 == 0
    k = torch.where(some[:, None, None], torch.where(some.roll(3)[:, None, None], 1e-5 * k, 0 * k), k)
    assert_rounded([q, k, *others], normalize=True)
    k = (arguments[1] * torch.exp2(torch.randint(-8, 3, (1, 130, 1, 1), device=device))).bfloat16()
    rate = others[1] / k.float().square().sum(-1)
    assert_rounded([1e-3 * q, k, others[0], rate, *others[2:]])


def test_bfloat16_of_nearly_parallel_keys(device: torch.device) -> None:
    """Not within 1.5 roundings (with β = 2 the condition number of a chunk of 64 rows is 64²), but not far from it."""
    arguments = problem(device, 130, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    arguments[1] = (1 + 0.05 * torch.randn_like(arguments[1].float())).bfloat16()
    arguments[3] = torch.full_like(arguments[3], 2.0)
    assert_exact(arguments, 6e-3, normalize=True)


def test_same_twice(device: torch.device) -> None:
    arguments = problem(device, 130, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    with ostinato.backend("triton"):
        for ours, again in zip(*(with_gradients(arguments, normalize=True) for _ in range(2)), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_bfloat16_of_several_steps_a_token(device: torch.device, n: int, decay: str) -> None:
    assert_rounded(
        problem(device, 35 if INTERPRETED else 300, decay, n, (1, 1, 64, 64), torch.bfloat16), normalize=True
    )


def test_float16(device: torch.device) -> None:
    arguments = problem(device, 70, sizes=(1, 1, 64, 64), dtype=torch.float16)
    assert_exact(arguments, FLOAT16, 2 * FLOAT16, normalize=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("strength", ["weak", "strong", "mixed", "infinite"])
def test_any_decay(device: torch.device, decay: str, strength: str) -> None:
    arguments = problem(device, 40, decay)
    arguments[4] = decays(arguments[4], strength)
    assert_exact(arguments, FLOAT32, normalize=True)


@pytest.mark.parametrize("beta", [None, 0.0, 2.0])
def test_rates(device: torch.device, beta: float | None) -> None:
    arguments = problem(device, 40)
    arguments[3] = None if beta is None else torch.full_like(arguments[3], beta)
    if beta == 0:
        arguments[4] = None
    assert_exact(arguments, FLOAT32, normalize=True)


@pytest.mark.parametrize("spread", [1e-3, 0.1])
def test_nearly_parallel_keys(device: torch.device, spread: float) -> None:
    """β = 2 and keys that are nearly one key: the condition number of a chunk of 32 rows is 32²."""
    arguments = problem(device, 40, "none")
    arguments[1] = F.normalize(1 + spread * torch.randn_like(arguments[1]), dim=-1)
    arguments[3] = torch.full_like(arguments[3], 2.0)
    assert_exact(arguments, 1e-4)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_resets_at_the_edges_of_chunks(device: torch.device, decay: str) -> None:
    reset = torch.zeros(2, 70, dtype=torch.bool, device=device)
    reset[0, [0, 31, 32, 33, 63, 64]] = True
    reset[1, [5, 32]] = True
    assert_exact(problem(device, 70, decay, sizes=(2, 1, 16, 16)), FLOAT32, normalize=True, reset=reset)


@pytest.mark.parametrize("dims", DIMENSIONS)
def test_head_dimensions(device: torch.device, dims: tuple[int, int]) -> None:
    assert_rounded(problem(device, 70, sizes=(1, 1, *dims), dtype=torch.bfloat16), normalize=True)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_segments(device: torch.device, decay: str) -> None:
    """One head alone is walked in segments, whose entering states are found by the maps of the earlier ones."""
    from ostinato.ops.kernels.triton import delta_rule_plan

    time = 300 if INTERPRETED else 65_536
    arguments = problem(device, time, decay, sizes=(1, 1, 16, 16))
    q, k, v = arguments[:3]
    assert delta_rule_plan.plan(q, k, v, channels=decay == "vector").segments > 1
    reset = torch.rand(1, time, device=device) < 2e-3
    assert_exact(arguments, FLOAT32, normalize=True, reset=reset)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_segments_in_bfloat16(device: torch.device, decay: str) -> None:
    from ostinato.ops.kernels.triton import delta_rule_plan

    arguments = problem(device, 600 if INTERPRETED else 8192, decay, sizes=(1, 1, 64, 64), dtype=torch.bfloat16)
    q, k, v = arguments[:3]
    assert delta_rule_plan.plan(q, k, v, channels=decay == "vector").segments > 1
    assert_rounded(arguments, normalize=True)


def with_own_keys(arguments: list[Tensor | None], read: bool = True, erase: bool = True) -> list[Tensor | None]:
    """Keys to read, to erase and to write, each of its own."""
    keys = arguments[1]
    own = [0.5 * F.normalize(torch.randn_like(keys), dim=-1) for _ in range(2)]
    arguments[1] = F.normalize(keys, dim=-1)
    return [*arguments, own[0] if read else None, own[1] if erase else None]


@pytest.mark.parametrize("time", LENGTHS)
def test_own_keys(device: torch.device, time: int) -> None:
    assert_exact(with_own_keys(problem(device, time, "vector", sizes=(1, 2, 16, 24))), FLOAT32)


@pytest.mark.parametrize("keys", [(True, False), (False, True)])
def test_keys_of_their_own_for_one_purpose(device: torch.device, keys: tuple[bool, bool]) -> None:
    arguments = problem(device, 33, "vector", sizes=(1, 2, 16, 24))
    assert_exact(with_own_keys(arguments, *keys), FLOAT32, normalize=True)


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_own_keys_with_other_decays(device: torch.device, decay: str) -> None:
    assert_exact(with_own_keys(problem(device, 35, decay)), FLOAT32)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("erase", [True, False])
def test_own_keys_and_resets(device: torch.device, n: int, erase: bool) -> None:
    reset = torch.zeros(2, 37, dtype=torch.bool, device=device)
    reset[0, [0, 15, 16, 17, 31, 32, 33]] = True
    reset[1, [5, 32]] = True
    arguments = with_own_keys(problem(device, 37, "vector", n, (2, 1, 16, 16)), erase=erase)
    assert_exact(arguments, FLOAT32, reset=reset)


@pytest.mark.parametrize("strength", ["weak", "strong", "mixed", "infinite"])
def test_own_keys_under_any_decay(device: torch.device, strength: str) -> None:
    arguments = with_own_keys(problem(device, 40, "vector"))
    arguments[4] = decays(arguments[4], strength)
    assert_exact(arguments, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_own_keys_as_rwkv7_has_them(device: torch.device, dtype: torch.dtype) -> None:
    """r = κ exp(−g), e = κ ⊙ a, no β; half precision."""
    arguments = problem(device, 70 if INTERPRETED else 1000, "vector", sizes=(1, 1, 64, 64), dtype=dtype)
    g = arguments[4] = 2 * arguments[4]
    kappa, rate = F.normalize(torch.randn_like(g), dim=-1), torch.rand_like(g)
    arguments[1], arguments[3] = 0.2 * arguments[1], None
    arguments += [(kappa * torch.exp(-g)).to(dtype), (kappa * rate).to(dtype)]
    if dtype == torch.bfloat16:
        assert_rounded(arguments)
    else:
        assert_exact(arguments, FLOAT16, 4 * FLOAT16)


def test_strided_arguments(device: torch.device) -> None:
    q, k, v, beta, g, state = problem(device, 20)
    found, expected = [], []
    for results, strided in ((found, True), (expected, False)):
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for x in (q, k, v, beta, g)]
        with ostinato.backend("triton"):
            results.extend(with_gradients([*tensors, state.mT.contiguous().mT if strided else state]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_only_the_last_state(device: torch.device) -> None:
    """Gradients of the last state alone, and only of what asks for them."""
    q, k, v, beta, g, _ = problem(device, 20)
    results = []
    for route, dtype in (("triton", torch.float32), ("parallel", torch.float64)):
        key, rate = (x.to(dtype).requires_grad_() for x in (k, beta))
        with ostinato.backend(route):
            _, last = delta_rule(q.to(dtype), key, v.to(dtype), rate, g.to(dtype), normalize=True)
        results.append(torch.autograd.grad(last.square().sum(), [key, rate]))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).norm() <= FLOAT32 * theirs.norm()


@pytest.mark.parametrize("case", ["none", "vector", "own keys"])
def test_compiles_as_one_graph(device: torch.device, case: str) -> None:
    arguments = problem(device, 20, "vector" if case == "own keys" else case)
    if case == "own keys":
        arguments = with_own_keys(arguments)

    def squares(*tensors: Tensor) -> Tensor:
        read, erase = tensors[6:] or (None, None)
        outputs, last = delta_rule(*tensors[:6], read_keys=read, erase_keys=erase, normalize=case != "own keys")
        return outputs.square().sum() + last.square().sum()

    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    found = []
    with ostinato.backend("triton"):
        for function in (compiled, squares):
            given = [None if x is None else x.detach().requires_grad_() for x in arguments]
            found.append(torch.autograd.grad(function(*given), [x for x in given if x is not None]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_second_derivative(device: torch.device) -> None:
    q, k, v, *_ = problem(device, 5)
    k.requires_grad_()
    with ostinato.backend("triton"):
        (grad,) = torch.autograd.grad(delta_rule(q, k, v)[0].sum(), k, create_graph=True)
        with pytest.raises(BackendError, match="parallel"):
            grad.sum().backward()


def test_refuses(device: torch.device) -> None:
    q, k, v, *_ = problem(device, 5)
    with ostinato.backend("triton"):
        with pytest.raises(BackendError, match="float64"):
            delta_rule(q.double(), k.double(), v.double())
        with pytest.raises(BackendError, match="at most 8 steps"):
            delta_rule(
                q[:, :1], *(x.new_zeros(1, 9, *x.shape[2:]) for x in (k, v)), erase_keys=k.new_zeros(1, 9, 1, 16)
            )
        with pytest.raises(BackendError, match="one type"):
            delta_rule(q, k, v.half())
        with pytest.raises(BackendError, match="up to 128 channels"):
            delta_rule(*(x.new_zeros(1, 2, 1, 200) for x in (q, k, v)))
