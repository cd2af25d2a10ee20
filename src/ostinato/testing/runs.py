"""Running a mixer over one sequence in pieces, with gradients, and measuring how far two runs are apart."""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ostinato.state
from ostinato.mixers.base import Mixer
from ostinato.ops.routes import backend

State = Any
FREE = "free"
"""The name of the route that is not forced: what a user gets who asks for nothing."""


@dataclass
class Run:
    """What came out of one run: tensors by kind ("outputs", "state", "gradient of x", …) and name."""

    values: dict[str, dict[str, Tensor]]


@dataclass
class Problem:
    """One sequence to run: inputs, the state before them, where sequences begin, and a name for people."""

    name: str
    x: Tensor
    state: State
    reset: Tensor | None


@contextmanager
def route(name: str) -> Iterator[None]:
    """Force a route, or leave the choice free."""
    if name == FREE:
        yield
    else:
        with backend(name):
            yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory from `torch.empty` with NaN, so that whatever reads it before writing is found out."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    setting: Any = torch.utils.deterministic
    filled = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # On a GPU some operations have no deterministic twin; we are after the fill alone.
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setting.fill_uninitialized_memory = filled


def generator(*key: Any) -> torch.Generator:
    """A generator of random numbers that is the same for the same key, on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def draw(shape: Sequence[int], *key: Any) -> Tensor:
    """Normal numbers in float64 that bfloat16 can hold, so that every type gets the same ones."""
    return torch.randn(tuple(shape), generator=generator(*key)).to(torch.bfloat16).double()


def perturbed(mixer: Mixer, seed: int) -> Mixer:
    """A copy in float64 on the CPU, its parameters moved off their initial values.

    An initial zero would hide a wrong use of what it multiplies. Every parameter is then rounded to bfloat16,
    so that all types compute with the same numbers.
    """
    found = copy.deepcopy(mixer).cpu().double()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed, name), dtype=parameter.dtype)
            moved = parameter + 0.05 * noise
            parameter.copy_(_rounded(moved))
    return found


def _rounded(value: Tensor) -> Tensor:
    if value.is_complex():
        return torch.view_as_complex(torch.view_as_real(value).bfloat16().double())
    return value.bfloat16().to(value.dtype) if value.is_floating_point() else value


def is_real_valued(leaf: Tensor) -> bool:
    """Whether gradients flow through it: floating or complex, not a counter or a mask."""
    return leaf.is_floating_point() or leaf.is_complex()


def cast(state: State, template: State, device: torch.device | str) -> State:
    """`state` in the types of the matching leaves of `template`."""
    types = {path: leaf.dtype for path, leaf in ostinato.state.leaves(template)}
    names = iter([path for path, _ in ostinato.state.leaves(state)])

    def convert(leaf: Tensor) -> Tensor:
        return leaf.detach().to(device=device, dtype=types.get(next(names), leaf.dtype))

    return ostinato.state.map(convert, state)


def widened(state: State) -> State:
    """`state` in float64 (or complex128) on the CPU; counters and masks stay."""

    def convert(leaf: Tensor) -> Tensor:
        leaf = leaf.detach().cpu()
        if leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if leaf.is_floating_point() else leaf

    return ostinato.state.map(convert, state)


def contract(value: Tensor, name: str) -> Tensor:
    """A random linear functional of a tensor: part of the loss whose gradients are compared."""
    if value.is_complex():
        return contract(torch.view_as_real(value.resolve_conj()), name)
    wide = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return (wide * draw(value.shape, name, tuple(value.shape)).to(wide)).sum()


def advance(
    mixer: Mixer, x: Tensor, state: State, reset: Tensor | None, cuts: Sequence[int], *, step: bool = False
) -> tuple[Tensor, State]:
    """Outputs and final state of running x in pieces that end at `cuts` (the whole: [T]).

    With `step`, pieces of one step without resets go through `Mixer.step`.
    """
    outputs, start = [], 0
    for end in cuts:
        if step and reset is None and end - start == 1:
            y, state = mixer.step(x[:, start], state)
            outputs.append(y.unsqueeze(1))
        else:
            piece = None if reset is None else reset[:, start:end]
            y, state = mixer(x[:, start:end], state, reset=piece)
            outputs.append(y)
        start = end
    return torch.cat(outputs, dim=1), state


def run(mixer: Mixer, problem: Problem, cuts: Sequence[int], *, step: bool = False) -> Run:
    """Run a problem in pieces; keep outputs, final state and all gradients of a random linear loss."""
    x = problem.x.detach().requires_grad_()
    initial = ostinato.state.map(lambda leaf: leaf.detach().clone().requires_grad_(is_real_valued(leaf)), problem.state)
    y, last = advance(mixer, x, initial, problem.reset, cuts, step=step)
    return collect(mixer, x, initial, y, last)


def loss(y: Tensor, last: State, *, with_state: bool = True) -> Tensor:
    """The random linear loss of outputs and final state."""
    total: Tensor = contract(y, "outputs")
    if with_state:
        for path, leaf in ostinato.state.leaves(last):
            if is_real_valued(leaf):
                total = total + contract(leaf, path).to(total.dtype)
    return total


def collect(mixer: Mixer, x: Tensor, initial: State, y: Tensor, last: State, *, with_state: bool = True) -> Run:
    """The values of a run whose graph is still there."""
    passed = {path: leaf for path, leaf in ostinato.state.leaves(initial) if leaf.requires_grad}
    parameters = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    wanted = [x, *parameters.values(), *passed.values()]
    gradients = torch.autograd.grad(loss(y, last, with_state=with_state), wanted, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]
    count = len(parameters)
    return Run(
        {
            "outputs": {"y": y.detach()},
            "state": {path: leaf.detach() for path, leaf in ostinato.state.leaves(last)},
            "gradient of x": {"x": found[0]},
            "gradient of parameters": dict(zip(parameters, found[1 : 1 + count], strict=True)),
            "gradient of state": dict(zip(passed, found[1 + count :], strict=True)),
        }
    )


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error among tensors of one kind and the name of the tensor it is in.

    The measure is that of `TOLERANCES`. Tensors that are missing, or differ in shape, are infinitely far apart.
    """
    if set(found) != set(wanted):
        return math.inf, f"only one has {', '.join(sorted(set(found) ^ set(wanted)))}"
    pairs: dict[str, tuple[float, float]] = {}
    for name, truth in wanted.items():
        value = found[name]
        if value.shape != truth.shape:
            return math.inf, f"{name}: shape {tuple(value.shape)}, not {tuple(truth.shape)}"
        if truth.numel() == 0:
            continue
        kind = torch.complex128 if truth.is_complex() or value.is_complex() else torch.float64
        a, b = value.to("cpu", kind), truth.to("cpu", kind)
        # Equal infinities (a running maximum before its first input) are no error.
        gap = torch.where(a == b, torch.zeros((), dtype=torch.float64), (a - b).abs())
        size = torch.where(torch.isfinite(b.abs()), b.abs(), 0.0)
        pairs[name] = float(gap.max()), float(size.max())
    if not pairs:
        return 0.0, ""
    largest = max(size for _, size in pairs.values())
    worst, place = -1.0, ""
    for name, (apart, extent) in pairs.items():
        error = apart / (max(extent, 0.01 * largest) or 1.0)
        if math.isnan(error):
            return math.nan, name
        if error > worst:
            worst, place = error, name
    return worst, place
