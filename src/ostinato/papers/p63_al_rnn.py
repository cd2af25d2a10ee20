"""Almost-linear RNNs: Lorenz-63 and Rössler with few switching units, and the symbols that their regions are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ostinato.analysis.cycles import enumerate_cycles, find_cycles, fixed_point, regions_of_codes
from ostinato.analysis.dynamics import (
    binned_divergence,
    lyapunov_spectrum,
    spectral_distance,
    spectral_hellinger,
    state_space_divergence,
)
from ostinato.analysis.symbolic import (
    encode,
    occupancy_curve,
    occupancy_distance,
    string_period,
    topological_entropy,
    transition_graph,
)
from ostinato.models.dynamics import DynamicsModel, free_run
from ostinato.ops.cells.piecewise_linear import ALRNN
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.chaos import ChaosData, chaos_data
from ostinato.training.dynamics import DynamicsTrainer, unpacked
from ostinato.training.teacher_forcing import TeacherForcing

claims = (
    Claim("regions", "P = 2 reconstructs Lorenz-63 with 3 of its 4 regions", theirs="3 regions, λ1 0.90 (released)"),
    Claim("few", "P = 1 cannot reconstruct Lorenz-63", theirs="fails for any M"),
    Claim("rossler", "P = 1 reconstructs Rössler with 2 regions", theirs="2 regions"),
    Claim("robust", "regions are used alike from run to run, more so than with P = M", theirs="smaller KS distance"),
    Claim("entropy", "the code's topological entropy bounds the orbit's own, λ1 a step", theirs="upper bound"),
    Claim("cycles", "fixed points and cycles are found exactly, with their stability", theirs="exact"),
    Claim("strings", "a k-cycle's symbols repeat with period k, a fixed point's are constant", theirs="theorem"),
    Claim("recordings", "ECG in 3 regions; fMRI by a virtual fixed point and a saddle spiral", theirs="P = 2"),
    Claim("shifts", "entropy of the full 2-shift and the golden-mean shift", theirs="log 2 and log((1 + √5)/2)"),
)

_LATENT = 20
_LEAST = 1e-3


def experiment(run: Run) -> list[Measured]:
    """Hand-made maps; Lorenz-63; Rössler; what regions the trained models use."""
    exact = run.part("hand-made maps", _hand_made, run.choose(smoke=5, cpu=8, gpu=8))
    lorenz_options = {
        "name": "lorenz63",
        "seed": run.seed,
        "switching": run.choose(smoke=(1, 2, 3), cpu=(1, 2, 3, _LATENT), gpu=(0, 1, 2, 3, _LATENT)),
        "seeds": run.choose(smoke=2, cpu=4, gpu=5),
        "window": run.choose(smoke=15, cpu=60, gpu=200),
        "updates": run.choose(smoke=40, cpu=40_000, gpu=100_000),
        "step": run.choose(smoke=0.05, cpu=0.05, gpu=0.01),
        "points": run.choose(smoke=(2000, 800), cpu=(50_000, 20_000), gpu=(100_000, 10_000)),
        "forcing": run.choose(smoke=("alpha", 0.5), cpu=("alpha", 0.5), gpu=("tau", 16)),
        "optimizer": run.choose(smoke="adam", cpu="adam", gpu="radam"),
        "learning_rate": run.choose(smoke=(3e-3, 3e-5), cpu=(3e-3, 3e-5), gpu=(1e-3, 1e-5)),
        "check_every": run.choose(smoke=0, cpu=0, gpu=2000),
        "stages": run.choose(smoke=2, cpu=8, gpu=10),
    }
    rossler_options = {
        "name": "rossler",
        "seed": run.seed,
        "switching": (0, 1, 2),
        "seeds": run.choose(smoke=1, cpu=3, gpu=5),
        "window": run.choose(smoke=15, cpu=300, gpu=300),
        "updates": run.choose(smoke=20, cpu=4000, gpu=10_000),
        "step": 0.08,
        "points": run.choose(smoke=(2000, 800), cpu=(50_000, 10_000), gpu=(100_000, 10_000)),
        "forcing": ("tau", 8),
        "optimizer": "radam",
        "learning_rate": (5e-3, 1e-5),
        "check_every": run.choose(smoke=0, cpu=500, gpu=1000),
        "stages": run.choose(smoke=1, cpu=4, gpu=5),
    }
    for options in (lorenz_options, rossler_options):
        run.sizes[options["name"]] = {"latent": _LATENT, "batch": 16, "noise": 0.05, **options}
    lorenz, rossler = _reconstruct(run, lorenz_options), _reconstruct(run, rossler_options)
    _draw(run, lorenz, lorenz_options)
    return [
        *_lorenz_verdicts(run, lorenz, lorenz_options),
        *_rossler_verdicts(run, rossler),
        Measured("recordings", "not measured", None, "the recordings are in no package that this one needs"),
        *_exact_verdicts(exact),
    ]


def _reconstruct(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """Train all P and seeds as one model, by stages, and measure every run on the test part."""
    train, test = options["points"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the first half of what training does not see chooses checkpoints, the second is the test
    data = chaos_data(options["name"], train=train, test=2 * test, step=options["step"], seed=run.seed)
    kept: dict[str, Any] | None = None
    for stage in range(options["stages"]):
        name = f"{options['name']}, part {stage + 1} of {options['stages']}"
        kept = run.part(name, _train, options, data, kept, device)
    assert kept is not None
    units = run.choose(smoke=20, cpu=600, gpu=600)
    run.sizes["λ1"] = f"over an orbit of at least {units} units of time"
    return run.part(f"{options['name']}, measures", _measure, options, data, kept, units)


def _model(options: dict[str, Any]) -> DynamicsModel:
    switching = tuple(p for p in options["switching"] for _ in range(options["seeds"]))
    seeds = [1000 * options["seed"] + i for i in range(options["seeds"])] * len(options["switching"])
    return DynamicsModel(ALRNN(switching), _LATENT, 3, seeds=seeds)


def _train(options: dict[str, Any], data: ChaosData, kept: dict[str, Any] | None, device: str) -> dict[str, Any]:
    model = _model(options).to(device)
    kind, value = options["forcing"]
    forcing = (TeacherForcing.sparse if kind == "tau" else TeacherForcing.generalized)(value, model.runs)
    trainer = DynamicsTrainer(
        model,
        torch.from_numpy(data.train),
        forcing,
        window=options["window"],
        updates=options["updates"],
        learning_rate=options["learning_rate"],
        optimizer=options["optimizer"],
        noise=0.05,
        seed=options["seed"],
    )
    if kept is not None:
        trainer.restore(kept)
    left = options["updates"] // options["stages"]
    held_out = data.test[: len(data.test) // 2]
    losses = torch.empty(0)
    while left > 0:
        losses = trainer.run(min(left, options["check_every"] or left))
        left -= options["check_every"] or left
        if options["check_every"]:
            orbit = free_run(model, torch.from_numpy(held_out).to(model.diagonal))
            series = orbit[..., :3].double().cpu().numpy()
            trainer.keep_best(torch.tensor([binned_divergence(held_out, each) for each in series]))
    return {**trainer.snapshot(), "losses": losses[-20:].mean(0).tolist()}


def _measure(options: dict[str, Any], data: ChaosData, kept: dict[str, Any], units: int) -> dict[str, Any]:
    """Every measure and the symbols, by run; exponents over `units` of time, since they settle slowly."""
    model = _model(options)
    model.load_state_dict({name: unpacked(value) for name, value in (kept["best"] or kept["weights"]).items()})
    test = data.test[len(data.test) // 2 :]
    orbit = free_run(model, torch.from_numpy(test).float())
    # Only the first point and the length of what is given matter to a free run.
    longer = np.resize(test, (max(len(test), int(units / data.step)), test.shape[1]))
    longest = orbit if len(longer) == len(test) else free_run(model, torch.from_numpy(longer).float())
    exponents = lyapunov_spectrum(model, longest, step=data.step, count=2)[:, 0]
    regions = model.regions(orbit.nan_to_num(0.0))
    rows = []
    for index in range(model.runs):
        switching = options["switching"][index // options["seeds"]]
        series = orbit[index, :, :3].double().numpy()
        row: dict[str, Any] = {
            "switching": switching,
            "divergence": binned_divergence(test, series),
            "hellinger": spectral_hellinger(test, series),
            "exponent": float(exponents[index]),
            "loss": kept["losses"][index],
            "regions": 0,
        }
        if np.isfinite(series).all():
            codes = encode(regions[index], switching)
            graph = transition_graph(codes, least=_LEAST)
            row |= {
                "regions": len(graph.symbols),
                "graph": str(graph),
                "entropy": topological_entropy(graph.edges),
                "period": string_period(codes),
                "occupancy": occupancy_curve(codes, 8)[:8].tolist(),
                "nodes": [_node(series, codes, int(symbol)) for symbol in graph.symbols],
                "weights": graph.weights.tolist(),
                "orbit": series[:800, [0, 2]].T.tolist(),
                "codes": codes.tolist() if switching else [],
            }
            if 0 < switching <= 3:
                row["fixed"] = _fixed_points(model, index, switching, [int(symbol) for symbol in graph.symbols])
        rows.append(row)
    return {
        "runs": rows,
        "true": test[:800, [0, 2]].T.tolist(),
        "true_exponent": float(data.exponents[0]),
        "step": data.step,
        "settings": [str(state_space_divergence(test, test)), str(spectral_distance(test, test))],
    }


def _node(series: np.ndarray, codes: np.ndarray, symbol: int) -> dict[str, Any]:
    inside = series[codes == symbol]
    return {"symbol": symbol, "x": float(inside[:, 0].mean()), "z": float(inside[:, 2].mean())}


def _fixed_points(model: DynamicsModel, index: int, switching: int, symbols: list[int]) -> list[str]:
    """The fixed point of each visited region: real or virtual, and its kind."""
    weights = model.weights_of(index)
    found = []
    for symbol, region in zip(symbols, regions_of_codes(symbols, switching, _LATENT), strict=True):
        point = fixed_point(model.cell, weights, region)
        found.append(f"region {symbol}: {'real' if point.real else 'virtual'} {point.kind}")
    return found


def _map(left: float, right: float) -> tuple[ALRNN, tuple[torch.Tensor, ...]]:
    """z' = left·z + 1 for z ≤ 0, right·z + 1 for z > 0, as an AL-RNN of one unit."""
    values = ([left], [[right - left]], [1.0], [0.0])
    return ALRNN(1), tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def _orbit(left: float, right: float, start: float, length: int) -> torch.Tensor:
    """The first steps are left out."""
    cell, weights = _map(left, right)
    state, points = torch.tensor([start], dtype=torch.float64), []
    for _ in range(length + 100):
        points.append(state)
        state = cell.advance(weights, state)
    return torch.stack(points[100:])


