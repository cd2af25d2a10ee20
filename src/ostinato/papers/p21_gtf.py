"""Generalized teacher forcing: Lorenz-63 from noisy data by a clipped shallow PLRNN, α against α."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ostinato.analysis.cycles import Cycle, find_cycles
from ostinato.analysis.dynamics import (
    binned_divergence,
    lyapunov_spectrum,
    prediction_error,
    spectral_distance,
    spectral_hellinger,
    state_space_divergence,
)
from ostinato.models.dynamics import DynamicsModel, free_run
from ostinato.ops.cells.piecewise_linear import ShallowPLRNN
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.chaos import ChaosData, chaos_data
from ostinato.training.dynamics import DynamicsTrainer
from ostinato.training.teacher_forcing import TeacherForcing, chain_growth, forced_loss, spectral_norm

claims = (
    Claim("low", "with little forcing (α ≤ 0.1) training fails on a chaotic system", theirs="gradients explode"),
    Claim("inside", "the best constant α is neither 0 nor 1", theirs="an intermediate α is best"),
    Claim("adaptive", "adaptive α needs no tuning: as good as the best constant one", theirs="aGTF at the optimum"),
    Claim("alpha", "adaptive α comes down from 1 to the Jacobians' own growth", theirs="anneals"),
    Claim("latent", "as many latents as observed dimensions are enough", theirs="M = 3 for Lorenz-63"),
    Claim("lorenz", "Lorenz-63 is reconstructed: D_stsp, D_H", theirs="0.26, 0.09 (from memory; other settings)"),
    Claim("gradient", "under α = 1 the gradient of an error does not depend on T", theirs="exact"),
    Claim("bounded", "α ≥ 1 − 1/σ_max bounds every product of Jacobians by 1", theirs="theorem"),
    Claim("floor", "the measures' floor: the truth against itself", theirs="0.16 and 0.066 (T 49,000, Δt 0.01)"),
    Claim("recordings", "an electrocardiogram and an electroencephalogram: D_stsp, D_H", theirs="4.3, 0.34; 2.1, 0.11"),
)

_CONSTANT = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_STEP = 0.05
_STAGES = 5


def experiment(run: Run) -> list[Measured]:
    """All arms and seeds as one model; then every measure of every run."""
    seeds = run.choose(smoke=3, cpu=3, gpu=5)
    window = run.choose(smoke=20, cpu=60, gpu=150)
    updates = run.choose(smoke=50, cpu=5000, gpu=20_000)
    train, test = run.choose(smoke=(3000, 1500), cpu=(50_000, 20_000), gpu=(50_000, 20_000))
    arms = [f"α = {alpha:g}" for alpha in _CONSTANT] + ["adaptive"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.sizes.update(
        model="clipped shallow PLRNN", latent=3, hidden=50, seeds=seeds, window=window, updates=updates, batch=16,
        train_points=train, test_points=test, step=_STEP, noise=0.05, learning_rate="3e-3 → 3e-5 (Adam)",
    )  # fmt: skip
    data = chaos_data("lorenz63", train=train, test=test, step=_STEP, noise=0.05, seed=run.seed)
    kept: dict[str, Any] | None = None
    path = [[1.0] * seeds]
    early: dict[str, Any] = {}
    for stage in range(_STAGES):
        name = f"training, part {stage + 1} of {_STAGES}"
        kept = run.part(name, _train, run.seed, seeds, data, window, updates, kept, device)
        path.append(kept["alpha"][-seeds:])
        if stage == 0:
            early = run.part("measures after a fifth of the training", _measure, run.seed, seeds, data, kept)
    measured = run.part("measures", _measure, run.seed, seeds, data, kept)
    linear = run.part("linear map", _linear_map, data)
    floor = run.part("noise floor", _floor, run.choose(smoke=4000, cpu=49_000, gpu=49_000))
    lengths = run.choose(smoke=(5, 20), cpu=(10, 100, 400), gpu=(10, 100, 400))
    theory = run.part("gradients", _gradients, run.seed, seeds, data, kept, lengths)
    _draw(run, data, arms, measured, path, updates, linear)
    return _verdicts(run, arms, measured, early, path, linear, floor, theory)


def _model(seed: int, seeds: int) -> DynamicsModel:
    each = [1000 * seed + i for i in range(seeds)]
    return DynamicsModel(ShallowPLRNN(hidden=50), 3, 3, seeds=each * (len(_CONSTANT) + 1))


def _train(
    seed: int, seeds: int, data: ChaosData, window: int, updates: int, kept: dict[str, Any] | None, device: str
) -> dict[str, Any]:
    model = _model(seed, seeds).to(device)
    forcing = TeacherForcing.join(
        *[TeacherForcing.generalized(alpha, seeds) for alpha in _CONSTANT],
        TeacherForcing.adaptive("product", seeds, gamma=0.999, every=5),
    )
    trainer = DynamicsTrainer(model, torch.from_numpy(data.train), forcing, window=window, updates=updates, seed=seed)
    if kept is not None:
        trainer.restore(kept)
    losses = trainer.run(updates // _STAGES)
    return {**trainer.snapshot(), "losses": losses[-1].tolist()}


def _trained(seed: int, seeds: int, kept: dict[str, Any]) -> DynamicsModel:
    from ostinato.training.dynamics import unpacked

    model = _model(seed, seeds)
    model.load_state_dict({name: unpacked(value) for name, value in kept["weights"].items()})
    return model


def _measure(seed: int, seeds: int, data: ChaosData, kept: dict[str, Any]) -> dict[str, Any]:
    """Every measure, by run; and an orbit of each arm to draw."""
    model = _trained(seed, seeds, kept)
    test = torch.from_numpy(data.test).float()
    orbit = free_run(model, test)
    errors, persistence = prediction_error(model, test)
    series = orbit.double().numpy()
    return {
        "divergence": [binned_divergence(data.test, each) for each in series],
        "hellinger": [spectral_hellinger(data.test, each) for each in series],
        "exponent": lyapunov_spectrum(model, orbit, step=data.step)[:, 0].tolist(),
        "prediction": errors.tolist(),
        "persistence": persistence,
        "length": len(test),
        "settings": [str(state_space_divergence(data.test, data.test)), str(spectral_distance(data.test, data.test))],
        "orbits": {str(index): series[index, :800, [0, 2]].tolist() for index in range(0, len(series), seeds)},
        "skipped": kept["skipped"],
    }


def _linear_map(data: ChaosData) -> dict[str, float]:
    """The classical baseline: the best affine map by least squares, run freely as the models are."""
    before = np.column_stack([data.train[:-1], np.ones(len(data.train) - 1)])
    weights = np.linalg.lstsq(before, data.train[1:], rcond=None)[0]
    state, orbit = data.test[0], []
    for _ in range(len(data.test) * 5 // 4):
        state = np.append(state, 1.0) @ weights
        orbit.append(state)
    series = np.array(orbit[len(data.test) // 4 :])
    return {"divergence": binned_divergence(data.test, series), "hellinger": spectral_hellinger(data.test, series)}


def _floor(length: int) -> list[list[float]]:
    """D_stsp and D_H between four true stretches of `length` points each, Δt 0.01, in pairs."""
    series = chaos_data("lorenz63", train=length, test=3 * length, step=0.01)
    parts = [series.train, *np.split(series.test, 3)]
    pairs = [(parts[i], parts[j]) for i, j in ((0, 1), (2, 3), (0, 2), (1, 3))]
    return [[measure(*pair) for pair in pairs] for measure in (binned_divergence, spectral_hellinger)]


def _gradients(
    seed: int, seeds: int, data: ChaosData, kept: dict[str, Any], lengths: tuple[int, ...]
) -> dict[str, Any]:
    """The theorems, on the adaptive run of the first seed, in float64."""
    whole = _trained(seed, seeds, kept)
    model = DynamicsModel(whole.cell, 3, 3, seeds=(0,)).double()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            mine.copy_(theirs[len(_CONSTANT) * seeds][None])
    series = torch.from_numpy(data.test[: max(lengths) + 1])
    jacobians = model.jacobian(series[None])[0].detach()
    largest = float(spectral_norm(jacobians).max())
    star = 1 - 1 / largest
    growth = {name: chain_growth(jacobians, alpha).max().item() for name, alpha in (("free", 0.0), ("star", star))}
    norms = {}
    for alpha in (1.0, star, 0.0):
        norms[f"{alpha:.3g}"] = [_last_step_gradient(model, series, time, alpha) for time in lengths]
    starts = torch.from_numpy(data.test[:: max(1, len(data.test) // 200)])
    points = find_cycles(model.cell, model.weights_of(0), 1, starts)
    return {
        "sigma": largest,
        "star": star,
        "growth": growth,
        "norms": norms,
        "lengths": list(lengths),
        "fixed": [_fixed_point(cycle, data) for cycle in points],
    }


def _fixed_point(cycle: Cycle, data: ChaosData) -> str:
    """Its kind, and how far it is from the nearest of Lorenz-63's own, in standard deviations."""
    wing = math.sqrt(8 / 3 * 27)
    true = (np.array([[0, 0, 0], [wing, wing, 27], [-wing, -wing, 27]]) - data.mean) / data.deviation
    distance = np.linalg.norm(true - cycle.points[0].numpy(), axis=1)
    nearest = ("the origin", "the right wing", "the left wing")[int(distance.argmin())]
    return f"{cycle.kind} {distance.min():.2f} from {nearest}"


