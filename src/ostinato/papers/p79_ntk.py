"""79: the neural tangent kernel: it converges with width, stays nearly fixed, and predicts training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ostinato.errors import DataError
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.digits import read_digits
from ostinato.theory.empirical_kernel import empirical_ntk
from ostinato.theory.kernel_dynamics import decay_rates, ntk_gp
from ostinato.theory.kernels import Dense, Erf, Layer, Recurrent, Relu, ntk
from ostinato.theory.wide_networks import Draws, WideNetwork, descend, draw_networks, run_networks

claims = (
    Claim(
        "constant", "the recursion's value, two hidden ReLU layers, one radian apart", theirs="0.20322, diagonal 0.4025"
    ),
    Claim("concentrates", "the kernel at the start concentrates as n^(−1/2)", theirs="exponent in [−0.6, −0.4]"),
    Claim("fixed", "its drift in training falls at least as fast as n^(−1/2)", theirs="O(n^(−1/2))"),
    Claim("no faster", "and no faster: the bound is the rate", theirs="exponent in [−0.6, −0.4] (expected)"),
    Claim("stays", "at large width it hardly moves in training", theirs="tight at n = 10,000"),
    Claim(
        "distribution",
        "trained networks' percentiles are those of the kernel's Gaussian",
        theirs="n = 50 close, 1,000 better",
    ),
    Claim("decay", "the error along each kernel component decays at its own rate, ηλ", theirs="within 15 %"),
    Claim("wider", "wider networks follow the rates better", theirs="n = 100, 1,000, 10,000"),
    Claim(
        "recurrent",
        "a recurrent network's kernel is a scan over time (derived, not in the paper)",
        theirs="within 3 standard errors",
    ),
)

BETA = 0.1
HIGH, MIDDLE, LOW = 0.9, 0.5, 0.1


def experiment(run: Run) -> list[Measured]:
    """All parts; networks of one width are drawn, trained and measured as one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [_constant()]
    rows += _convergence(run, device)
    rows.append(_distribution(run, device))
    rows += _decay(run, device)
    rows.append(_recurrent(run, device))
    return rows


def _perceptron(hidden: int) -> tuple[Layer, ...]:
    pairs = [layer for _ in range(hidden) for layer in (Dense(bias=BETA), Relu())]
    return (*pairs, Dense(bias=BETA))


def _circle(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _slope(x: list[float], y: list[float]) -> float:
    """Of log y against log x, by least squares."""
    a, b = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / (a * a).sum())