def _symbols(orbit: torch.Tensor) -> np.ndarray:
    return encode(orbit > 0, 1)


def _hand_made(longest: int) -> dict[str, Any]:
    """Maps of which everything is known."""
    tent, weights = _map(2.0, -2.0)
    both = torch.tensor([[False], [True]])
    found = enumerate_cycles(tent, weights, both, longest)
    counts = [sum(cycle.period == k for cycle in found) for k in range(1, longest + 1)]
    # the tent map on [−1, 1] has 2^k points of period dividing k, all unstable with |eigenvalue| 2^k
    divisors = [[d for d in range(1, k + 1) if k % d == 0] for k in range(1, longest + 1)]
    points = [sum(d * counts[d - 1] for d in each) for each in divisors]
    multipliers = max(abs(abs(float(c.eigenvalues[0].real)) / 2**c.period - 1) for c in found)
    searched = [
        len(find_cycles(tent, weights, k, torch.linspace(-0.97, 0.95, 40, dtype=torch.float64)[:, None]))
        for k in (1, 2, 3)
    ]
    fixed = sorted(float(cycle.points[0, 0]) for cycle in found if cycle.period == 1)
    two = sorted(cycle.points.flatten().tolist() for cycle in found if cycle.period == 2)[0]
    # left 0.5, right −3.6: a stable cycle of three, eigenvalue −0.9, and a virtual fixed point at 2
    cell, stable = _map(0.5, -3.6)
    three = [cycle for cycle in enumerate_cycles(cell, stable, both, 3) if cycle.period == 3 and cycle.stable]
    virtual = fixed_point(cell, stable, both[0])
    settled = _map(0.5, -0.5)
    golden = (1 + math.sqrt(5)) / 2
    graphs = {
        "full": transition_graph(_symbols(_orbit(1.5, -3.0, 0.3, 4000))),
        "golden": transition_graph(_symbols(_orbit(golden, -golden, 0.3, 4000))),
    }
    return {
        "counts": counts,
        "points": points,
        "multipliers": multipliers,
        "searched": searched,
        "errors": [abs(fixed[0] + 1), abs(fixed[1] - 1 / 3), abs(min(two) + 0.2), abs(max(two) - 0.6)],
        "three": [[cycle.kind, float(cycle.eigenvalues[0].real), cycle.real] for cycle in three],
        "virtual": [virtual.real, virtual.stable, float(virtual.points[0, 0])],
        "period_three": string_period(_symbols(_orbit(0.5, -3.6, 0.3, 400))),
        "period_fixed": string_period(_symbols(_orbit(0.5, -0.5, 0.3, 400))),
        "fixed_is_stable": any(c.stable and c.period == 1 for c in enumerate_cycles(*settled, both, 2)),
        "period_chaos": string_period(_symbols(_orbit(1.5, -3.0, 0.3, 4000))),
        "entropy": {name: topological_entropy(graph.edges) for name, graph in graphs.items()},
    }


