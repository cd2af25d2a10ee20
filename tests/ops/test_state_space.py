"""Time-invariant systems by blocks: kernels against powers of the matrix, blocks against steps, resets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ostinato.ops.hippo import diagonal_plus_low_rank, diagonal_system, discretize_diagonal, hippo_matrix
from ostinato.ops.state_space import (
    Block,
    DplrSystem,
    apply_blocks,
    diagonal_block,
    dplr_block,
    dplr_corrected,
    dplr_growth,
    dplr_kernel,
    dplr_multiply,
    dplr_solve,
    dplr_step,
    powers,
    to_complex,
    to_real,
)


def make(measure: str, size: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> DplrSystem:
    form = diagonal_plus_low_rank(measure, size)
    system = DplrSystem(
        torch.complex(form.eigenvalues.real.clamp(max=-1e-4), form.eigenvalues.imag).expand(channels, -1),
        form.low_rank.expand(channels, -1, -1),
        form.inputs.expand(channels, -1),
        torch.randn(channels, size // 2, dtype=torch.complex128),
        torch.logspace(-3, -1, channels, dtype=torch.float64).unsqueeze(-1),
    )
    if dtype == torch.float64:
        return system
    return DplrSystem(*(part.to(torch.complex64 if part.is_complex() else dtype) for part in system))


def dense(system: DplrSystem) -> tuple[Tensor, Tensor, Tensor]:
    """Ā, B̄, C over all conjugate pairs, by dense inverses: no formula of the package."""
    values, low, inputs, outputs = (torch.cat([part, part.conj()], dim=-1).to(torch.complex128) for part in system[:4])
    step = system.step.to(torch.float64).unsqueeze(-1)
    matrix = torch.diag_embed(values) - low.mT @ low.conj()
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    left = torch.linalg.inv(identity - step / 2 * matrix)
    return left @ (identity + step / 2 * matrix), (left @ inputs.unsqueeze(-1) * step).squeeze(-1), outputs


def kernel_by_powers(system: DplrSystem, length: int) -> Tensor:
    a, x, c = dense(system)
    taps = []
    for _ in range(length):
        taps.append((c * x).sum(-1).real)
        x = (a @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(taps)


def kernel_by_nodes(system: DplrSystem, length: int, damping: float) -> Tensor:
    corrected = dplr_corrected(system, dplr_growth(system, length), damping=damping)
    return dplr_kernel(system, corrected, length, damping=damping)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a channel relative to its largest value."""
    return ((found.double() - wanted).abs().amax(0) / wanted.abs().amax(0)).max().item()


@pytest.mark.parametrize("length", [1, 2, 3, 64, 255, 1024])
@pytest.mark.parametrize(("measure", "size"), [("legs", 16), ("legs", 64), ("random", 32), ("legt", 16), ("fout", 16)])
def test_the_generating_function_gives_the_powers(measure: str, size: int, length: int) -> None:
    system = make(measure, size)
    wanted = kernel_by_powers(system, length)
    assert error(kernel_by_nodes(system, length, 1.0), wanted) < 1e-11
    # The paper's own nodes; systems that hardly decay have poles close to them.
    assert error(kernel_by_nodes(system, length, 0.0), wanted) < (1e-11 if measure in ("legs", "random") else 1e-9)
    single = make(measure, size, dtype=torch.float32)
    assert error(kernel_by_nodes(single, length, 1.0), kernel_by_powers(single, length)) < 1e-4


def test_the_kernel_of_some_channels_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    system = make("legs", 8)
    whole = kernel_by_nodes(system, 12, 1.0)
    monkeypatch.setattr("ostinato.ops.state_space._CACHED", 1)
    assert torch.equal(kernel_by_nodes(system, 12, 1.0), whole)


def test_nodes_inside_the_circle_keep_the_digits_of_float32() -> None:
    """The worst of several draws, since rounding errors are what is compared."""
    on, inside = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        system = make("fout", 16, dtype=torch.float32)
        wanted = kernel_by_powers(system, 64)
        on.append(error(kernel_by_nodes(system, 64, 0.0), wanted))
        inside.append(error(kernel_by_nodes(system, 64, 1.0), wanted))
    assert max(inside) < 1e-5
    assert max(on) > 10 * max(inside)


