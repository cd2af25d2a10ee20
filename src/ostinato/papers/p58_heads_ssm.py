"""58: how many heads make an SSM: interaction rank, head count, and gradients over distance."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostinato.analysis.heads import (
    PositionalMultiHead,
    error_curve,
    fit_heads,
    heads_from_lags,
    lag_operators,
    linear_system,
    operator_of_lags,
    random_system,
)
from ostinato.analysis.interaction import (
    effective_rank,
    gradient_highway,
    interaction_operator,
    interaction_rank,
    singular_values,
)
from ostinato.mixers.attention import Attention
from ostinato.mixers.parts import ShortConvolution
from ostinato.mixers.registry import mixer
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series

claims = (
    Claim("formula", "a random linear system's rank is min(n, minimal polynomial, p·d)", theirs="8, 4, 3, 16, 1 and 1"),
    Claim("gap", "H heads never exceed rank H, whatever the input; state space layers do", theirs="theorem"),
    Claim("layers", "every layer's rank is the predicted one", theirs="predicted"),
    Claim("construction", "k heads with positional scores equal the system", theirs="exact"),
    Claim("necessary", "fewer than k heads never beat the bound, trained or with free scores", theirs="≥ 0.98 × bound"),
    Claim("reached", "trained positional heads reach the bound", theirs="≤ 1.1 × bound"),
    Claim("knee", "the error falls to zero exactly at H = k", theirs="< 1e-6 at k"),
    Claim("decay", "a stable system's gradient falls off as ρ^distance", theirs="slope log ρ within 2 %"),
    Claim(
        "highway", "attention with a matching key passes gradients over any distance", theirs="|slope| < 1e-3 a step"
    ),
    Claim(
        "random keys", "without a match attention's gradient falls off algebraically, about 1/n", theirs="exponent −1"
    ),
    Claim(
        "training", "attention learns to copy over distances at which a forgetting system does not", theirs="tendency"
    ),
)

SHAPES = [(8, 4, 4, 32, 8), (8, 2, 2, 32, 4), (8, 4, 4, 3, 3), (16, 4, 4, 64, 16), (6, 1, 1, 64, 1)]
"""States, d, p, n, and the rank that the formula gives."""
WIDTH, LENGTH = 8, 32


def experiment(run: Run) -> list[Measured]:
    """All four parts; float64 but for the training."""
    return [*_ranks(run), *_head_count(run), *_highways(run), _training(run)]


def _ranks(run: Run) -> list[Measured]:
    seeds = run.choose(smoke=[0], cpu=[0, 1, 2, 3, 4], gpu=list(range(10)))
    systems = run.part("ranks of systems", _system_ranks, seeds)
    layers = run.part("ranks of layers", _layer_ranks, seeds)
    run.sizes |= {"rank seeds": seeds, "layers' width and length": [WIDTH, LENGTH]}
    run.sizes |= {f"rank, {row['layer']}": f"{row['ranks']}, effective {row['effective']:.2f}" for row in layers}
    exact = all(rank == wanted for _, wanted, ranks in systems for rank in ranks)
    heads = [row for row in layers if row["heads"]]
    others = [row for row in layers if not row["heads"]]
    wrong = [row["layer"] for row in layers if any(rank != row["predicted"] for rank in row["ranks"])]
    least = min((row["smallest"], row["layer"]) for row in layers)
    return [
        Measured(
            "formula",
            "; ".join(f"{name}: {sorted(set(ranks))}" for name, _, ranks in systems),
            exact,
            f"(states, d, p, n), {len(seeds)} seeds each, threshold 1e-10 of the largest singular value",
        ),
        Measured(
            "gap",
            "; ".join(f"{row['layer']} {max(row['ranks'])}" for row in heads + others),
            all(rank <= row["heads"] for row in heads for rank in row["ranks"])
            and all(rank > 4 for row in others if row["system"] for rank in row["ranks"]),
            f"width {WIDTH}, n = {LENGTH}, gates frozen at the input; state space layers exceed 4 heads",
        ),
        Measured(
            "layers",
            f"{len(layers) - len(wrong)} of {len(layers)} as predicted"
            + (f"; not {', '.join(wrong)}" if wrong else ""),
            not wrong,
            "predicted: heads for attention; d for independent systems per channel (S4D) and min(n, states + 1, d²) "
            "for S5 (the skip adds one); for Mamba and Mamba-2 the inner width 2d, since values pass through a gate "
            "per channel; 4 for the convolution. Smallest counted singular value over the largest: "
            f"{least[0]:.1e} ({least[1]})",
        ),
    ]


def _system_ranks(seeds: list[int]) -> list[Any]:
    rows: list[Any] = []
    for states, d, p, n, wanted in SHAPES:
        lags = [lag_operators(*random_system(states, d, p, seed=seed), None, n) for seed in seeds]
        rows.append((f"{(states, d, p, n)}", wanted, [interaction_rank(k) for k in lags]))
    scalar = [random_system(8, 4, 4, seed=seed) for seed in seeds]
    lags = [lag_operators(0.9 * torch.eye(8, dtype=b.dtype), b, c, None, 32) for _, b, c in scalar]
    return [*rows, ("A = 0.9 I", 1, [interaction_rank(k) for k in lags])]


def _layer_ranks(seeds: list[int]) -> list[dict[str, Any]]:
    # Steps wide enough that the lag operators differ within the length; the defaults suit thousands of steps.
    steps = {"step_min": 0.2, "step_max": 2.0}
    plan: list[tuple[str, dict[str, Any], int, int]] = [
        ("s4d", {"output": "none", "d_state": 8, **steps}, WIDTH, 0),
        ("s5", {"gated": False, "d_state": 8, "blocks": 1, **steps}, 9, 0),
        ("mamba", {}, 2 * WIDTH, 0),
        ("mamba2", {"state_dim": 8}, 2 * WIDTH, 0),
        *[("linear_attention", {"heads": h}, h, h) for h in (1, 2, 4)],
        *[("attention", {"heads": h}, h, h) for h in (1, 2, 4)],
        ("convolution", {}, 4, 0),
    ]
    rows = []
    for name, options, predicted, heads in plan:
        ranks, effective, smallest = [], [], []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
                layer: Any
                if name == "convolution":
                    convolution = ShortConvolution(WIDTH, 4).double()
                    empty = convolution.initial_state(WIDTH)
                    layer = lambda u, f=convolution, e=empty: f(u, e[:1].expand(len(u), -1, -1), None)  # noqa: E731
                else:
                    layer = mixer(name, WIDTH, **options).double()
            operator = interaction_operator(layer, x)
            ranks.append(interaction_rank(operator))
            effective.append(effective_rank(operator))
            values = singular_values(operator)
            smallest.append(float(values[ranks[-1] - 1] / values[0]))
        label = f"{name} ({heads} heads)" if heads else name
        rows.append(
            {"layer": label, "ranks": ranks, "predicted": predicted, "heads": heads, "smallest": min(smallest)}
            | {"effective": sum(effective) / len(effective), "system": name in ("s4d", "s5", "mamba", "mamba2")}
        )
    return rows


def _head_count(run: Run) -> list[Measured]:
    sizes, seeds = (
        run.choose(smoke=[2], cpu=[2, 4, 8], gpu=[2, 4, 8]),
        run.choose(smoke=[0], cpu=[0, 1, 2], gpu=[0, 1, 2]),
    )
    n, restarts, sequences = run.choose(smoke=8, cpu=32, gpu=32), run.choose(smoke=1, cpu=3, gpu=3), 512
    run.sizes |= {"head count: states": sizes, "head count: n": n, "head count: sequences": sequences}
    run.sizes |= {"head count: systems of each size": len(seeds), "head count: restarts": restarts, "d = p": 4}
    found = [
        run.part(f"heads-{states}-{seed}", _errors_by_heads, states, seed, n, sequences, restarts)
        for states in sizes
        for seed in seeds
    ]
    shown = [curve for curve in found if curve["seed"] == seeds[0]]
    run.figure(
        "Error of H heads against a state space model of k states",
        [
            Series(f"k = {curve['states']}: {what}", curve["heads"], [max(e, 1e-18) for e in curve[key]])
            for curve in shown
            for what, key in (("bound", "bound"), ("trained", "trained"))
        ],
        x_label="heads H",
        y_label="relative mean squared error",
        log_y=True,
    )
    fewer = [(c, i) for c in found for i, h in enumerate(c["heads"]) if h < c["states"]]
    positional = [c["trained"][i] / c["bound"][i] for c, i in fewer]
    free = [c["free"][i] / c["bound"][i] for c, i in fewer]
    at = {key: max(c[key][c["states"] - 1] for c in found) for key in ("closed", "trained", "free")}
    before = min(c["trained"][c["states"] - 2] for c in found)
    exact = [_first(c["heads"], c["trained"]) - c["states"] for c in found]
    told = f"{len(found)} systems, k = {sizes}, d = p = 4, n = {n}"
    return [
        Measured("construction", f"error {at['closed']:.1e} at H = k", at["closed"] < 1e-18, told),
        Measured(
            "necessary",
            f"least {min(positional):.4f} × bound (positional), {min(free):.4f} × bound (free scores)",
            min(positional + free) >= 0.98,
            f"{told}, best of {restarts} starts, trained by alternating least squares on {sequences} white-noise "
            "sequences; error under white inputs, computed exactly",
        ),
        Measured("reached", f"at most {max(positional):.3f} × bound", max(positional) <= 1.1, told),
        Measured(
            "knee",
            f"at most {at['trained']:.1e} (positional), {at['free']:.1e} (free scores) at H = k",
            max(at["trained"], at["free"]) < 1e-6 and not any(exact),
            f"the first H with an error below 1e-15 is k in {exact.count(0)} of {len(exact)} systems; the least error "
            f"at k − 1 is {before:.1e}, so a threshold of 1e-6 alone need not show the knee",
        ),
    ]


def _first(heads: list[int], errors: list[float]) -> int:
    """The first number of heads with no error left, or 0."""
    return next((h for h, error in zip(heads, errors, strict=True) if error < 1e-15), 0)


def _errors_by_heads(states: int, seed: int, n: int, sequences: int, restarts: int) -> dict[str, Any]:
    lags = lag_operators(*random_system(states, 4, 4, seed=seed), None, n)
    target, bound = operator_of_lags(lags), error_curve(lags)
    row: dict[str, Any] = {"states": states, "seed": seed, "heads": list(range(1, states + 3))}
    row["bound"] = [float(bound[h]) for h in row["heads"]]
    row["closed"], row["trained"], row["free"] = [], [], []
    for h in row["heads"]:
        with torch.no_grad():
            built = PositionalMultiHead(*heads_from_lags(lags, min(h, n))).operator()
        row["closed"].append(float((built - target).square().sum() / target.square().sum()))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the systems are small: more threads wait for each other longer than they work
        try:
            for key, free in (("trained", False), ("free", True)):
                seeds = [100 * seed + restart for restart in range(restarts)]
                row[key].append(min(fit_heads(lags, h, free=free, sequences=sequences, seed=s)[1] for s in seeds))
        finally:
            torch.set_num_threads(threads)
    return row


def _highways(run: Run) -> list[Measured]:
    lengths = run.choose(smoke=[16, 32, 64], cpu=[16, 32, 64, 128, 256, 512], gpu=[16, 32, 64, 128, 256, 512, 1024])
    seeds = run.choose(smoke=[0], cpu=[0, 1, 2], gpu=[0, 1, 2])
    run.sizes |= {"highway distances": lengths, "highway seeds": seeds}
    found = run.part("highways", _gradients, lengths, seeds)
    run.figure(
        "Norm of the gradient of the last output by the first input",
        [Series(name, lengths, line) for name, line in found["lines"].items()],
        x_label="context length n (distance n − 1)",
        y_label="‖∂y/∂x‖",
        log_x=True,
        log_y=True,
    )
    slopes = found["slopes"]
    off = {rho: max(abs(s / math.log(float(rho)) - 1) for s in values) for rho, values in slopes["system"].items()}
    marked = {key: max(map(abs, slopes[key])) for key in ("marked, values", "marked, full")}
    within = max(map(abs, slopes["marked, within"]))
    exponents = slopes["random"]
    return [
        Measured(
            "decay",
            "; ".join(f"ρ = {rho}: off by at most {error:.3%}" for rho, error in off.items()),
            max(off.values()) <= 0.02,
            f"slope of log J over the upper half of the distances up to {lengths[-1]}, {len(seeds)} systems each",
        ),
        Measured(
            "highway",
            f"{marked['marked, values']:.1e} (values), {marked['marked, full']:.1e} (full Jacobian)",
            max(marked.values()) < 1e-3,
            f"steepest of {len(seeds)} seeds over contexts of {lengths[0]} to {lengths[-1]}, logit gap 2 log n; "
            f"within one context of {lengths[-1]} (gap fixed): {within:.1e}",
        ),
        Measured(
            "random keys",
            ", ".join(f"{e:.3f}" for e in exponents),
            all(abs(e + 1) < 0.2 for e in exponents) if len(lengths) > 3 else None,
            "exponent of J (values), mean of 8 sequences, against the context length; asked for: −1 ± 0.2",
        ),
    ]


def _gradients(lengths: list[int], seeds: list[int]) -> dict[str, Any]:
    lines: dict[str, list[float]] = {}
    slopes: dict[str, Any] = {
        "system": {},
        "marked, values": [],
        "marked, full": [],
        "marked, within": [],
        "random": [],
    }
    longest, width = lengths[-1], 8
    for rho in (0.9, 0.99):
        slopes["system"][str(rho)] = []
        for seed in seeds:
            system = random_system(8, 4, 4, seed=seed, radius=rho)
            distances = list(range(longest))
            x = torch.randn(longest, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            reach = gradient_highway(linear_system(*system), x, distances)
            upper = slice(longest // 2, longest)
            slopes["system"][str(rho)].append(_slope(torch.tensor(distances[upper]).double(), reach[upper].log()))
            if seed == seeds[0]:
                lines[f"state space model, ρ = {rho}"] = [float(reach[n - 1]) for n in lengths]
    context = torch.tensor(lengths, dtype=torch.float64)
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 + seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = Attention(width, heads=1, rope=False).double()
        noise = 0.1 * torch.randn(longest, width, generator=generator, dtype=torch.float64)
        random_query, random_key = layer.to_query.weight.detach().clone(), layer.to_key.weight.detach().clone()
        measured: dict[str, list[float]] = {"values": [], "full": [], "random": []}
        for n in lengths:
            x = noise[:n].clone()
            x[:, 0], x[:, 1] = 0.0, 1.0
            x[0, 0] = 1.0
            _match(layer, 2 * math.log(n) * math.sqrt(width))
            for key, frozen in (("values", True), ("full", False)):
                measured[key].append(float(gradient_highway(layer, x, [n - 1], frozen=frozen)[0]))
            if n == longest:
                within = torch.stack([gradient_highway(layer, x, [m - 1], at=m - 1, frozen=True)[0] for m in lengths])
                slopes["marked, within"].append(_slope(context, within.log()))
            with torch.no_grad():
                layer.to_query.weight.copy_(random_query)
                layer.to_key.weight.copy_(random_key)
            plain = torch.randn(8, n, width, generator=generator, dtype=torch.float64)
            reached = [float(gradient_highway(layer, x, [n - 1], frozen=True)[0]) for x in plain]
            measured["random"].append(sum(reached) / len(reached))
        slopes["marked, values"].append(_slope(context, torch.tensor(measured["values"]).log()))
        slopes["marked, full"].append(_slope(context, torch.tensor(measured["full"]).log()))
        slopes["random"].append(_slope(context.log(), torch.tensor(measured["random"]).log()))
        if seed == seeds[0]:
            lines["attention, marked key, values"] = measured["values"]
            lines["attention, marked key, full"] = measured["full"]
            lines["attention, random keys"] = measured["random"]
    return {"lines": lines, "slopes": slopes}


@torch.no_grad()
def _match(layer: Attention, gain: float) -> None:
    """Queries read the constant channel 1, keys the marker in channel 0; their product is gain for the marked key."""
    layer.to_query.weight.zero_()
    layer.to_key.weight.zero_()
    layer.to_query.weight[0, 1] = gain
    layer.to_key.weight[0, 0] = 1.0


def _slope(x: Tensor, y: Tensor) -> float:
    x = x.double() - x.double().mean()
    return float((x * y.double()).sum() / x.square().sum())


class _Copier(nn.Module):
    """An embedding, one layer, and a readout of the last step."""

    def __init__(self, layer: nn.Module, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(vocabulary + 1, width), layer
        self.read = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the first symbol."""
        return self.read(self.layer(self.embed(tokens))[0][:, -1])