def _of(measured: dict[str, Any], switching: int) -> list[dict[str, Any]]:
    return [row for row in measured["runs"] if row["switching"] == switching]


def _row(row: dict[str, Any]) -> str:
    if not math.isfinite(row["exponent"]):
        return "diverged"
    return f"{row['regions']} regions, λ1 {row['exponent']:.2f}, D {row['divergence']:.1f}/{row['hellinger']:.2f}"


def _table(measured: dict[str, Any], switching: tuple[int, ...]) -> str:
    parts = [f"P = {p}: " + " | ".join(_row(row) for row in _of(measured, p)) for p in switching]
    settings = "; ".join(measured["settings"])
    return f"{'; '.join(parts)}. True λ1 {measured['true_exponent']:.2f}; {settings}; occupancy ≥ {_LEAST:g}"


def _chaotic(row: dict[str, Any]) -> bool:
    return row["exponent"] > 0.3


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the runs that stayed bounded, the one whose attractor is nearest."""
    return min((row for row in rows if math.isfinite(row["divergence"])), key=lambda r: r["divergence"], default=None)


def _draw(run: Run, lorenz: dict[str, Any], options: dict[str, Any]) -> None:
    best = _best([row for row in _of(lorenz, 2) if row["regions"] > 1]) or _best(_of(lorenz, 2))
    run.figure("Lorenz-63, true", [Series("true", *lorenz["true"])], x_label="x", y_label="z")
    if best is None:
        return
    run.figure("Lorenz-63, generated by P = 2", [Series("generated", *best["orbit"])], x_label="x", y_label="z")
    nodes = best["nodes"]
    series = [Series("orbit", *[axis[:150] for axis in best["orbit"]])]
    for i, node in enumerate(nodes):
        share = best["occupancy"][i] - (best["occupancy"][i - 1] if i else 0.0) if i < 8 else 0.0
        series.append(Series(f"region {node['symbol']}: {share:.1%}", [node["x"]], [node["z"]]))
    for i, start in enumerate(nodes):
        for j, end in enumerate(nodes):
            if i != j and best["weights"][i][j] > 0 and len(series) < 16:
                label = f"{start['symbol']} → {end['symbol']}: {best['weights'][i][j]:.2%}"
                series.append(Series(label, *_arc(start, end)))
    run.figure(
        "Transition graph of P = 2 (region: share of time; edge: share of steps)",
        series,
        x_label="x",
        y_label="z",
    )
    curves = [
        Series(f"P = {row['switching']}, run {i % options['seeds']}", list(range(1, 9)), row["occupancy"])
        for i, row in enumerate(lorenz["runs"])
        if row["regions"] and row["switching"] in (2, 3)
    ]
    run.figure("Share of time in the most visited regions", curves, x_label="regions", y_label="share of time")


def _arc(start: dict[str, Any], end: dict[str, Any]) -> list[list[float]]:
    """A way from node to node that bends to its right, so that the way back is seen beside it."""
    across, up = end["x"] - start["x"], end["z"] - start["z"]
    along = np.linspace(0, 1, 13)
    bend = 4 * 0.2 * along * (1 - along)
    return [(start["x"] + along * across + bend * up).tolist(), (start["z"] + along * up - bend * across).tolist()]


def _lorenz_verdicts(run: Run, lorenz: dict[str, Any], options: dict[str, Any]) -> list[Measured]:
    trained, full = run.budget != "smoke", run.budget == "gpu"
    two, one, seeds = _of(lorenz, 2), _of(lorenz, 1), options["seeds"]
    if full:
        good = sum(0.7 <= row["exponent"] <= 1.1 and row["regions"] == 3 for row in two)
        wanted, enough = "λ1 in 0.7–1.1 and 3 regions in most seeds", good > seeds / 2
    else:
        good = sum(_chaotic(row) and row["regions"] == 3 and row["divergence"] < 6 for row in two)
        wanted, enough = "λ1 > 0.3, exactly 3 regions and D_stsp < 6 in at least 2 of 4 seeds", good >= 2
    best = _best(two)
    inside = f". Best: {', '.join(best['fixed'])}; {best['graph']}" if best else ""
    rows = [
        Measured(
            "regions",
            f"{good} of {seeds} seeds: " + " | ".join(_row(row) for row in two),
            enough if trained else None,
            f"wanted: {wanted}. {_table(lorenz, options['switching'])}{inside}",
        ),
        Measured(
            "few",
            " | ".join(_row(row) for row in one),
            not any(_chaotic(row) for row in one) if trained else None,
            "wanted: no seed with λ1 > 0.3 on a bounded orbit; with λ1 > 0.3 and D_stsp < 6, as is asked of P = 2: "
            f"{sum(_chaotic(row) and row['divergence'] < 6 for row in one)} of {seeds}",
        ),
    ]
    chaotic = [row for row in lorenz["runs"] if _chaotic(row) and 0 < row["switching"] <= 3]
    pairs = [(row["entropy"], row["exponent"] * lorenz["step"]) for row in chaotic]
    rows.append(
        Measured(
            "entropy",
            ", ".join(f"{entropy:.2f} ≥ {rate:.3f}" for entropy, rate in pairs) or "no chaotic run",
            all(entropy >= rate for entropy, rate in pairs) if pairs and trained else None,
            f"nats a step, of every chaotic run with P ≤ 3; T {options['points'][1]}, occupancy ≥ {_LEAST:g}",
        )
    )
    dense = _of(lorenz, _LATENT)
    if dense:
        distance = {p: _distances(_of(lorenz, p)) for p in (2, _LATENT)}
        few, many = float(np.mean(distance[2] or [math.nan])), float(np.mean(distance[_LATENT] or [math.nan]))
        rows.append(
            Measured(
                "robust",
                f"mean KS distance {few:.3f} with P = 2, {many:.3f} with P = M",
                few < many if math.isfinite(few + many) and trained else None,
                f"between shares of time in the most visited regions; {len(distance[2])} and {len(distance[_LATENT])} "
                f"pairs of runs that stayed bounded; P = M: {' | '.join(_row(row) for row in dense)}",
            )
        )
    return rows


def _distances(rows: list[dict[str, Any]]) -> list[float]:
    strings = [np.array(row["codes"]) for row in rows if row["regions"]]
    return [occupancy_distance(one, other) for i, one in enumerate(strings) for other in strings[:i]]


def _rossler_verdicts(run: Run, rossler: dict[str, Any]) -> list[Measured]:
    one = _of(rossler, 1)
    good = sum(row["exponent"] > 0 and row["regions"] == 2 for row in one)
    return [
        Measured(
            "rossler",
            f"{good} of {len(one)} seeds: " + " | ".join(_row(row) for row in one),
            good > len(one) / 2 if run.budget != "smoke" else None,
            f"wanted: λ1 > 0 and 2 regions in most seeds. {_table(rossler, (0, 1, 2))}",
        )
    ]


def _exact_verdicts(exact: dict[str, Any]) -> list[Measured]:
    golden = math.log((1 + math.sqrt(5)) / 2)
    points = exact["points"]
    three, virtual = exact["three"], exact["virtual"]
    right = (
        points == [2 ** (k + 1) for k in range(len(points))]
        and exact["searched"] == exact["counts"][:3]
        and max(*exact["errors"], exact["multipliers"]) < 1e-9
        and len(three) == 1
        and three[0][2]
        and abs(three[0][1] + 0.9) < 1e-9
        and virtual[0] is False
        and abs(virtual[2] - 2) < 1e-9
    )
    entropy = exact["entropy"]
    return [
        Measured(
            "cycles",
            f"tent map: {', '.join(map(str, exact['counts']))} cycles of periods 1 … {len(points)}, as many as there "
            f"are; largest error {max(*exact['errors'], exact['multipliers']):.1e}",
            right,
            f"SCYFI search for periods 1, 2, 3 finds {exact['searched']}; a map with a stable 3-cycle: "
            f"{three[0][0] if three else 'none'}, eigenvalue {three[0][1] if three else math.nan:.3f}, and a virtual "
            f"fixed point at {virtual[2]:.3f}",
        ),
        Measured(
            "strings",
            f"3-cycle: period {exact['period_three']}; fixed point: {exact['period_fixed']}; chaos: "
            f"{exact['period_chaos'] or 'none'}",
            exact["period_three"] == 3
            and exact["period_fixed"] == 1
            and exact["fixed_is_stable"]
            and exact["period_chaos"] is None,
            "strings of 400 and 4000 symbols, periods up to 1000",
        ),
        Measured(
            "shifts",
            f"{entropy['full']:.12f} and {entropy['golden']:.12f}",
            abs(entropy["full"] - math.log(2)) < 1e-12 and abs(entropy["golden"] - golden) < 1e-12,
            "graphs of orbits of 4000 steps of tent-like AL-RNNs of one unit",
        ),
    ]
