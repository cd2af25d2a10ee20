"""The law, to be run on any mixer, yours included.

forward(x)  ==  forward(x[:, :t]) then forward(x[:, t:], state)  ==  step, step, step, …

from ostinato.testing import check_mixer
check_mixer(MyMixer(16))            # raises LawError with a table of what is broken
print(verify().summary())           # every mixer, on this machine

A mixer that reads whole sequences keeps a part of it; `check_whole_mixer` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ostinato.errors import ConfigurationError
from ostinato.mixers.base import Mixer
from ostinato.mixers.whole import WholeMixer
from ostinato.testing import law
from ostinato.testing.report import TOLERANCES, LawReport, Recorder, Row, dtype_name
from ostinato.testing.runs import FREE, poisoned, route
from ostinato.testing.whole import check_whole_mixer

__all__ = ["FREE", "TOLERANCES", "LawReport", "Row", "check_mixer", "check_whole_mixer", "verify"]

PLAIN_ROUTES = ("reference", "parallel")
"""The routes in plain PyTorch, which serve any device and type."""


def check_mixer(
    mixer: Mixer,
    *,
    name: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    routes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    batch: int = 2,
    length: int = 20,
    seed: int = 0,
    compile: bool = True,
    strict: bool = True,
) -> LawReport:
    """Hold a mixer to the law.

    The checks, for every route and type: the whole sequence, split in several places and step by step, without
    resets, with random ones and with resets at both ends and in consecutive steps, from a state that was
    reached by running, against the reference route in float64: outputs, final state, and the gradients of x,
    of all parameters and of the initial state; packed sequences against each alone; independence of the rows;
    causality; the form of outputs and state; a state saved and loaded in the middle. In float64 also: a
    gradient reaches every parameter and the passed state, and is the slope of the loss. Once per mixer:
    `torch.compile(fullgraph=True)` of forward and `torch.export` of step.

    The mixer itself is not touched: copies are, with their parameters moved a little off their initial values.

    Args:
        mixer: any mixer; small ones (d_model 16) are enough.
        name: what to call it in the table; its class by default.
        dtypes: the types to check in; `TOLERANCES` says which are known and how exact each must be.
        routes: the routes to force, and "free" for the free choice; by default "free" and each of the plain
            routes that serves this mixer.
        device: where to run; the truth is computed on the CPU.
        batch, length, seed: the size and the random numbers of the sequences.
        compile: whether to try compiling and exporting, which takes seconds.
        strict: raise if anything is broken; otherwise only report.

    Returns:
        The report: one row per check, route and type, with the largest error and where it was.

    Raises:
        LawError: something is broken, with the table of what.
        BackendError: a route named in `routes` cannot serve this mixer.
        ConfigurationError: a type or size that the law cannot be tried with.
    """
    if unknown := [dtype_name(dtype) for dtype in dtypes if dtype not in TOLERANCES]:
        raise ConfigurationError(
            f"no tolerance is known for {', '.join(unknown)}; choose from {', '.join(map(dtype_name, TOLERANCES))}"
        )
    if length < 3 or batch < 1:
        raise ConfigurationError(f"the law needs at least 3 steps and 1 row, got length {length}, batch {batch}")
    report = LawReport(device=str(device))
    called = name or type(mixer).__name__
    with poisoned():
        for dtype in dtypes:
            start = Recorder(report, called, FREE, dtype)
            with start.attempt("building"):
                bench = law.Bench(mixer, dtype, device, batch, length, seed)
            if not report.ok:
                break
            named = [FREE, *law.routes_of(mixer, dtype, device, PLAIN_ROUTES)] if routes is None else routes
            for forced in named:
                _check_route(bench, Recorder(report, called, forced, dtype), forced)
        if compile and report.ok:
            dtype = dtypes[0]
            recorder = Recorder(report, called, FREE, dtype)
            bench = law.Bench(mixer, dtype, device, batch, length, seed)
            law.check_compile(bench, recorder)
            law.check_export(bench, recorder)
    return report.raise_if_broken() if strict else report


def _check_route(bench: law.Bench, recorder: Recorder, forced: str) -> None:
    with route(forced):
        law.check_form(bench, recorder)
        law.check_pieces(bench, recorder)
        law.check_packing(bench, recorder)
        law.check_rows(bench, recorder)
        law.check_causality(bench, recorder)
        law.check_saving(bench, recorder)
        if bench.dtype == torch.float64:
            law.check_reach(bench, recorder)
            law.check_derivative(bench, recorder)


def verify(
    mixers: Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    d_model: int = 16,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LawReport:
    """Hold registered mixers to the law on this machine: what to run before reporting a bug.

    Mixers that read whole sequences are held to the part of it that they keep (`check_whole_mixer`); those that read
    a prompt in one piece to all of it, which without a prompt they keep.

    Args:
        mixers: names; all if None.
        device: where; a GPU if there is one, else the CPU.
        dtypes: the types; by default float64 (where the device has it), float32 and bfloat16.
        d_model: the width of the mixers built.
        quick: the free route in float32 alone, nothing compiled.
        progress: called with each mixer's name before its turn.

    Returns:
        The report. Nothing is raised for a broken law; `report.ok` and `report.summary()` tell.

    Raises:
        UnknownNameError: no such mixer.
        ConfigurationError: a type that has no tolerance.
    """
    from ostinato.mixers import registry

    everything = [*registry.mixers(), *registry.prefix_mixers(), *registry.whole_mixers()]
    names = list(mixers) if mixers is not None else everything
    classes = {name: registry.mixer_class(name) for name in names}
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtypes is None:
        wide = (torch.float32,) if quick else (torch.float64, torch.float32, torch.bfloat16)
        dtypes = [dtype for dtype in wide if where.type != "mps" or dtype != torch.float64]
    report = LawReport(device=str(where))
    for name in names:
        if progress is not None:
            progress(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = classes[name](d_model)
        if name in registry.prefix_mixers():
            # Without a prompt the maps for it have nothing to do, and no gradient.
            for part, parameter in built.named_parameters():
                parameter.requires_grad_("prefix" not in part)
        options: dict[str, Any] = {
            "name": name,
            "dtypes": dtypes,
            "routes": (FREE,) if quick else _routes_here(built, dtypes[0], where),
            "device": where,
            "compile": not quick,
            "strict": False,
        }
        found = check_whole_mixer(built, **options) if isinstance(built, WholeMixer) else check_mixer(built, **options)
        report.rows += found.rows
    return report


def _routes_here(mixer: Mixer, dtype: torch.dtype, device: torch.device) -> list[str] | None:
    """On an accelerator every route that any engine has, compiled ones included; on the CPU the plain ones."""
    from ostinato.ops.routes import ENGINES

    if device.type == "cpu" and not any("native" in engine.routes for engine in ENGINES.values()):
        return None
    names = sorted({route for engine in ENGINES.values() for route in engine.routes})
    return [FREE, *law.routes_of(mixer, dtype, device, names)]
