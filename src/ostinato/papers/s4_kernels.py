"""The kernels of S4 (73): exact against the powers of Ā and step by step, and what they cost as the state grows."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ostinato.mixers.s4 import S4
from ostinato.ops.hippo import diagonal_plus_low_rank, discretize, hippo_matrix
from ostinato.ops.krylov import krylov_kernel
from ostinato.ops.state_space import DplrSystem, dplr_corrected, dplr_growth, dplr_kernel
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.timing import peak_bytes, time_together

claims = (
    Claim("kernel", "the generating function gives the kernel of the powers of Ā", theirs="exact"),
    Claim("recurrence", "recurrence and convolution compute the same, also from a carried state", theirs="exact"),
    Claim("cost", "the kernel costs O(N + L), not O(N² L)", theirs="6.7× faster at N = 256 (a training step)"),
)


def measure(run: Run) -> list[Measured]:
    """The largest errors over sizes and lengths, and the growth of the cost, with its figure."""
    sizes = run.choose(smoke=(16, 64), cpu=(16, 32, 64), gpu=(16, 32, 64))
    lengths = run.choose(smoke=(64, 256), cpu=(64, 256, 1024), gpu=(64, 256, 1024))
    exact = {
        str(dtype).removeprefix("torch."): run.part(f"exactness {dtype}", _exactness, sizes, lengths, dtype)
        for dtype in (torch.float64, torch.float32)
    }
    states, length = ((16, 32), 128) if run.budget == "smoke" else ((32, 64, 128, 256), 1024)
    # On a GPU kernels of these sizes take as long to launch as to compute: the growth is measured on the processor.
    cost = run.timed_part("cost", _cost, states, 32, length)
    run.figure(
        f"Kernel of {length} steps, 32 features, on the processor",
        [Series(name, list(states), [cost[name][str(size)]["seconds"] for size in states]) for name in cost],
        x_label="state size N",
        y_label="seconds",
        log_x=True,
        log_y=True,
    )
    run.sizes |= {
        "exactness": f"N of {', '.join(map(str, sizes))}; L of {', '.join(map(str, lengths))}",
        "cost": f"32 features, L = {length}, float32, on the processor",
    }
    return [_kernel(exact), _recurrence(exact), _slopes(cost)]


def _system(size: int, channels: int, dtype: torch.dtype) -> DplrSystem:
    """LegS for every channel, with Δ spread over 1e-3 … 1e-1 and random C."""
    form = diagonal_plus_low_rank("legs", size)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(channels, size // 2, dtype=torch.complex128, generator=generator)
    steps = torch.logspace(-3, -1, channels, dtype=torch.float64).unsqueeze(1)
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    values, low_rank, inputs = (part.expand(channels, *part.shape).to(kind) for part in form[:3])
    return DplrSystem(values, low_rank, inputs, outputs.to(kind), steps.to(dtype))


def _dense(system: DplrSystem) -> tuple[Tensor, Tensor, Tensor]:
    """Ā (channels, N, N), B̄ and C (channels, N) from the HiPPO matrix itself, in its own real coordinates."""
    size, dtype = 2 * system.eigenvalues.shape[-1], system.step.dtype
    form = hippo_matrix("legs", size)
    matrices, inputs = zip(*(discretize(*form, float(step)) for step in system.step), strict=True)
    basis = diagonal_plus_low_rank("legs", size).basis
    outputs = 2 * (system.outputs.to(basis.dtype) @ basis.mH).real
    return torch.stack(matrices).to(dtype), torch.stack(inputs).to(dtype), outputs.to(dtype)


def _exactness(sizes: tuple[int, ...], lengths: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """The largest errors over sizes and lengths, each relative to the largest value."""
    found = {"kernel": 0.0, "kernel, roots of unity": 0.0, "steps": 0.0, "halves": 0.0}

    def note(name: str, value: Tensor, wanted: Tensor) -> None:
        wanted = wanted.double()
        found[name] = max(found[name], float((value.double() - wanted).abs().max() / wanted.abs().max()))

    for size in sizes:
        for length in lengths:
            powers = krylov_kernel(*_dense(_system(size, 4, torch.float64)), length).T
            system = _system(size, 4, dtype)
            growth = dplr_growth(system, length)
            for name, damping in (("kernel", 1.0), ("kernel, roots of unity", 0.0)):
                corrected = dplr_corrected(system, growth, damping=damping)
                note(name, dplr_kernel(system, corrected, length, damping=damping), powers)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(size)
                mixer = S4(4, size, output="none", block_length=length).to(dtype)
                x = torch.randn(2, length, 4, dtype=dtype)
                whole, _ = mixer(x)
                state, steps = mixer.initial_state(2), []
                for t in range(length):
                    y, state = mixer(x[:, t : t + 1], state)
                    steps.append(y)
                note("steps", torch.cat(steps, dim=1), whole)
                first, state = mixer(x[:, : length // 2])
                second, _ = mixer(x[:, length // 2 :], state)
                note("halves", torch.cat([first, second], dim=1), whole)
    return found


def _kernel(exact: dict[str, dict[str, float]]) -> Measured:
    wide, narrow = exact["float64"], exact["float32"]
    return Measured(
        "kernel",
        ours=f"relative error {wide['kernel']:.1e} in float64, {narrow['kernel']:.1e} in float32",
        holds=wide["kernel"] < 1e-9 and narrow["kernel"] < 1e-4,
        note="nodes just inside the unit circle; with the paper's, on it: "
        f"{wide['kernel, roots of unity']:.1e} and {narrow['kernel, roots of unity']:.1e}",
    )


def _recurrence(exact: dict[str, dict[str, float]]) -> Measured:
    worst = {name: max(errors["steps"], errors["halves"]) for name, errors in exact.items()}
    return Measured(
        "recurrence",
        ours="; ".join(
            f"{name}: steps {errors['steps']:.1e}, two halves {errors['halves']:.1e}" for name, errors in exact.items()
        ),
        holds=worst["float64"] < 1e-9 and worst["float32"] < 1e-4,
        note="relative to the largest output of one convolution over all steps",
    )


def _cost(states: tuple[int, ...], channels: int, length: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and peak bytes of the kernel from C̄, from C (with Ā^L by squaring), and by Krylov doubling.

    All sizes take turns, so that a machine that slows down for a while does not bend the slope.
    """
    candidates: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in states:
        system = _system(size, channels, torch.float32)
        corrected = dplr_corrected(system, dplr_growth(system, length), damping=1.0)

        def from_outputs(system: DplrSystem = system) -> Tensor:
            own = dplr_corrected(system, dplr_growth(system, length), damping=1.0)
            return dplr_kernel(system, own, length, damping=1.0)

        known = functools.partial(dplr_kernel, system, corrected, length, damping=1.0)
        candidates["generating function", size] = known
        candidates["generating function, C̄ from C", size] = from_outputs
        candidates["Krylov", size] = functools.partial(krylov_kernel, *_dense(system), length)
    timings = time_together({f"{name} {size}": call for (name, size), call in candidates.items()}, rounds=25, budget=40)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, size), call in candidates.items():
        seconds = timings[f"{name} {size}"].median
        found.setdefault(name, {})[str(size)] = {"seconds": seconds, "bytes": peak_bytes(call)}
    return found