def test_the_node_minus_one_is_the_limit() -> None:
    """K̂(−1) = (Δ/2) C̄ B, the sum over both conjugates: L = 2 leaves only the nodes 1 and −1."""
    system = make("legs", 8)
    corrected = dplr_corrected(system, dplr_growth(system, 2))
    kernel = dplr_kernel(system, corrected, 2)
    limit = system.step.squeeze(-1) / 2 * 2 * (corrected * system.inputs).sum(-1).real
    torch.testing.assert_close(kernel[0] - kernel[1], limit, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", ["legs", "legt", "fout", "random"])
def test_the_low_rank_algebra_is_the_dense_one(measure: str) -> None:
    system = make(measure, 8)
    a, b, _ = dense(system)
    x = torch.randn(5, 3, 4, dtype=torch.complex128)
    full = torch.cat([x, x.conj()], dim=-1)
    moved = x + dplr_solve(system, system.step * (dplr_multiply(system, x) + system.inputs))
    wanted = (a @ full.unsqueeze(-1)).squeeze(-1) + b
    torch.testing.assert_close(moved, wanted[..., :4], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(to_complex(to_real(x)), x, rtol=0, atol=0)


def test_the_real_system_is_the_hippo_system() -> None:
    """The state, taken out of its complex basis, is that of the dense bilinear recurrence with the HiPPO matrix."""
    size, step = 12, 0.05
    matrix, inputs = hippo_matrix("legs", size)
    identity = torch.eye(size, dtype=torch.float64)
    left = torch.linalg.inv(identity - step / 2 * matrix)
    form = diagonal_plus_low_rank("legs", size)
    system = DplrSystem(
        form.eigenvalues.unsqueeze(0),
        form.low_rank.unsqueeze(0),
        form.inputs.unsqueeze(0),
        torch.ones(1, size // 2, dtype=torch.complex128),
        torch.tensor([[step]], dtype=torch.float64),
    )
    x, state = torch.zeros(size, dtype=torch.float64), torch.zeros(1, 1, size, dtype=torch.float64)
    for u in torch.randn(40, dtype=torch.float64):
        x = left @ ((identity + step / 2 * matrix) @ x + step * inputs * u)
        _, state = dplr_step(system, u.view(1, 1), state)
    torch.testing.assert_close(2 * (form.basis @ to_complex(state)[0, 0]).real, x, rtol=1e-12, atol=1e-12)


def diagonal(size: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    values, inputs = diagonal_system("lin", size)
    a, scale = discretize_diagonal(
        values.expand(3, -1), torch.logspace(-2, -1, 3, dtype=torch.float64)[:, None], method
    )
    return a, scale * inputs, torch.randn(3, size // 2, dtype=torch.complex128)


@pytest.mark.parametrize("kind", ["diagonal", "low rank"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize(("time", "length"), [(2, 8), (8, 8), (21, 8), (9, 4), (7, 1)])
def test_blocks_are_the_steps(time: int, length: int, with_reset: bool, kind: str) -> None:
    if kind == "diagonal":
        a, b, c = diagonal(6, "zoh")

        def block(steps: int) -> Block:
            return diagonal_block(a, b, c, steps)

        def step(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            x = a * to_complex(h) + b * u.unsqueeze(-1)
            return 2 * (c * x).sum(-1).real, to_real(x)
    else:
        system = make("legs", 6)

        def block(steps: int) -> Block:
            return dplr_block(system, steps)

        def step(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return dplr_step(system, u, h)

    u, state = torch.randn(2, time, 3, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    reset = torch.rand(2, time) < 0.2 if with_reset else None
    y, last = apply_blocks(block, u, state, reset=reset, length=length)
    for t in range(time):
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None], 0)
        out, state = step(u[:, t], state)
        torch.testing.assert_close(y[:, t], out, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)


def test_powers_of_anything() -> None:
    a = torch.tensor([0, -1, 0.5j, 1.01], dtype=torch.complex128)
    for count in (1, 2, 7, 8):
        wanted = torch.stack([a**i if i else torch.ones_like(a) for i in range(count)], dim=-1)
        torch.testing.assert_close(powers(a, count), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_derivatives_of_the_kernel(measure: str) -> None:
    system = make(measure, 4, channels=1)
    reals = [torch.view_as_real(part.clone().resolve_conj()).requires_grad_() for part in system[:4]]
    step = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)

    def kernel(*parts: Tensor) -> Tensor:
        return kernel_by_nodes(DplrSystem(*(torch.view_as_complex(p) for p in parts[:4]), parts[4]), 5, 1.0)

    assert torch.autograd.gradcheck(kernel, (*reals, step))
    assert torch.autograd.gradgradcheck(kernel, (*reals, step))
