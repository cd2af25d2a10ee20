"""The law, check by check.

Every number is held to one truth: the reference route, run over the whole sequence at once, in float64 on the
CPU. Whole, split and stepped runs on every route, in every type and on every device are compared with it.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import BackendError
from ostinato.mixers.base import Mixer
from ostinato.ops.routes import ENGINES, backend
from ostinato.testing.report import DERIVATIVE_TOLERANCE, NO_GRADIENT, Recorder
from ostinato.testing.runs import (
    Problem,
    Run,
    advance,
    cast,
    collect,
    contract,
    difference,
    draw,
    generator,
    is_real_valued,
    perturbed,
    route,
    run,
    widened,
)

State = Any
PREFIX = 5
"""Steps that the state is run through before a check: a state that can be reached, and is not zero."""


class Bench:
    """A mixer on one device in one type, its float64 twin, and the problems that both are given."""

    def __init__(
        self, mixer: Mixer, dtype: torch.dtype, device: torch.device | str, batch: int, length: int, seed: int
    ) -> None:
        self.exact = perturbed(mixer, seed)
        self.mixer = copy.deepcopy(self.exact).to(device=device, dtype=dtype)
        self.dtype, self.device = dtype, torch.device(device)
        self.batch, self.length, self.seed = batch, length, seed
        self.x = draw((batch, length, mixer.d_model), seed, "x").to(self.device, dtype)
        with torch.no_grad():
            prefix = draw((batch, PREFIX, mixer.d_model), seed, "prefix")
            # A mixer that reads whole sequences has no state that could be reached.
            reached = advance(self.exact, prefix, None, None, [PREFIX])[1] if mixer.causal else None
            self.state = cast(reached, self.mixer.initial_state(batch), self.device)
        self.truths: dict[str, Run] = {}

    def problems(self) -> list[Problem]:
        """The sequence without resets, with random ones, and with resets in awkward places."""
        rare = torch.rand(self.batch, self.length, generator=generator(self.seed, "reset")) < 3 / max(self.length, 3)
        edges = torch.zeros(self.batch, self.length, dtype=torch.bool)
        edges[0, 0] = True
        edges[-1, -1] = True
        middle = self.length // 2
        edges[:, middle : middle + 2] = True
        patterns = {"no resets": None, "random resets": rare, "resets at edges": edges}
        return [
            Problem(name, self.x, self.state, None if reset is None else reset.to(self.device))
            for name, reset in patterns.items()
        ]

    def exact_problem(self, problem: Problem) -> Problem:
        """The same numbers in float64 on the CPU."""
        reset = None if problem.reset is None else problem.reset.cpu()
        return Problem(problem.name, problem.x.cpu().double(), widened(problem.state), reset)

    def truth(self, problem: Problem) -> Run:
        """The reference route's answer in float64, computed once per problem."""
        if problem.name not in self.truths:
            forced = {name: "reference" for name, engine in ENGINES.items() if "reference" in engine.routes}
            with backend(**forced):
                self.truths[problem.name] = run(self.exact, self.exact_problem(problem), [self.length])
        return self.truths[problem.name]


