"""60 SelectivBench: which recurrences follow a random grammar past gaps, noise and wrong symbols (arXiv 2601.12598).

A smaller grammar, network and training than the paper's (`Sizes` has them; the result lists them): the gpu budget has
the smallest that is still a fair comparison, the cpu budget a third of its sequences, at less than half their length.
Every seed draws its own grammar, weights and sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from ostinato.mixers.registry import mixer_class
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series

claims = (
    Claim(
        "gates",
        "gates that forget help recall: on T1 every model with data-dependent decay is ≥ 0.1 above linear attention",
        theirs="direction only (abstract; no score could be read)",
    ),
    Claim("gates_t2", "the same past distractors and noise, on T2", theirs="direction only (abstract)"),
    Claim(
        "selectivity",
        "mixing channels of the state is not needed for selectivity: on T2 and on T3 the best linear recurrence "
        "without it is within 0.05 of the best of the delta family",
        theirs="direction only (abstract)",
    ),
    Claim(
        "generalization",
        "mixing is what generalises: from T2 to the longest gap of T4 the median drop without mixing exceeds that of "
        "the delta family",
        theirs="direction only (abstract)",
    ),
    Claim("attention", "softmax attention stays best, on T1, T2 and T3", theirs="direction only (abstract)"),
    Claim("rankings", "rankings agree with those of large language models", theirs="direction only (abstract)"),
)

PLANS = {
    "gru": "gru",
    "linear_attention": "linear_attention",
    "retnet": "retnet",
    "gla": "gla",
    "mamba2": "mamba2",
    "delta_net": "delta_net",
    "gated_delta_net": "gated_delta_net",
    "gated_delta_product": "gated_delta_product(householders=2)",
    "attention": "attention(qk_norm=True)",
}


class Sizes(NamedTuple):
    """What a budget can pay for."""

    letters: int
    length: int
    d_model: int
    depth: int
    steps: int
    batch_size: int
    longest_gap: int
    tested_gaps: tuple[int, ...]
    test_size: int
    seeds: int
    warmup: int
    learning_rate: float
    arms: dict[str, tuple[str, ...]]
    """The models that each variant is trained with."""


# What is left out: on the long T2, Gated DeltaProduct, whose two writes a step cost twice, and the GRU, which goes step
# by step. T3 is for the models that can do T1.
_T2 = ("linear_attention", "retnet", "gla", "mamba2", "delta_net", "gated_delta_net", "attention")
_T3 = ("gla", "mamba2", "delta_net", "gated_delta_net", "attention")

SMOKE = Sizes(4, 8, 16, 1, 3, 4, 2, (2, 4), 4, 2, 1, 2e-3, {"T1": tuple(PLANS), "T2": _T2, "T3": _T3})
CPU = Sizes(8, 24, 64, 2, 110, 32, 5, (5, 10, 20, 50), 32, 3, 30, 2e-3, {"T1": tuple(PLANS), "T2": _T2, "T3": _T3})
GPU = Sizes(8, 60, 64, 2, 188, 64, 5, (5, 10, 20, 50), 128, 3, 50, 2e-3, {"T1": tuple(PLANS), "T2": _T2, "T3": _T3})

Scores = dict[str, float]
"""Accuracy by test: "trained", "gap 5", …"""
Found = dict[str, dict[str, list[Scores]]]
"""Scores of every seed, by variant and arm."""


def experiment(run: Run) -> list[Measured]:
    """Train every model on T1, T2 and T3; test those of T2 at the fixed gaps of T4."""
    sizes: Sizes = run.choose(smoke=SMOKE, cpu=CPU, gpu=GPU)
    floors = run.part("floors", _floors, sizes, run.seed)
    found: Found = {}
    for variant, arms in sizes.arms.items():
        found[variant] = {
            arm: [
                run.part(f"{variant}-{arm}-{seed}", _train, sizes, variant, arm, seed)
                for seed in range(run.seed, run.seed + sizes.seeds)
            ]
            for arm in arms
        }
    run.sizes.update(_described(sizes, floors))
    _draw(run, sizes, found, floors)
    rows = [_holds_only_beyond_smoke(run, row) for row in _judge(sizes, found, floors)]
    return [*rows, Measured("rankings", "not measured", None, "needs the same models as language models of many sizes")]


def _task(sizes: Sizes, variant: str, seed: int, **options: Any) -> Any:
    import ostinato

    gap = (1, sizes.longest_gap) if variant in ("T2", "T4") else None
    return ostinato.task(
        "selectivbench",
        variant=variant,
        letters=sizes.letters,
        length=sizes.length,
        gap=gap,
        test_size=sizes.test_size,
        grammar_seed=seed,
        seed=seed,
        **options,
    )


def _train(sizes: Sizes, variant: str, arm: str, seed: int) -> Scores:
    """Accuracy on the variant's own test, under "trained"; for T2 at each fixed gap too."""
    import torch

    from ostinato.models.vector_classifier import VectorClassifier
    from ostinato.training.evaluate import evaluate
    from ostinato.training.fit import fit
    from ostinato.training.schedules import warmup_cosine

    task = _task(sizes, variant, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VectorClassifier(
            task.vocab_size,
            task.num_classes,
            sizes.d_model,
            PLANS[arm],
            sizes.depth,
            swiglu=4 if arm == "attention" else None,
        )
    history = fit(
        model,
        task,
        steps=sizes.steps,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        clip=1.0,
        seed=seed,
        evaluate_every=0,
        optimizer=lambda groups: torch.optim.Adam([{**group, "weight_decay": 0.0} for group in groups]),
        schedule=warmup_cosine(sizes.steps, sizes.warmup, 0.0),
        progress=False,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    scores = {"trained": history.evaluations[-1].metrics["accuracy"], "loss": fmean(history.losses[-10:])}
    if variant == "T2":
        metrics = evaluate(model, _task(sizes, "T4", seed, tested_gaps=sizes.tested_gaps))
        scores.update({f"gap {gap}": metrics[f"accuracy/gap {gap}"] for gap in sizes.tested_gaps})
    return scores


def _floors(sizes: Sizes, first: int) -> dict[str, float]:
    """The baselines of the task, over the grammars of all seeds."""
    each = [_task(sizes, "T1", seed).baselines() for seed in range(first, first + sizes.seeds)]
    return {name: fmean(one[name] for one in each) for name in each[0]}


def _mean(rows: Sequence[Scores], key: str = "trained") -> float:
    return fmean(row[key] for row in rows)


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _shown(rows: Sequence[Scores], key: str = "trained") -> str:
    return f"{_mean(rows, key):.2f} ± {_error([row[key] for row in rows]):.2f}"


def _forgets_by_data(arm: str) -> bool:
    return "data" in mixer_class(arm).traits.transition


def _mixes(arm: str) -> bool:
    return mixer_class(arm).traits.channel_mixing


def _linear(arms: Sequence[str]) -> list[str]:
    return [arm for arm in arms if mixer_class(arm).traits.linear]


def _judge(sizes: Sizes, found: Found, floors: dict[str, float]) -> list[Measured]:
    floor = ", ".join(f"{name} {value:.2f}" for name, value in floors.items())
    rows = []
    for key, variant in (("gates", "T1"), ("gates_t2", "T2")):
        scores = found[variant]
        base = _mean(scores["linear_attention"])
        margins = {arm: _mean(scores[arm]) - base for arm in scores if _forgets_by_data(arm)}
        least = min(margins, key=margins.__getitem__)
        everyone = ", ".join(f"{arm} {_shown(each)}" for arm, each in scores.items())
        rows.append(
            Measured(
                key,
                ours=f"least margin {margins[least]:+.2f} ({least}) over linear attention's {base:.2f}",
                holds=margins[least] >= 0.1,
                note=f"accuracy over elements, mean ± standard error of {sizes.seeds} seeds: {everyone}. {floor}",
            )
        )
    gaps = {}
    for variant in ("T2", "T3"):
        scores = found[variant]
        linear = _linear(list(scores))
        plain = max((arm for arm in linear if not _mixes(arm)), key=lambda arm: _mean(scores[arm]))
        mixing = max((arm for arm in linear if _mixes(arm)), key=lambda arm: _mean(scores[arm]))
        gaps[variant] = (plain, _shown(scores[plain]), mixing, _shown(scores[mixing]))
    behind = {v: _mean(found[v][mixing]) - _mean(found[v][plain]) for v, (plain, _, mixing, _) in gaps.items()}
    best = "; ".join(f"{v}: {plain} {p}, {mixing} {m}" for v, (plain, p, mixing, m) in gaps.items())
    on_t3 = ", ".join(f"{arm} {_shown(each)}" for arm, each in found["T3"].items())
    note = f"all models on T3: {on_t3}. {floor}"
    rows.append(Measured("selectivity", ours=best, holds=max(behind.values()) <= 0.05, note=note))
    rows.append(_generalization(sizes, found["T2"]))
    # Against the best other model of each variant, seed by seed.
    ahead, shown = {}, []
    for variant, scores in found.items():
        best_other = max((arm for arm in scores if arm != "attention"), key=lambda arm: _mean(scores[arm]))
        ahead[variant] = _verdict(_differences(scores["attention"], scores[best_other]))
        shown.append(f"{variant}: attention {_shown(scores['attention'])}, {best_other} {_shown(scores[best_other])}")
    holds = False if False in ahead.values() else None if None in ahead.values() else True
    rows.append(Measured("attention", "; ".join(shown), holds, note=_NOISE))
    return rows


_NOISE = "not told where the seeds' difference is within two standard errors of zero"


def _generalization(sizes: Sizes, scores: dict[str, list[Scores]]) -> Measured:
    last = f"gap {sizes.tested_gaps[-1]}"
    linear = _linear(list(scores))
    drops = {arm: _differences(scores[arm], scores[arm], "trained", last) for arm in linear}
    plain, mixing = (
        [median(drops[arm][seed] for arm in linear if _mixes(arm) == kind) for seed in range(sizes.seeds)]
        for kind in (False, True)
    )
    each = ", ".join(f"{arm} {fmean(drop):.2f} (to {_shown(scores[arm], last)})" for arm, drop in drops.items())
    return Measured(
        "generalization",
        ours=f"median drop {fmean(plain):.2f} ± {_error(plain):.2f} without mixing, {fmean(mixing):.2f} ± "
        f"{_error(mixing):.2f} in the delta family, at gaps of {sizes.tested_gaps[-1]} steps",
        holds=_verdict([a - b for a, b in zip(plain, mixing, strict=True)]),
        note=f"trained with gaps of 1–{sizes.longest_gap} steps; {each}; {_NOISE}",
    )


def _differences(left: list[Scores], right: list[Scores], of: str = "trained", to: str = "trained") -> list[float]:
    """Seed by seed: both had the same grammar."""
    return [a[of] - b[to] for a, b in zip(left, right, strict=True)]


def _verdict(differences: Sequence[float]) -> bool | None:
    """Whether the mean is above zero; None within two standard errors of it."""
    mean = fmean(differences)
    return None if abs(mean) < 2 * _error(differences) else mean > 0


def _holds_only_beyond_smoke(run: Run, row: Measured) -> Measured:
    if run.budget != "smoke":
        return row
    return Measured(row.key, row.ours, None, f"three updates tell nothing. {row.note}")


def _described(sizes: Sizes, floors: dict[str, float]) -> dict[str, Any]:
    return {
        "grammar": f"n = D = {sizes.letters}, {sizes.letters**2 + 1} states, one for each seed",
        "elements of a sequence": sizes.length,
        "d_model": sizes.d_model,
        "layers": sizes.depth,
        "training sequences": sizes.steps * sizes.batch_size,
        "batch": sizes.batch_size,
        "learning rate": sizes.learning_rate,
        "gaps of T2": f"1–{sizes.longest_gap}",
        "gaps of T4": ", ".join(map(str, sizes.tested_gaps)),
        "test sequences": sizes.test_size,
        "seeds": sizes.seeds,
        "models": "; ".join(f"{variant}: {', '.join(arms)}" for variant, arms in sizes.arms.items()),
    } | {name: round(value, 4) for name, value in floors.items()}


def _draw(run: Run, sizes: Sizes, found: Found, floors: dict[str, float]) -> None:
    # First the test with random gaps, at their mean.
    gaps = [(1 + sizes.longest_gap) / 2, *sizes.tested_gaps]
    keys = ["trained", *(f"gap {gap}" for gap in sizes.tested_gaps)]
    series = [Series(arm, gaps, [_mean(rows, key) for key in keys]) for arm, rows in found["T2"].items()]
    levels = {name: value for name, value in floors.items() if name.endswith("table")}
    run.figure(
        f"Accuracy at fixed gaps (T4); first point: random gaps of 1–{sizes.longest_gap}, as trained (T2)",
        series,
        x_label="steps between two symbols",
        y_label="elements named right",
        log_x=True,
        levels=levels,
    )