def _last_step_gradient(model: DynamicsModel, series: torch.Tensor, time: int, alpha: float) -> float:
    """The norm of the gradient of the last point's error alone, for a window of `time` steps that ends there.

    The sum of the errors of a window, less that of the window that stops one point sooner.
    """
    window = series[-time - 1 :][None, :, None]
    loss = time * forced_loss(model, window, torch.full((1, time), alpha))
    if time > 1:
        loss = loss - (time - 1) * forced_loss(model, window[:, :-1], torch.full((1, time - 1), alpha))
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def _by_arm(values: list[float], arms: list[str]) -> dict[str, list[float]]:
    seeds = len(values) // len(arms)
    return {arm: values[i * seeds : (i + 1) * seeds] for i, arm in enumerate(arms)}


def _spread(values: list[float], digits: int = 2) -> str:
    gone = sum(not math.isfinite(value) for value in values)
    there = [value for value in values if math.isfinite(value)]
    text = f"{min(there):.{digits}f}–{max(there):.{digits}f}" if there else "none"
    return text + (f" ({gone} of {len(values)} diverged)" if gone else "")


def _error(values: list[float]) -> float:
    """The standard error of a mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def _draw(
    run: Run, data: ChaosData, arms: list[str], measured: dict[str, Any], path: list[list[float]], updates: int,
    linear: dict[str, float],
) -> None:  # fmt: skip
    divergence = _by_arm(measured["divergence"], arms)
    constant = [divergence[arm] for arm in arms[:-1]]
    seeds = len(constant[0])
    run.figure(
        "D_stsp against α: each seed, their mean, and adaptive α",
        [
            Series("mean", _CONSTANT, [float(np.mean(values)) for values in constant]),
            *[Series(f"seed {i}", _CONSTANT, [values[i] for values in constant]) for i in range(seeds)],
        ],
        x_label="α",
        y_label="D_stsp",
        log_y=True,
        levels={"adaptive": float(np.mean(divergence["adaptive"])), "linear map": linear["divergence"]},
    )
    index = len(_CONSTANT) * seeds
    for name, orbit in (
        ("true", data.test[:800, [0, 2]].T),
        ("generated, adaptive α", np.array(measured["orbits"][str(index)])),
        ("generated, α = 1", np.array(measured["orbits"][str(index - seeds)])),
    ):
        run.figure(f"Lorenz-63, {name}", [Series(name, *orbit.tolist())], x_label="x", y_label="z")
    steps = [stage * updates // _STAGES for stage in range(len(path))]
    run.figure(
        "Adaptive α while training",
        [Series(f"seed {i}", steps, [alphas[i] for alphas in path]) for i in range(seeds)],
        x_label="update",
        y_label="α",
    )


def _verdicts(
    run: Run, arms: list[str], measured: dict[str, Any], early: dict[str, Any], path: list[list[float]],
    linear: dict[str, float], floor: list[list[float]], theory: dict[str, Any],
) -> list[Measured]:  # fmt: skip
    trained = run.budget != "smoke"
    divergence, hellinger = _by_arm(measured["divergence"], arms), _by_arm(measured["hellinger"], arms)
    exponent, soon = _by_arm(measured["exponent"], arms), _by_arm(early["divergence"], arms)
    mean = {arm: float(np.mean(values)) for arm, values in divergence.items()}
    table = "; ".join(
        f"{arm}: {_spread(divergence[arm])} / {_spread(hellinger[arm])} / {_spread(exponent[arm])}" for arm in arms
    )
    full, adaptive = mean["α = 1"], mean["adaptive"]
    finite = {arm: value for arm, value in mean.items() if arm != "adaptive" and math.isfinite(value)}
    best = min(finite, key=lambda arm: finite[arm], default="none")
    middle = min(mean["α = 0.5"], mean["α = 0.7"])
    lowest = [value for arm in ("α = 0", "α = 0.1") for value in divergence[arm]]
    last = path[-1]
    ahead = _spread(_by_arm(measured["prediction"], arms)["adaptive"], 3)
    norms, lengths = theory["norms"], theory["lengths"]
    equal = norms["1"]
    settings = "; ".join(measured["settings"])
    return [
        Measured(
            "low",
            f"D_stsp {_spread(lowest)}",
            all(not value <= 10 for value in lowest) if trained else None,
            f"D_stsp / D_H / λ1 of every arm: {table}. {settings}. A linear map by least squares: "
            f"{linear['divergence']:.1f} / {linear['hellinger']:.2f}",
        ),
        Measured(
            "inside",
            f"best {best} (mean D_stsp {finite.get(best, math.nan):.2f}); {middle:.2f} at 0.5 or 0.7, {full:.2f} at 1",
            best in ("α = 0.5", "α = 0.7", "α = 0.9") and middle <= 0.85 * full if trained else None,
            "wanted: best inside (0.3, 1), and D_stsp(0.5 or 0.7) ≤ 0.85 D_stsp(1); standard errors over seeds: "
            + ", ".join(f"{arm} {_error(divergence[arm]):.2f}" for arm in ("α = 0.5", "α = 0.7", "α = 1")),
        ),
        Measured(
            "adaptive",
            f"mean D_stsp {adaptive:.2f}: {adaptive / finite.get(best, math.nan):.2f} of the best constant, "
            f"{adaptive / full:.2f} of α = 1",
            adaptive <= 1.1 * finite.get(best, math.nan) and adaptive <= 0.75 * full if trained else None,
            f"wanted: ≤ 1.1 and ≤ 0.75; after a fifth of the training: adaptive {_spread(soon['adaptive'])}, "
            f"α = 1 {_spread(soon['α = 1'])}",
        ),
        Measured(
            "alpha",
            " → ".join(f"{np.mean(alphas):.2f}" for alphas in path),
            all(0.4 <= alpha <= 0.7 for alpha in last) if trained else None,
            "mean over seeds at each fifth of the training; wanted: every seed in 0.4–0.7 at the end",
        ),
        Measured(
            "latent",
            f"adaptive, M = 3: λ1 {_spread(exponent['adaptive'])} per time unit",
            all(value > 0 for value in exponent["adaptive"]) and adaptive < 5 if trained else None,
            f"true 0.906; wanted: chaotic in every seed, mean D_stsp < 5; PE(20) {ahead}, "
            f"of persistence {measured['persistence']:.2f}; fixed points found: {'; '.join(theory['fixed']) or 'none'} "
            "(Lorenz-63 has three, a saddle and two saddle spirals)",
        ),
        Measured(
            "lorenz",
            f"{adaptive:.2f}, {np.mean(hellinger['adaptive']):.2f}",
            None,
            f"noise 0.05 on the data, Δt {_STEP}, another training length and batching than the paper's; {settings}",
        ),
        Measured(
            "gradient",
            "; ".join(f"α {a}: " + ", ".join(f"{value:.3g}" for value in values) for a, values in norms.items()),
            max(equal) - min(equal) <= 1e-6 * max(equal),
            f"norm of the gradient of the last point's error, windows of {', '.join(map(str, lengths))} steps",
        ),
        Measured(
            "bounded",
            f"largest norm {math.exp(theory['growth']['star']):.6f} at α* = {theory['star']:.3f}",
            theory["growth"]["star"] <= 1e-9,
            f"σ_max {theory['sigma']:.2f}, products of up to {max(lengths)} Jacobians; without forcing up to "
            f"e^{theory['growth']['free']:.1f}",
        ),
        Measured(
            "floor",
            " and ".join(f"mean {np.mean(values):.3f} ({_spread(values, 3)})" for values in floor),
            bool(0.1 <= np.mean(floor[0]) <= 0.2 and 0.035 <= np.mean(floor[1]) <= 0.14) if trained else None,
            f"four stretches of {run.choose(smoke=4000, cpu=49_000, gpu=49_000):,} points in four pairs, 30 bins, "
            f"σ = 20; the two halves of the first series {floor[0][0]:.3f} and {floor[1][0]:.3f}; wanted of the mean: "
            "D_stsp 0.1–0.2, D_H within a factor of 2 of 0.07. Stretches of one orbit differ by up to twice",
        ),
        Measured("recordings", "not measured", None, "the recordings are in no package that could be installed"),
    ]
