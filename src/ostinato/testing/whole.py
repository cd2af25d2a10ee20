"""What mixers that are not causal keep of the law, check by check (see `ostinato.mixers.whole`).

Every number is held to one truth, as the law's are: the reference route in float64 on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, StateError
from ostinato.mixers.base import Mixer
from ostinato.mixers.whole import WholeMixer
from ostinato.testing import law
from ostinato.testing.report import LawReport, Recorder
from ostinato.testing.runs import FREE, difference, draw, poisoned, route, run

_PLAIN = ("reference", "parallel")


def check_whole_mixer(
    mixer: WholeMixer,
    *,
    name: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    routes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    batch: int = 2,
    length: int = 20,
    seed: int = 0,
    compile: bool = True,
    resets: bool = True,
    strict: bool = True,
) -> LawReport:
    """Hold a mixer that reads whole sequences to the part of the law that it keeps.

    The checks, for every route and type: whole sequences, without resets, with random ones and with resets at
    the edges, against the reference route in float64, in outputs and in the gradients of x and of all parameters;
    packed sequences against each alone, in outputs and gradients; padding behind a reset, whatever it holds, changes
    nothing before it; the rows of a batch do not see each other; the form of the outputs; no state and no step are
    taken. In float64 also: a gradient reaches every parameter, and is the slope of the loss. Once per mixer:
    `torch.compile(fullgraph=True)` of forward.

    Args:
        mixer: any `WholeMixer`.
        name: what to call it in the table; its class by default.
        dtypes, device: where and in which types to run; the truth is computed on the CPU.
        routes: the routes to force, and "free" for the free choice; by default "free" and each of the plain
            routes that serves this mixer.
        batch, length, seed: the size and the random numbers of the sequences.
        compile: whether to try compiling, which takes seconds.
        resets: False for a mixer on a grid, whose rows cannot be packed: the checks that pack are left out.
        strict: raise if anything is broken; otherwise only report.

    Raises:
        LawError: something is broken, with the table of what.
        ConfigurationError: the mixer is causal (`check_mixer` holds it to the whole law).
    """
    if mixer.causal:
        raise ConfigurationError(f"{type(mixer).__name__} is causal: check_mixer holds it to the whole law")
    report, called = LawReport(device=str(device)), name or type(mixer).__name__
    with poisoned():
        for dtype in dtypes:
            start = Recorder(report, called, FREE, dtype)
            with start.attempt("building"):
                bench = law.Bench(mixer, dtype, device, batch, length, seed)
            if not report.ok:
                break
            named = [FREE, *law.routes_of(mixer, dtype, device, _PLAIN)] if routes is None else routes
            for forced in named:
                with route(forced):
                    _check(bench, Recorder(report, called, forced, dtype), resets)
        if compile and report.ok:
            bench = law.Bench(mixer, dtypes[0], device, batch, length, seed)
            # A grid is as long as it is.
            law.check_compile(bench, Recorder(report, called, FREE, dtypes[0]), 8 if resets else length)
    return report.raise_if_broken() if strict else report


def _check(bench: law.Bench, recorder: Recorder, resets: bool) -> None:
    law.check_form(bench, recorder)
    check_no_state(bench, recorder)
    check_whole(bench, recorder, resets)
    check_rows(bench, recorder)
    if resets:
        check_packing(bench, recorder)
        check_padding(bench, recorder)
    if bench.dtype == torch.float64:
        law.check_reach(bench, recorder)
        if resets:
            law.check_derivative(bench, recorder)


def check_no_state(bench: law.Bench, recorder: Recorder) -> None:
    """It has no state, takes none, and does not step."""
    with recorder.attempt("no state"), torch.no_grad():
        y, state = bench.mixer(bench.x)
        taken = [] if state is None else ["gives a state"]
        try:
            bench.mixer(bench.x, (y,))
            taken.append("goes on from a state")
        except StateError:
            pass
        try:
            bench.mixer.step(bench.x[:, 0], None)
            taken.append("goes step by step")
        except StateError:
            pass
        recorder.add("no state", math.inf if taken else 0.0, ", ".join(taken))


def check_whole(bench: law.Bench, recorder: Recorder, resets: bool) -> None:
    """The whole sequence gives the truth, in values and gradients, under every reset pattern."""
    for problem in bench.problems()[: None if resets else 1]:
        with recorder.attempt("whole", problem.name):
            found = run(bench.mixer, problem, [bench.length])
            for kind, wanted in bench.truth(problem).values.items():
                error, tensor = difference(found.values[kind], wanted)
                recorder.add(f"whole: {kind}", error, f"{problem.name}, {tensor}")


def check_packing(bench: law.Bench, recorder: Recorder) -> None:
    """Packed sequences give what each gives alone, in outputs and gradients; those of parameters are their sums."""
    for problem in bench.problems()[1:]:
        assert problem.reset is not None
        with recorder.attempt("packing", problem.name):
            weights = draw(bench.x.shape, bench.seed, "weights").to(bench.x)
            x = bench.x.detach().requires_grad_()
            packed, _ = bench.mixer(x, reset=problem.reset)
            together = _gradients(bench.mixer, x, (packed * weights).sum())
            loss = torch.zeros((), dtype=bench.dtype, device=bench.device)
            for row in range(bench.batch):
                starts = sorted({0, *problem.reset[row].nonzero().flatten().tolist(), bench.length})
                for start, end in itertools.pairwise(starts):
                    alone, _ = bench.mixer(x[row : row + 1, start:end])
                    loss = loss + (alone * weights[row : row + 1, start:end]).sum()
                    error, _ = difference({"y": packed[row : row + 1, start:end].detach()}, {"y": alone.detach()})
                    recorder.add("packing: outputs", error, f"{problem.name}, row {row}, steps {start} to {end - 1}")
            error, tensor = difference(together, _gradients(bench.mixer, x, loss))
            recorder.add("packing: gradient", error, f"{problem.name}, {tensor}")


def _gradients(mixer: Mixer, x: Tensor, loss: Tensor) -> dict[str, Tensor]:
    wanted = {"x": x, **{name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), found, strict=True)}


def check_padding(bench: law.Bench, recorder: Recorder) -> None:
    """A row padded to the length of the others, the padding marked as a sequence of its own, gives what it gave."""
    with recorder.attempt("padding"), torch.no_grad():
        for cut in sorted({1, bench.length // 2, bench.length - 1}):
            reset = torch.zeros(bench.x.shape[:2], dtype=torch.bool, device=bench.device)
            reset[0, cut] = True
            alone, _ = bench.mixer(bench.x[:1, :cut])
            for name, padding in (("zeros", 0 * bench.x), ("other inputs", 3 * bench.x.flip(1) + 1)):
                x = bench.x.clone()
                x[0, cut:] = padding[0, cut:]
                y, _ = bench.mixer(x, reset=reset)
                error, _ = difference({"y": y[:1, :cut]}, {"y": alone})
                recorder.add("padding", error, f"{name} from step {cut} on")


def check_rows(bench: law.Bench, recorder: Recorder) -> None:
    """The rows of a batch do not see each other: each gives what it gives alone."""
    with recorder.attempt("rows"), torch.no_grad():
        y, _ = bench.mixer(bench.x)
        for row in range(bench.batch):
            alone, _ = bench.mixer(bench.x[row : row + 1])
            recorder.add("rows: outputs", difference({"y": y[row : row + 1]}, {"y": alone})[0], f"row {row}")
