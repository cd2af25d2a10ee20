"""AR-Net: autoregression by gradient descent with a sparsity penalty, beside least squares (arXiv 1911.12436)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ostinato.errors import DataError
from ostinato.models.ar_net import ARNet, SparsityPenalty, fit_ar_nets
from ostinato.models.autoregression import (
    Autoregression,
    fit_ols_ar,
    fit_yule_walker,
    one_step,
    spectral_radius,
)
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.autoregression import (
    SPARSE_COEFFICIENTS,
    at_lags,
    random_coefficients,
    real_series,
    rmse,
    simulate_ar,
    stpe,
)

claims = (
    Claim("equality", "the same coefficients as least squares, and a forecast error at the noise floor", "MSE ≈ 1.0"),
    Claim("sparse", "far more lags than needed: true coefficients stay visible", "useful at 3 of 300 to 1000 lags"),
    Claim("small", "1000 samples, lags 1, 3, 10 of 20: total percentage error", "3.2 (least squares 18.3)"),
    Claim("linear_time", "training time grows linearly with the order", "linear, up to 1000 lags"),
    Claim("quadratic_time", "least squares grows quadratically with the order", "quadratic"),
    Claim("real", "an honest linear forecaster on real series, one step ahead", "not tested"),
)

_BARS = (50, 100, 300)
"""The orders at which AR-Net must halve the error of least squares."""
_LARGE_BATCH = 2048
"""Windows in a step that is timed for its arithmetic: 128 take as long to launch as to compute."""


def experiment(run: Run) -> list[Measured]:
    """The five parts; verdicts only from the budgets that are large enough for them."""
    length = run.choose(smoke=2000, cpu=25_000, gpu=100_000)
    orders = run.choose(smoke=(3, 10, 50), cpu=(3, 10, 30, 50, 100, 300, 1000), gpu=(3, 10, 30, 50, 100, 300, 1000))
    times = run.choose(smoke=(8, 16, 32), cpu=(50, 100, 200, 400, 800, 1600), gpu=(50, 100, 200, 400, 800, 1600))
    seeds = run.choose(smoke=3, cpu=5, gpu=5)
    small_seeds = run.choose(smoke=3, cpu=20, gpu=100)
    epochs = run.choose(smoke=2, cpu=10, gpu=10)
    small_epochs = run.choose(smoke=4, cpu=200, gpu=200)
    timed = run.choose(smoke=500, cpu=20_000, gpu=20_000)
    device = "cuda" if torch.cuda.is_available() and run.budget == "gpu" else "cpu"
    run.sizes |= {
        "samples": f"{length:,} to fit, {length // 4:,} to test",
        "orders": ", ".join(map(str, orders)),
        "seeds": f"{seeds} (small data: {small_seeds})",
        "training": f"Adam 2e-3, factor 0.75, batch 128, {epochs} epochs, c_lambda 0.01, c1 = c2 = 3, linear ramp",
        "small data": f"Adam 3e-3, factor 0.98, batch 16, {small_epochs} epochs, c_lambda 0.03",
        "timing": f"one epoch of {timed:,} windows, one thread, the quickest of 3; batches of 128, {_LARGE_BATCH:,}",
        "real series": f"as the small data, with as many updates ({small_epochs} epochs of 1,000 values)",
    }
    first = 1000 * run.seed
    dense = run.part("dense", _dense, length, seeds, epochs, first, device)
    sparse = run.part("sparse", _sparse, length, orders, seeds, epochs, first, device)
    small = run.part("small", _small, small_seeds, small_epochs, first, device)
    clock = run.timed_part("time", _times, times, timed)
    real = run.part("real", _real, small_epochs, first)
    rows = [_equality_row(dense), _sparse_row(sparse), _small_row(small), *_time_rows(clock), _real_row(real)]
    run.figure(
        f"Error of the coefficients, AR(3) in {length:,} samples",
        [Series(name, orders, [float(np.mean(v)) for v in sparse["stpe"][name]]) for name in sparse["stpe"]],
        x_label="lags in the model",
        y_label="total percentage error",
        log_x=True,
        log_y=True,
    )
    run.figure(
        f"Seconds on one thread ({timed:,} windows)",
        [Series(name, times, clock[name]) for name in clock],
        x_label="lags in the model",
        y_label="seconds",
        log_x=True,
        log_y=True,
    )
    if run.budget == "smoke":
        return [Measured(row.key, row.ours, None, "too small a budget to tell") for row in rows]
    return rows


def _errors(fitted: Autoregression, series: torch.Tensor) -> float:
    return float((one_step(fitted, series) - series[len(fitted.coefficients) :]).square().mean())


def _dense(length: int, seeds: int, epochs: int, first: int, device: str) -> dict[str, list[float]]:
    """AR(10) with every lag in use and no penalty, against least squares; errors on a held-out continuation."""
    out: dict[str, list[float]] = {"difference": [], "AR-Net": [], "least squares": []}
    for seed in range(first, first + seeds):
        series = torch.from_numpy(simulate_ar(random_coefficients(10, seed), length + length // 4, seed))
        train, test = series[:length], series[length:]
        weights, intercepts = fit_ar_nets(train.float().to(device)[None], [10], [None], epochs=epochs, seed=seed)
        net = Autoregression(weights[0, 0].double().cpu(), intercepts[0, 0].double().cpu())
        ols = fit_ols_ar(train, 10)
        out["difference"].append(float((net.coefficients - ols.coefficients).abs().max()))
        out["AR-Net"].append(_errors(net, test))
        out["least squares"].append(_errors(ols, test))
    return out


def _sparse(
    length: int, orders: tuple[int, ...], seeds: int, epochs: int, first: int, device: str
) -> dict[str, dict[str, list[list[float]]]]:
    """Errors of coefficients and of held-out forecasts by method, order and seed; all networks train as one batch."""
    series = torch.from_numpy(simulate_ar(SPARSE_COEFFICIENTS, length + length // 4, list(range(first, first + seeds))))
    penalties = [SparsityPenalty(min(1.0, 3 / order)) for order in orders]
    batch = series[:, :length].float().to(device)
    weights, intercepts = fit_ar_nets(batch, orders, penalties, epochs=epochs, seed=first)
    names = ("AR-Net", "least squares", "Yule-Walker")
    out: dict[str, dict[str, list[list[float]]]] = {"stpe": {n: [] for n in names}, "mse": {n: [] for n in names}}
    for index, order in enumerate(orders):
        fitted: dict[str, list[Autoregression]] = {
            "AR-Net": [
                Autoregression(w[index, :order].double().cpu(), c[index].double().cpu())
                for w, c in zip(weights, intercepts, strict=True)
            ],
            "least squares": [fit_ols_ar(each[:length], order) for each in series],
            "Yule-Walker": [fit_yule_walker(each[:length], order) for each in series],
        }
        for name, models in fitted.items():
            out["stpe"][name].append([stpe(m.coefficients.numpy(), SPARSE_COEFFICIENTS) for m in models])
            errors = [_errors(m, each[length - order :]) for m, each in zip(models, series, strict=True)]
            out["mse"][name].append(errors)
    return out


def _small(seeds: int, epochs: int, first: int, device: str) -> dict[str, list[float]]:
    true = at_lags(SPARSE_COEFFICIENTS, (1, 3, 10), 20)
    series = torch.from_numpy(simulate_ar(true, 1000, list(range(first, first + seeds))))
    weights, _ = fit_ar_nets(
        series.float().to(device),
        [20],
        [SparsityPenalty(3 / 20, c_lambda=0.03)],
        epochs=epochs,
        batch_size=16,
        learning_rate=3e-3,
        decay=0.98,
        seed=first,
    )
    return {
        "AR-Net": [stpe(w[0].cpu().numpy(), true) for w in weights],
        "least squares": [stpe(fit_ols_ar(each, 20).coefficients.numpy(), true) for each in series],
    }


def _times(orders: tuple[int, ...], length: int) -> dict[str, list[float]]:
    """Seconds by method and order; every order has `length` windows, so its first lags stand before them."""
    whole = torch.from_numpy(simulate_ar(SPARSE_COEFFICIENTS, length + max(orders), 0))
    series = {p: whole[: length + p] for p in orders}
    methods: dict[str, Callable[[int], Any]] = {
        "AR-Net, one epoch": lambda p: ARNet(p).fit(series[p].float(), epochs=1, batch_size=_LARGE_BATCH),
        "AR-Net, batches of 128": lambda p: ARNet(p).fit(series[p].float(), epochs=1),
        "least squares": lambda p: fit_ols_ar(series[p], p),
        "Yule-Walker": lambda p: fit_yule_walker(series[p], p),
    }
    with _one_thread():
        return {name: [_seconds(partial(fit, p)) for p in orders] for name, fit in methods.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _real(epochs: int, first: int) -> dict[str, dict[str, float]] | str:
    """One-step RMSE on the last fifth of each series, in its own units; or why there are no series."""
    out = {}
    try:
        for name in ("sunspots", "co2"):
            values = real_series(name)
            series = values[12:] - values[:-12] if name == "co2" else values
            out[name] = _forecast_real(series, 30, epochs, first)
    except DataError as error:
        return str(error)
    return out


def _forecast_real(values: np.ndarray, order: int, epochs: int, first: int) -> dict[str, float]:
    split = int(0.8 * len(values))
    mean, deviation = values[:split].mean(), values[:split].std()
    series = torch.from_numpy((values - mean) / deviation)
    arms = {"AR-Net": None, "sparse AR-Net": SparsityPenalty(0.2)}
    # As many updates as the 1,000 values of the small data have: a short series needs more epochs to get anywhere.
    more = max(1, round(1000 / split))
    weights, intercepts = fit_ar_nets(
        series[:split].float().expand(3, -1),
        [order] * len(arms),
        list(arms.values()),
        epochs=epochs * more,
        batch_size=16,
        learning_rate=3e-3,
        decay=0.98 ** (1 / more),
        seed=first,
    )

    def forecasts(fitted: Autoregression) -> np.ndarray:
        return one_step(fitted, series)[split - order :].numpy() * deviation + mean

    def error(fitted: Autoregression) -> float:
        return rmse(forecasts(fitted), values[split:])

    out = {"persistence": rmse(values[split - 1 : -1], values[split:])}
    closed = fit_ols_ar(series[:split], order)
    out["least squares"] = error(closed)
    for index, name in enumerate(arms):
        nets = [Autoregression(w[index].double(), c[index].double()) for w, c in zip(weights, intercepts, strict=True)]
        out[name] = float(np.mean([error(net) for net in nets]))
        out[f"{name}, spectral radius"] = max(spectral_radius(net.coefficients) for net in nets)
        if name == "AR-Net":
            squares = [np.square(forecasts(fitted) - values[split:]) for fitted in (nets[0], closed)]
            gap = squares[0] - squares[1]
            out["difference of mean squares"] = float(gap.mean())
            out["its standard error"] = float(gap.std(ddof=1) / len(gap) ** 0.5)
    return out


def _equality_row(dense: dict[str, list[float]]) -> Measured:
    difference, error = max(dense["difference"]), float(np.mean(dense["AR-Net"]))
    floor = float(np.mean(dense["least squares"]))
    return Measured(
        "equality",
        f"largest difference {difference:.4f}; MSE {error:.3f}",
        difference < 0.02 and error < 1.01 * floor,
        f"10 lags, all in use; the worst of {len(dense['difference'])} seeds, to be below 0.02; "
        f"least squares has MSE {floor:.3f}",
    )


def _sparse_row(sparse: dict[str, dict[str, list[list[float]]]]) -> Measured:
    means = {n: [float(np.mean(v)) for v in values] for n, values in sparse["stpe"].items()}
    spread = [float(np.std(v)) for v in sparse["stpe"]["AR-Net"]]
    errors = {n: float(np.mean(values[-1])) for n, values in sparse["mse"].items()}
    from_order = len(means["AR-Net"]) - len(_BARS) - 1  # the orders end with the bars and one more
    net, ols = means["AR-Net"][from_order:], means["least squares"][from_order:]
    return Measured(
        "sparse",
        "error " + " / ".join(f"{n:.1f} ± {s:.1f}" for n, s in zip(net, spread[from_order:], strict=True)),
        all(n <= 0.5 * o for n, o in zip(net[:-1], ols[:-1], strict=True)),
        f"at {', '.join(map(str, _BARS))} and 1000 lags; least squares {' / '.join(f'{o:.1f}' for o in ols)}; "
        f"must be at most half at {', '.join(map(str, _BARS))}. Held-out MSE at the most lags: "
        + ", ".join(f"{name} {value:.3f}" for name, value in errors.items()),
    )


def _small_row(small: dict[str, list[float]]) -> Measured:
    net, ols = np.array(small["AR-Net"]), np.array(small["least squares"])
    gain = ols - net
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    return Measured(
        "small",
        f"{net.mean():.1f} (least squares {ols.mean():.1f})",
        bool(gain.mean() > 2 * error),
        f"{len(net)} series; better by {gain.mean():.1f} ± {error:.1f} (standard error), a factor of "
        f"{ols.mean() / net.mean():.1f} where the paper's table has 5.7",
    )


def _time_rows(clock: dict[str, list[float]]) -> list[Measured]:
    def slope(name: str) -> float:
        return math.log2(clock[name][-1] / clock[name][-3]) / 2

    net, ols, small = slope("AR-Net, one epoch"), slope("least squares"), slope("AR-Net, batches of 128")
    last = ", ".join(f"{name} {seconds[-1]:.3g} s" for name, seconds in clock.items())
    return [
        Measured(
            "linear_time",
            f"slope {net:.2f}",
            0 <= net <= 1.2,
            f"log-log, over the last three orders, in batches of {_LARGE_BATCH:,}; to be 0–1.2. In batches of 128, as "
            f"trained, launching a step costs more than computing it, and the slope is {small:.2f}: "
            + " / ".join(f"{seconds:.3g}" for seconds in clock["AR-Net, batches of 128"])
            + " s against "
            + " / ".join(f"{seconds:.3g}" for seconds in clock["AR-Net, one epoch"])
            + " s",
        ),
        Measured(
            "quadratic_time",
            f"slope {ols:.2f}",
            ols >= 1.6,
            f"log-log, over the last three orders; to be at least 1.6. At the most lags: {last}. The paper does not "
            "mention Levinson's recursion, which solves the classical problem in O(N log N + p²)",
        ),
    ]


def _real_row(real: dict[str, dict[str, float]] | str) -> Measured:
    if isinstance(real, str):
        return Measured("real", "skipped", None, real)
    holds = all(
        error["AR-Net"] <= 1.02 * error["least squares"] and error["AR-Net"] < error["persistence"]
        for error in real.values()
    )
    texts = [
        f"{name}: " + ", ".join(f"{method} {value:.3g}" for method, value in errors.items())
        for name, errors in real.items()
    ]
    ours = "; ".join(f"{name} {errors['AR-Net']:.3g}" for name, errors in real.items())
    return Measured(
        "real",
        f"RMSE {ours}",
        holds,
        "30 lags, last fifth, CO₂ monthly and differenced over a year; to be within 2 % of least squares and below "
        "persistence. " + "; ".join(texts),
    )