def _slope(values: dict[str, dict[str, float]]) -> float:
    """The exponent of the growth of the seconds with N, by least squares on logarithms."""
    x = [math.log(float(size)) for size in values]
    y = [math.log(value["seconds"]) for value in values.values()]
    return statistics.linear_regression(x, y).slope


def _slopes(cost: dict[str, dict[str, dict[str, float]]]) -> Measured:
    largest = list(cost["Krylov"])[-1]
    last = {name: values[largest] for name, values in cost.items()}
    ratio = last["Krylov"]["seconds"] / last["generating function"]["seconds"]
    slopes = {name: _slope(values) for name, values in cost.items()}
    good = slopes["generating function"] <= 1.1 and slopes["Krylov"] >= 1.7 and ratio >= 5
    return Measured(
        "cost",
        ours=f"seconds grow like N^{slopes['generating function']:.2f}, Krylov's like N^{slopes['Krylov']:.2f}; "
        f"{ratio:.1f}× apart at N = {largest}",
        holds=good if largest == "256" else None,
        note=f"wanted: at most 1 (1.1 counts), at least 1.7, at least 5×. At N = {largest}: "
        + "; ".join(f"{name} {1e3 * v['seconds']:.1f} ms, {v['bytes'] / 2**20:.0f} MiB" for name, v in last.items())
        + f". With C̄ from C, as in the mixer, N^{slopes['generating function, C̄ from C']:.2f}: Ā^L is a dense power",
    )
