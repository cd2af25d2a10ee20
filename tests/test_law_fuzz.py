"""The law on drawn cases: any mixer, route, batch, length, cuts and resets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ostinato.mixers import registry
from ostinato.testing import FREE, PLAIN_ROUTES, TOLERANCES, law
from ostinato.testing.runs import Problem, difference, route, run


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str, int, list[int], list[list[bool]] | None, int]:
    """A mixer's name, a route, the batch, the ends of the pieces (the last is the length), resets, a seed."""
    name = draw(st.sampled_from(registry.mixers()))
    forced = draw(st.sampled_from([FREE, *PLAIN_ROUTES]))
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, 70))
    cuts = sorted({*draw(st.lists(st.integers(1, length), max_size=4)), length})
    marks = st.lists(st.sampled_from([False] * 5 + [True]), min_size=length, max_size=length)
    resets = draw(st.one_of(st.none(), st.lists(marks, min_size=batch, max_size=batch)))
    return name, forced, batch, cuts, resets, draw(st.integers(0, 2**16))


@given(cases())
def test_any_cut_of_any_sequence_is_the_same_function(case: tuple) -> None:
    name, forced, batch, cuts, resets, seed = case
    torch.manual_seed(seed)
    mixer = registry.mixer(name, 16)
    if forced != FREE and not law.serves(mixer, forced, torch.float64, "cpu"):
        forced = FREE
    bench = law.Bench(mixer, torch.float64, "cpu", batch, cuts[-1], seed)
    reset = None if resets is None else torch.tensor(resets)
    problem = Problem("drawn", bench.x, bench.state, reset)
    with route(forced):
        found = run(bench.mixer, problem, cuts, step=True)
    for kind, wanted in bench.truth(problem).values.items():
        error, where = difference(found.values[kind], wanted)
        assert error <= TOLERANCES[torch.float64], f"{name}, {forced}: {kind} is {error:.1e} off in {where}"