def _training(run: Run) -> Measured:
    lengths = run.choose(smoke=[8], cpu=[32, 128, 512], gpu=[32, 128, 512])
    steps, seeds = run.choose(smoke=20, cpu=300, gpu=2000), run.choose(smoke=[0], cpu=[0, 1, 2], gpu=[0, 1, 2, 3, 4])
    run.sizes |= {"copy: blanks": lengths, "copy: steps at most": steps, "copy: seeds": seeds, "copy: width": 32}
    arms = ("attention", "modulus 0.9", "modulus near 1")
    found = {
        arm: [run.part(f"copy-{arm}-{length}", _steps_to_copy, arm, length, steps, seeds) for length in lengths]
        for arm in arms
    }
    run.figure(
        "Steps until the first symbol is copied over L blanks (median; the cap is not reached)",
        [Series(arm, lengths, [sorted(line)[len(line) // 2] for line in lines]) for arm, lines in found.items()],
        x_label="blanks L",
        y_label="steps to 95 %",
        log_x=True,
        levels={"cap": float(steps)},
    )
    told = "; ".join(
        f"{arm}: " + ", ".join(f"{sorted(line)[len(line) // 2]}" for line in lines) for arm, lines in found.items()
    )
    longest = {arm: sorted(lines[-1])[len(seeds) // 2] for arm, lines in found.items()}
    holds = longest["attention"] < steps and longest["modulus 0.9"] >= steps
    return Measured(
        "training",
        told,
        holds if run.budget != "smoke" else None,
        f"median steps of {len(seeds)} seeds to 95 % at L = {lengths} ({steps}: not within the cap); chance is 12.5 %; "
        "Adam, rate 3e-3, all 8 sequences a step. Asked for: attention below the cap at the longest, modulus 0.9 not",
    )


def _steps_to_copy(arm: str, blanks: int, steps: int, seeds: list[int]) -> list[int]:
    """For each seed the first step from which the last ten were all right; the cap if there is none."""
    vocabulary, width = 8, 32
    tokens = torch.full((vocabulary, blanks + 1), vocabulary)
    tokens[:, 0] = torch.arange(vocabulary)
    results = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if arm == "attention":
                layer = mixer("attention", width, heads=1, rope=False)
            else:
                low, high = (0.899, 0.901) if arm == "modulus 0.9" else (0.999, 0.99999)
                layer = mixer("lru", width, r_min=low, r_max=high)
            model = _Copier(layer, vocabulary, width)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        right, answer = 0, steps
        for step in range(steps):
            logits = model(tokens)
            right = right + 1 if (logits.argmax(-1) == tokens[:, 0]).float().mean() >= 0.95 else 0
            if right == 10:
                answer = step - 9
                break
            optimizer.zero_grad()
            F.cross_entropy(logits, tokens[:, 0]).backward()
            optimizer.step()
        results.append(answer)
    return results