def _constant() -> Measured:
    theta = ntk(_perceptron(2), _circle(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    cross, own = float(theta[0, 1]), float(theta[0, 0])
    holds = abs(cross - 0.20322) < 5e-6 and abs(own - 0.4025) < 5e-7
    return Measured("constant", f"{cross:.5f}, diagonal {own:.4f}", holds)


def _convergence(run: Run, device: str) -> list[Measured]:
    widths = run.choose(smoke=[25, 100], cpu=[50, 100, 200, 400, 800], gpu=[50, 200, 800, 3200])
    draws, steps = run.choose(smoke=8, cpu=20, gpu=20), run.choose(smoke=10, cpu=200, gpu=200)
    run.sizes |= {"kernel widths": widths, "kernel draws": draws, "kernel steps": steps, "kernel hidden layers": 3}
    found = [run.part(f"kernel-{n}", _kernels_of, n, draws, steps, run.seed, device) for n in widths]
    spread, drift = [f["spread"] for f in found], [f["drift"] for f in found]
    floor = 1 / math.sqrt(2 * (draws - 1))
    run.figure(
        "Kernel of 4-layer ReLU networks: spread over draws and drift in training",
        [
            Series("relative standard deviation", widths, spread),
            Series("relative change in training", widths, drift),
            Series("n^(−1/2)", widths, [spread[0] * (widths[0] / n) ** 0.5 for n in widths]),
            Series("n^(−1)", widths, [drift[0] * widths[0] / n for n in widths]),
        ],
        x_label="width n",
        y_label="relative to the kernel",
        log_x=True,
        log_y=True,
    )
    wide = found[-1]
    run.figure(
        f"Kernel with (1, 0) along the circle, n = {widths[-1]}: two draws, and the limit",
        [Series("infinite width", wide["angles"], wide["limit"])]
        + [Series(f"draw {i + 1}, before", wide["angles"], line) for i, line in enumerate(wide["before"])]
        + [Series(f"draw {i + 1}, after", wide["angles"], line) for i, line in enumerate(wide["after"])],
        x_label="angle",
        y_label="kernel",
    )
    exponents = _slope(widths, spread), _slope(widths, drift)
    tell = run.budget != "smoke"
    listed = [", ".join(f"{v:.3g} at {n}" for n, v in zip(widths, values, strict=True)) for values in (spread, drift)]
    return [
        Measured(
            "concentrates",
            f"{exponents[0]:.2f}",
            -0.6 <= exponents[0] <= -0.4 if tell else None,
            f"{listed[0]}; a standard deviation over {draws} draws is known to {floor:.0%}",
        ),
        Measured(
            "fixed",
            f"exponent {exponents[1]:.2f}",
            exponents[1] <= -0.4 if tell else None,
            f"{listed[1]}; mean over {draws} draws of the norm of the change over the norm. The paper proves an upper "
            "bound, which a steeper exponent satisfies; asked for: at most −0.4",
        ),
        Measured(
            "no faster",
            f"exponent {exponents[1]:.2f}",
            -0.6 <= exponents[1] <= -0.4 if tell else None,
            "the paper does not say that its bound is reached; later analyses of wide networks under squared loss find "
            "a drift of order 1/n, which is what is seen here",
        ),
        Measured(
            "stays",
            f"moved by {drift[-1]:.2%} at n = {widths[-1]}, {drift[0]:.1%} at {widths[0]}",
            drift[-1] < 0.05 if tell else None,
            f"{steps} steps at rate 1 on x₁x₂; asked for: less than 5 %",
        ),
    ]


def _kernels_of(width: int, draws: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    spec, angles = _perceptron(3), torch.linspace(-math.pi, math.pi, 65)[:-1]
    x = _circle(angles).to(device)
    start = torch.tensor([[1.0, 0.0]], device=device)
    before, after = [], []
    # As many draws at once as a gigabyte or so holds.
    together = max(1, min(draws, 80_000_000 // (2 * width * width)))
    for first in range(0, draws, together):
        count = min(together, draws - first)
        network, drawn = draw_networks(spec, 2, width, count, seed=1000 * seed + width + first, device=device)
        before.append(_columns(network, drawn, x, start))
        after.append(_columns(network, descend(network, drawn, x, x[:, 0] * x[:, 1], rate=1.0, steps=steps), x, start))
    one, other = torch.cat(before).double().cpu(), torch.cat(after).double().cpu()
    limit = ntk(spec, x.cpu(), start.cpu())[:, 0]
    return {
        "spread": float((one.std(0) / limit).square().mean().sqrt()),
        "drift": float(((other - one).norm(dim=1) / one.norm(dim=1)).mean()),
        "bias": float((one.mean(0) / limit - 1).abs().mean()),
        "angles": angles.tolist(),
        "limit": limit.tolist(),
        "before": one[:2].tolist(),
        "after": other[:2].tolist(),
    }


def _columns(network: WideNetwork, draws: Draws, x: Tensor, point: Tensor) -> Tensor:
    """Θ(x, point) of every draw, (draws, inputs)."""
    return vmap(lambda p: empirical_ntk(network, x, point, parameters=p))(draws)[..., 0, 0, 0]


def _distribution(run: Run, device: str) -> Measured:
    plan = run.choose(smoke=[(50, 40)], cpu=[(50, 1000), (300, 150)], gpu=[(50, 4000), (1000, 1000)])
    steps = run.choose(smoke=20, cpu=300, gpu=1000)
    run.sizes |= {"percentiles, (width, networks)": plan, "percentiles steps": steps, "percentiles hidden layers": 3}
    found = [run.part(f"percentiles-{n}", _percentiles, n, count, steps, run.seed, device) for n, count in plan]
    last = found[-1]
    names = ("10th", "50th", "90th")
    run.figure(
        f"Trained networks (n = {plan[-1][0]}) and the kernel's Gaussian",
        [Series(f"{name} percentile, networks", last["angles"], last["measured"][i]) for i, name in enumerate(names)]
        + [Series(f"{name} percentile, kernel", last["angles"], last["predicted"][i]) for i, name in enumerate(names)],
        x_label="angle",
        y_label="output",
    )
    told = "; ".join(
        f"n = {n}: {f['distance']:.3f} (floor of {count} draws {f['floor']:.3f})"
        for (n, count), f in zip(plan, found, strict=True)
    )
    return Measured(
        "distribution",
        told,
        last["distance"] <= 0.1 if run.budget != "smoke" else None,
        "root mean square difference of the 10th, 50th and 90th percentiles along the circle, in units of the prior's "
        f"standard deviation; asked for: ≤ 0.1 at n = {plan[-1][0]}. 50 networks would measure their own sampling, so "
        "there are more; the floor is what as many draws of the Gaussian itself give",
    )


def _percentiles(width: int, networks: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    spec = _perceptron(3)
    x = _circle(torch.tensor([-2.4, -0.9, 0.5, 1.7])).to(device)
    y = x[:, 0] * x[:, 1]
    angles = torch.linspace(-math.pi, math.pi, 49)
    grid = _circle(angles).to(device)
    outputs = []
    together = max(1, min(networks, 80_000_000 // (2 * width * width)))
    for first in range(0, networks, together):
        count = min(together, networks - first)
        network, drawn = draw_networks(spec, 2, width, count, seed=7777 + 1000 * seed + width + first, device=device)
        drawn = descend(network, drawn, x, y, rate=1.0, steps=steps)
        outputs.append(run_networks(network, drawn, grid)[..., 0].double().cpu())
    levels = torch.tensor([LOW, MIDDLE, HIGH], dtype=torch.float64)
    measured = torch.quantile(torch.cat(outputs), levels, dim=0)
    limit = ntk_gp(spec, x.cpu(), y.cpu(), grid.cpu(), lr=1 / len(x), t=steps, discrete=True)
    normal = torch.special.ndtri(levels).unsqueeze(1)
    deviation = limit.covariance.diag().clamp(min=0).sqrt()
    predicted = limit.mean + normal * deviation
    prior = ntk_gp(spec, x.cpu(), y.cpu(), grid.cpu(), t=0.0).covariance.diag().sqrt()
    # What the same number of draws of the Gaussian itself would show.
    values, vectors = torch.linalg.eigh(limit.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(20, networks, len(grid), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn_percentiles = torch.quantile(noise @ root.mT + limit.mean, levels, dim=1).transpose(0, 1)
    return {
        "distance": float(((measured - predicted) / prior).square().mean().sqrt()),
        "floor": float(((drawn_percentiles - predicted) / prior).square().mean().sqrt()),
        "angles": angles.tolist(),
        "measured": measured.tolist(),
        "predicted": predicted.tolist(),
    }


def _decay(run: Run, device: str) -> list[Measured]:
    widths = run.choose(smoke=[64, 256], cpu=[256, 1024, 4096], gpu=[100, 1000, 4096, 10000])
    points, steps = run.choose(smoke=64, cpu=256, gpu=256), run.choose(smoke=30, cpu=120, gpu=300)
    source, x, y = _digits(points, run.seed)
    run.sizes |= {"decay widths": widths, "decay points": points, "decay steps": steps, "decay data": source}
    found = [run.part(f"decay-{n}", _rates, n, x, y, steps, run.seed, device) for n in widths]
    last = found[-1]
    run.figure(
        f"Error along the kernel's first components ({source}), n = {widths[-1]}",
        [_decaying(f"component {i + 1}", line) for i, line in enumerate(last["errors"])]
        + [_decaying(f"kernel's rate {i + 1}", line) for i, line in enumerate(last["predicted"])],
        x_label="step",
        y_label="|component of the error|",
        log_y=True,
    )
    worst = [max(abs(ratio - 1) for ratio in f["ratios"]) for f in found]
    tell = run.budget != "smoke"
    return [
        Measured(
            "decay",
            ", ".join(f"{ratio:.3f}" for ratio in last["ratios"]),
            worst[-1] <= 0.15 if tell else None,
            f"measured rate over −log(1 − ηλ/N), components 1–5, {source}, n = {widths[-1]}",
        ),
        Measured(
            "wider",
            ", ".join(f"{w:.1%} at {n}" for n, w in zip(widths, worst, strict=True)),
            worst[-1] < worst[0] if tell else None,
            "the worst of five rates' relative errors; one draw of each width",
        ),
    ]


def _decaying(label: str, line: list[float]) -> Series:
    """A line down to a hundredth of its start."""
    until = next((step for step, value in enumerate(line) if value < 0.01 * line[0]), len(line))
    return Series(label, range(until), line[:until])


def _rates(width: int, x: list[list[float]], y: list[float], steps: int, seed: int, device: str) -> dict[str, Any]:
    spec = _perceptron(2)
    inputs, targets = torch.tensor(x, device=device), torch.tensor(y, device=device)
    theta = ntk(spec, inputs.cpu()) / len(inputs)
    rate = 0.5 / float(torch.linalg.eigvalsh(theta)[-1])
    rates, vectors = decay_rates(theta, rate, discrete=True)
    seen: list[Tensor] = []

    def watch(step: int, outputs: Tensor) -> None:
        seen.append((outputs[0] - targets).double().cpu())

    network, drawn = draw_networks(spec, inputs.shape[1], width, 1, seed=99 + seed, device=device)
    descend(network, drawn, inputs, targets, rate=rate, steps=steps, watch=watch)
    errors = torch.stack(seen) @ vectors[:, :5]
    ratios = []
    for i in range(5):
        line = errors[:, i].abs()
        # Until a tenth is left, where what other components leak in does not count yet.
        low = int((line > 0.1 * line[0]).long().cumprod(0).sum())
        until = max(2, min(low + 1, len(line)))
        times = torch.arange(until, dtype=torch.float64)
        times = times - times.mean()
        ratios.append(float(-(times * line[:until].log()).sum() / times.square().sum() / rates[i]))
    predicted = errors[0].abs() * torch.exp(-rates[:5] * torch.arange(steps + 1).unsqueeze(1))
    return {"ratios": ratios, "errors": errors.abs().mT.tolist(), "predicted": predicted.mT.tolist(), "rate": rate}


def _digits(points: int, seed: int) -> tuple[str, list[list[float]], list[float]]:
    """Images of 64 pixels with norm √64, and the parity of the digit as ±1; generated ones without scikit-learn."""
    generator = torch.Generator().manual_seed(seed)
    try:
        pixels, digits = (torch.from_numpy(part).float() for part in read_digits())
        chosen = torch.randperm(len(digits), generator=generator)[:points]
        source, pixels, digits = "scikit-learn's digits", pixels[chosen], digits[chosen]
    except DataError:
        source = "generated prototypes with noise (scikit-learn is not installed)"
        prototypes = torch.rand(10, 64, generator=generator) * 16
        digits = torch.randint(10, (points,), generator=generator).float()
        pixels = prototypes[digits.long()] + 3 * torch.randn(points, 64, generator=generator)
    pixels = 8 * torch.nn.functional.normalize(pixels, dim=1)
    return source, pixels.tolist(), (1 - 2 * (digits % 2)).tolist()


def _recurrent(run: Run, device: str) -> Measured:
    width, draws = run.choose(smoke=100, cpu=800, gpu=1600), run.choose(smoke=10, cpu=60, gpu=400)
    run.sizes |= {"recurrent width": width, "recurrent draws": draws, "recurrent length": 6}
    found = run.part("recurrent", _recurrent_kernel, width, draws, run.seed, device)
    off = max(abs(m - t) / e for t, m, e in zip(found["limit"], found["mean"], found["error"], strict=True))
    told = "; ".join(
        f"{t:.4f} against {m:.4f} ± {e:.4f}"
        for t, m, e in zip(found["limit"], found["mean"], found["error"], strict=True)
    )
    return Measured(
        "recurrent",
        told,
        off < 3 if run.budget != "smoke" else None,
        f"own, cross and own kernel value of two random sequences of length 6, erf units, n = {width}, mean ± standard "
        f"error over {draws} draws; the furthest is off by {off:.1f} errors, asked for: < 3 (three values)",
    )


def _recurrent_kernel(width: int, draws: int, seed: int, device: str) -> dict[str, list[float]]:
    spec = (Recurrent(Erf(), weight=1.0, inputs=1.0, bias=BETA), Dense())
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed)).to(device)
    kernels = []
    together = 10
    for first in range(0, draws, together):
        count = min(together, draws - first)
        network, drawn = draw_networks(spec, 4, width, count, seed=31 + 1000 * seed + first, device=device)
        kernels.append(vmap(lambda p, network=network: empirical_ntk(network, x, parameters=p))(drawn)[..., 0, 0].cpu())
    found, limit = torch.cat(kernels).double(), ntk(spec, x.cpu())
    places = [(0, 0), (0, 1), (1, 1)]
    return {
        "limit": [float(limit[i, j]) for i, j in places],
        "mean": [float(found[:, i, j].mean()) for i, j in places],
        "error": [float(found[:, i, j].std()) / draws**0.5 for i, j in places],
    }