def cuttings(length: int) -> dict[str, list[int]]:
    """Where a sequence is cut: nowhere, near both ends and inside, and everywhere."""
    found = {"whole": [length]}
    for cut in sorted({1, length // 3, length - 1}):
        if 0 < cut < length:
            found[f"split at {cut}"] = [cut, length]
    if length > 4:
        found["split in four"] = [2, length // 2, length // 2 + 1, length]
    found["step by step"] = list(range(1, length + 1))
    return found


def check_pieces(bench: Bench, recorder: Recorder) -> None:
    """Whole == split == step by step == the truth, in values and gradients, under every reset pattern."""
    for problem in bench.problems():
        for name, cuts in cuttings(bench.length).items():
            check = name if name in ("whole", "step by step") else "split"
            place = f"{problem.name}, {name}"
            with recorder.attempt(check, place):
                found = run(bench.mixer, problem, cuts, step=True)
                for kind, wanted in bench.truth(problem).values.items():
                    error, tensor = difference(found.values[kind], wanted)
                    recorder.add(f"{check}: {kind}", error, f"{place}, {tensor}")


def check_packing(bench: Bench, recorder: Recorder) -> None:
    """Sequences packed in a row and marked by resets give what each gives alone, from no state."""
    for problem in bench.problems()[1:]:
        assert problem.reset is not None
        with recorder.attempt("packing", problem.name), torch.no_grad():
            packed, last = bench.mixer(problem.x, problem.state, reset=problem.reset)
            for row in range(bench.batch):
                starts = [0, *problem.reset[row].nonzero().flatten().tolist(), bench.length]
                own = ostinato.state.select(problem.state, row)
                for start, end in itertools.pairwise(starts):
                    if start == end:
                        own = None
                        continue
                    entering = own if start == 0 else None
                    y, final = bench.mixer(problem.x[row : row + 1, start:end], entering)
                    error, _ = difference({"y": packed[row : row + 1, start:end]}, {"y": y})
                    recorder.add("packing: outputs", error, f"{problem.name}, row {row}, steps {start} to {end - 1}")
                found = ostinato.state.select(last, row)
                if ostinato.state.num_bytes(found) == ostinato.state.num_bytes(final):  # else it is one that grows
                    recorder.add("packing: state", *_apart(found, final, f"{problem.name}, row {row}"))
                error = _apart_later(bench, found, final)
                recorder.add("packing: outputs", error, f"{problem.name}, row {row}, going on")


def _apart(found: State, wanted: State, place: str) -> tuple[float, str]:
    """How far two states are apart, and where."""
    error, leaf = difference(dict(ostinato.state.leaves(found)), dict(ostinato.state.leaves(wanted)))
    return error, f"{place}, {leaf}"


def _apart_later(bench: Bench, found: State, wanted: State) -> float:
    """How far the outputs are apart that two states of one row lead to."""
    later = bench.x[:1, :3]
    return difference({"y": bench.mixer(later, found)[0]}, {"y": bench.mixer(later, wanted)[0]})[0]


def check_rows(bench: Bench, recorder: Recorder) -> None:
    """A row's outputs and state do not depend on the other rows, nor on how many there are."""
    problem = bench.problems()[1]
    with recorder.attempt("rows"), torch.no_grad():
        y, last = bench.mixer(problem.x, problem.state, reset=problem.reset)
        for row in range(bench.batch):
            alone, final = bench.mixer(
                problem.x[row : row + 1],
                ostinato.state.select(problem.state, row),
                reset=None if problem.reset is None else problem.reset[row : row + 1],
            )
            error, _ = difference({"y": y[row : row + 1]}, {"y": alone})
            recorder.add("rows: outputs", error, f"row {row}")
            recorder.add("rows: state", *_apart(ostinato.state.select(last, row), final, f"row {row}"))


def check_causality(bench: Bench, recorder: Recorder) -> None:
    """What comes later, padding included, changes no earlier output."""
    with recorder.attempt("causality"), torch.no_grad():
        y, _ = bench.mixer(bench.x, bench.state)
        for cut in sorted({1, bench.length // 2, bench.length - 1}):
            for name, later in (("zeros", 0 * bench.x), ("other inputs", 3 * bench.x.flip(1) + 1)):
                changed = torch.cat([bench.x[:, :cut], later[:, cut:]], dim=1)
                other, _ = bench.mixer(changed, bench.state)
                error, _ = difference({"y": other[:, :cut]}, {"y": y[:, :cut]})
                recorder.add("causality", error, f"{name} from step {cut} on")


def check_form(bench: Bench, recorder: Recorder) -> None:
    """Outputs are shaped as x; the state keeps its structure, types and batch axis, and owns its memory.

    Nothing that is passed is overwritten.
    """
    with recorder.attempt("form"), torch.no_grad():
        start = bench.mixer.initial_state(bench.batch)
        state = ostinato.state.clone(bench.state)
        x = bench.x.clone()
        y, last = bench.mixer(x, state)
        problems = []
        if y.shape != x.shape or y.dtype != x.dtype:
            problems.append(f"outputs are {y.dtype} {tuple(y.shape)} for inputs {x.dtype} {tuple(x.shape)}")
        kinds = {path: leaf.dtype for path, leaf in ostinato.state.leaves(start)}
        found = {path: leaf.dtype for path, leaf in ostinato.state.leaves(last)}
        if kinds != found or type(start) is not type(last):
            odd = {path: (kinds.get(path), found.get(path)) for path in {*kinds, *found}}
            odd = {path: pair for path, pair in odd.items() if pair[0] != pair[1]}
            problems.append(f"the state changes from {type(start).__name__} to {type(last).__name__}, {odd}")
        for when, tree in (("initial", start), ("final", last)):
            for path, leaf in ostinato.state.leaves(tree):
                if leaf.shape[:1] != (bench.batch,):
                    problems.append(f"{when} state, {path}: first axis is not the batch, {tuple(leaf.shape)}")
        for path, leaf in ostinato.state.leaves(last):
            held, taken = leaf.untyped_storage().nbytes(), leaf.numel() * leaf.element_size()
            if held > taken:
                problems.append(f"final state, {path}: {taken} bytes keep {held} alive, copy it out of what it views")
        after = dict(ostinato.state.leaves(state))
        for path, leaf in ostinato.state.leaves(bench.state):
            if not torch.equal(leaf, after[path]):
                problems.append(f"the passed state was overwritten in {path}")
        if not torch.equal(x, bench.x):
            problems.append("x was overwritten")
        recorder.add("form", math.inf if problems else 0.0, "; ".join(problems))
        explicit, _ = bench.mixer(bench.x, start)
        absent, _ = bench.mixer(bench.x)
        recorder.add("no state is the initial state", difference({"y": absent}, {"y": explicit})[0])


def check_reach(bench: Bench, recorder: Recorder) -> None:
    """A gradient of the outputs reaches every parameter, x, and every part of the passed state.

    What receives none at the parameters as they are (a bound that is not met there, say) gets a second chance
    with parameters that are drawn anew.
    """
    with recorder.attempt("gradient reaches"):
        lost = _unreached(bench.mixer, bench)
        if lost:
            other = copy.deepcopy(bench.mixer)
            with torch.no_grad():
                for name, parameter in other.named_parameters():
                    parameter.copy_(0.5 * draw(parameter.shape, bench.seed, "anew", name).to(parameter))
            lost = [name for name in _unreached(other, bench) if name in lost]
        recorder.add("gradient reaches", math.inf if lost else 0.0, f"none arrives: {', '.join(lost)}" if lost else "")


def _unreached(mixer: Mixer, bench: Bench) -> list[str]:
    """What no gradient of the outputs reaches."""
    x = bench.x.detach().requires_grad_()
    initial = ostinato.state.map(lambda leaf: leaf.detach().clone().requires_grad_(is_real_valued(leaf)), bench.state)
    y, last = mixer(x, initial)
    values = collect(mixer, x, initial, y, last, with_state=False).values
    gradients = {f"{kind} {name}": g for kind in values if "gradient" in kind for name, g in values[kind].items()}
    sizes = {name: g.abs().max().item() for name, g in gradients.items() if g.numel()}
    largest = max(size for size in sizes.values() if math.isfinite(size))
    return [name for name, size in sizes.items() if not NO_GRADIENT * largest < size < math.inf]


def check_derivative(bench: Bench, recorder: Recorder) -> None:
    """The gradient along a random direction is the slope of the loss, by differences of fourth order (float64)."""
    problem = bench.problems()[1]
    with recorder.attempt("derivative"):
        analytic = run(bench.mixer, problem, [bench.length]).values
        for kind in ("gradient of x", "gradient of parameters", "gradient of state"):
            directions = {
                name: torch.randn(g.shape, generator=generator(kind, name), dtype=g.dtype).to(g.device)
                for name, g in analytic[kind].items()
            }
            slope = sum((g.conj() * directions[n]).real.sum().item() for n, g in analytic[kind].items())
            error = math.inf
            # Small moves suffer from rounding, large ones from curvature; a wrong gradient is wrong at all sizes.
            for size in (1e-4, 1e-5, 1e-6):
                values = [_moved(bench.mixer, problem, kind, directions, move * size) for move in (-2, -1, 1, 2)]
                measured = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * size)
                error = min(error, abs(measured - slope) / max(abs(measured), abs(slope), 1.0))
                if error <= DERIVATIVE_TOLERANCE:
                    break
            recorder.add(f"derivative: {kind}", error, problem.name, DERIVATIVE_TOLERANCE)


def _moved(mixer: Mixer, problem: Problem, kind: str, directions: dict[str, Tensor], size: float) -> float:
    """The loss after a move of `size` along the directions."""
    x, state, moved = problem.x, problem.state, {}
    if kind == "gradient of x":
        x = x + size * directions["x"]
    elif kind == "gradient of state":
        names = iter([path for path, _ in ostinato.state.leaves(state)])

        def shift(leaf: Tensor) -> Tensor:
            name = next(names)
            return leaf + size * directions[name] if name in directions else leaf

        state = ostinato.state.map(shift, state)
    else:
        moved = {name: p.detach() + size * directions[name] for name, p in mixer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        y, last = torch.func.functional_call(mixer, moved, (x, state), {"reset": problem.reset})
        total = contract(y, "outputs")
        for path, leaf in ostinato.state.leaves(last):
            if is_real_valued(leaf):
                total = total + contract(leaf, path)
        return total.item()


def check_saving(bench: Bench, recorder: Recorder) -> None:
    """A state that is saved and loaded in the middle of a sequence goes on as if nothing had been."""
    cut = max(bench.length // 2, 1)
    with recorder.attempt("save and load"), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, middle = bench.mixer(bench.x[:, :cut], bench.state)
        ostinato.state.save(middle, Path(folder) / "state.safetensors")
        loaded = ostinato.state.load(Path(folder) / "state.safetensors", like=bench.mixer.initial_state(1))
        wanted, last = bench.mixer(bench.x[:, cut - 1 :], middle)
        found, final = bench.mixer(bench.x[:, cut - 1 :], loaded)
        recorder.add("save and load", difference({"y": found}, {"y": wanted})[0], "outputs", 0.0)
        after = dict(ostinato.state.leaves(final))
        error, leaf = difference(after, dict(ostinato.state.leaves(last)))
        recorder.add("save and load", error, leaf, 0.0)


def check_compile(bench: Bench, recorder: Recorder, longest: int = 8) -> None:
    """`torch.compile(fullgraph=True)` traces forward, and the traced function has the same values and gradients."""
    short = Problem("no resets", bench.x[:, :longest], bench.state, None)
    length = short.x.shape[1]
    with recorder.attempt("torch.compile"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch._dynamo.reset()
        try:
            wanted = run(bench.mixer, short, [length])
            x = short.x.detach().requires_grad_()
            initial = ostinato.state.map(
                lambda leaf: leaf.detach().clone().requires_grad_(is_real_valued(leaf)), short.state
            )
            mixer = bench.mixer
            traced = torch.compile(lambda x, state: mixer(x, state), fullgraph=True, backend="aot_eager")
            y, last = traced(x, initial)
            found = collect(mixer, x, initial, y, last)
            for kind, truth in wanted.values.items():
                error, name = difference(found.values[kind], truth)
                recorder.add("torch.compile", error, f"{kind}, {name}")
        finally:
            torch._dynamo.reset()


class _Step(nn.Module):
    """`Mixer.step` as a module, which is what `torch.export` takes."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self.mixer.step(x, state)


def check_export(bench: Bench, recorder: Recorder) -> None:
    """`torch.export` exports step, and the exported program has the same values."""
    with recorder.attempt("torch.export"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = _Step(bench.mixer)
        program = torch.export.export(module, (bench.x[:, 0], bench.state)).module()
        y, last = module(bench.x[:, 1], bench.state)
        found, final = program(bench.x[:, 1], bench.state)
        recorder.add("torch.export", difference({"y": found}, {"y": y})[0], "outputs")
        error, leaf = difference(dict(ostinato.state.leaves(final)), dict(ostinato.state.leaves(last)))
        recorder.add("torch.export", error, leaf)


def serves(mixer: Mixer, name: str, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether the mixer runs with this route forced, on sequences and on single steps."""
    found = copy.deepcopy(mixer).to(device=device, dtype=dtype)
    try:
        with route(name), torch.no_grad():
            x = torch.zeros(1, 3, mixer.d_model, dtype=dtype, device=device)
            advance(found, x, None, torch.zeros(1, 3, dtype=torch.bool, device=device), [2, 3])
    except BackendError:
        return False
    except Exception:  # it is served, and broken: the checks will say how
        return True
    return True


def routes_of(mixer: Mixer, dtype: torch.dtype, device: torch.device | str, names: Sequence[str]) -> list[str]:
    """Those of `names` that serve the mixer."""
    return [name for name in names if serves(mixer, name, dtype, device)]
