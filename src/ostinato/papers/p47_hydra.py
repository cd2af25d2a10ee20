"""47 Hydra: structured matrices that mix a sequence, and the quasiseparable ones among them (arXiv 2407.09941)."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import torch

from ostinato.analysis.mixing_matrix import materialize, off_diagonal_ranks
from ostinato.mixers.hydra import Hydra
from ostinato.mixers.matrix_mixer import MatrixMixer
from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.masked_text import MaskedText
from ostinato.training.ensemble import fit_together
from ostinato.training.evaluate import evaluate

claims = (
    Claim(
        "matrix",
        "two scans and a diagonal are a quasiseparable matrix: blocks off the diagonal of rank ≤ N, the diagonal free",
        theirs="definition",
    ),
    Claim("sub-quadratic", "every structured product is its dense matrix", theirs="definition"),
    Claim("concatenate", "better than two state space models side by side", theirs="C4 loss 1.66 against 1.71"),
    Claim("multiply", "better than their product", theirs="1.66 against 1.72"),
    Claim("add", "not worse than their sum, by more than 0.01", theirs="1.66 against 1.68"),
    Claim("causal", "far better than a causal one, by ≥ 0.2", theirs="1.66 against 3.45"),
    Claim("attention", "better than softmax attention (BERT)", theirs="1.46 against 1.59"),
    Claim(
        "alignment",
        "parameters made by the tokens beat learned ones by ≥ 0.05: low-rank and quasiseparable",
        theirs="low-rank 2.06 → 1.90; quasiseparable 2.03 → 1.84",
    ),
    Claim(
        "classes",
        "of the classes, made by tokens, the quasiseparable is best",
        theirs="1.84; attention 1.87, low-rank 1.90, Toeplitz 1.91, Cauchy 1.94, Vandermonde 2.04",
    ),
    Claim(
        "fixed",
        "dense matrices and the DFT, which no token can make, are behind every class made by tokens",
        theirs="2.05 and 2.46 against 1.84 to 2.04",
    ),
    Claim(
        "extends",
        "made by tokens, a matrix goes on to any length: that of the beginning is the beginning of that of the whole",
        theirs="definition (sequence alignment)",
    ),
)

_HYDRA = "hydra(heads=6, state_dim=32{})"
JOINS = {
    "Hydra": _HYDRA.format(""),
    "add": _HYDRA.format(", join=add"),
    "multiply": _HYDRA.format(", join=multiply"),
    "concatenate": _HYDRA.format(", join=concatenate"),
    "causal Mamba-2": "mamba2(heads=6, state_dim=32)",
    "softmax attention": "whole_attention(heads=6)",
}
CLASSES = ("low_rank", "quasiseparable", "attention", "toeplitz", "cauchy", "vandermonde")
FIXED = ("dense", "dft")


def _class_plan(kind: str, dependent: bool) -> str:
    return f"matrix_mixer(kind={kind}, data_dependent={dependent}, heads=6, qk_dim=16)"


def experiment(run: Run) -> list[Measured]:
    """Matrices, then masked text by every way of mixing."""
    seeds = [run.seed + index for index in range(run.choose(smoke=2, cpu=3, gpu=3))]
    sizes = {
        "steps": run.choose(smoke=1, cpu=200, gpu=1000),
        "batch": run.choose(smoke=2, cpu=12, gpu=32),
        "window": run.choose(smoke=16, cpu=64, gpu=128),
        "d_model": run.choose(smoke=24, cpu=96, gpu=96),
        "depth": run.choose(smoke=1, cpu=2, gpu=4),
        "tested": run.choose(smoke=4, cpu=256, gpu=256),
    }
    structure = run.part("matrices", _structure)
    beginnings = run.part("beginnings", _beginnings)
    kinds = run.choose(smoke=CLASSES, cpu=CLASSES[:2], gpu=CLASSES)
    target = _count(JOINS["Hydra"], sizes, sizes["d_model"])
    arms = JOINS | {
        f"{kind}, {word}": _class_plan(kind, word == "by tokens") for kind in kinds for word in ("by tokens", "learned")
    }
    if len(kinds) == len(CLASSES):
        arms |= {f"{kind}, learned": _class_plan(kind, False) for kind in FIXED}
    widths = {name: _width(plan, sizes, target) for name, plan in arms.items()}
    found = {name: run.part(name, _train, plan, widths[name], sizes, seeds, run) for name, plan in arms.items()}
    floors = run.part("floors", MaskedText(window=sizes["window"], test_size=sizes["tested"]).baselines)
    run.sizes |= sizes | {
        "seeds": len(seeds),
        "training": "AdamW 1e-3, warm-up, cosine to 0, weight decay 0.1; 20 % of the bytes of pydoc's topics masked",
        "parameters": {name: _count(plan, sizes, widths[name]) for name, plan in arms.items()},
        "floors": {name: round(value, 3) for name, value in floors.items()},
    }
    run.figure(
        "Loss on masked bytes",
        [
            Series(
                "a seed", *zip(*((i, loss) for i, values in enumerate(found.values()) for loss in values), strict=True)
            )
        ],
        categories=list(found),
        y_label="nats",
        levels={"between the same neighbours": floors["between the same neighbours"]},
    )
    rows = [*_structure_rows(structure), _extends_row(beginnings), *_loss_rows(found, floors)]
    if run.budget == "smoke":
        return [*rows[:3], *(Measured(row.key, row.ours, None, "too small a budget to tell") for row in rows[3:])]
    return rows


def _model(plan: str, sizes: dict[str, int], width: int) -> TokenClassifier:
    task = MaskedText(window=sizes["window"], test_size=sizes["tested"])
    return TokenClassifier(
        task.vocab_size, width, plan, sizes["depth"], num_classes=task.num_classes, channel_mixer=None
    )


def _count(plan: str, sizes: dict[str, int], width: int) -> int:
    return sum(parameter.numel() for parameter in _model(plan, sizes, width).parameters())


def _width(plan: str, sizes: dict[str, int], target: int) -> int:
    """The width, a multiple of 12, with which the model has about as many parameters as Hydra."""
    first = sizes["d_model"]
    return min(range(first - 12, first + 73, 12), key=lambda width: abs(_count(plan, sizes, width) - target))


def _train(plan: str, width: int, sizes: dict[str, int], seeds: list[int], run: Run) -> list[float]:
    """The loss in nats on masked bytes of held-out text, for every seed."""
    task = MaskedText(window=sizes["window"], test_size=sizes["tested"])
    ensemble = fit_together(
        lambda seed: _model(plan, sizes, width),
        task,
        seeds,
        steps=sizes["steps"],
        batch_size=sizes["batch"],
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup=min(50, sizes["steps"]),
        say=run.say,
    )
    return [evaluate(model, task)["loss"] for model in ensemble]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def _loss_rows(found: dict[str, list[float]], floors: dict[str, float]) -> list[Measured]:
    means = {name: mean(values) for name, values in found.items()}
    ours = means["Hydra"]
    note = f"nats on masked bytes; Hydra {_spread(found['Hydra'])}; floors: " + ", ".join(
        f"{name} {value:.3f}" for name, value in floors.items()
    )

    def against(key: str, name: str, least: float) -> Measured:
        return Measured(key, f"{ours:.3f} against {_spread(found[name])}", means[name] - ours > least, note)

    rows = [
        against("concatenate", "concatenate", 0.0),
        against("multiply", "multiply", 0.0),
        against("add", "add", -0.01),
        against("causal", "causal Mamba-2", 0.2),
        against("attention", "softmax attention", 0.0),
    ]
    made = {name.partition(",")[0]: name for name in found if name.endswith("by tokens")}
    gains = {kind: means[f"{kind}, learned"] - means[name] for kind, name in made.items()}
    shown = "; ".join(f"{kind} {_spread(found[f'{kind}, learned'])} → {_spread(found[made[kind]])}" for kind in made)
    rows.append(Measured("alignment", shown, min(gains["low_rank"], gains["quasiseparable"]) >= 0.05, "learned → made"))
    best = min(made, key=lambda kind: means[made[kind]])
    shown = "; ".join(f"{kind} {_spread(found[name])}" for kind, name in made.items())
    full = len(made) == len(CLASSES)
    rows.append(
        Measured("classes", shown, best == "quasiseparable" if full else None, "" if full else "not all were trained")
    )
    alone = {kind: f"{kind}, learned" for kind in FIXED if f"{kind}, learned" in found}
    if not alone:
        rows.append(Measured("fixed", "not measured", None, "trained in the gpu budget"))
        return rows
    worst = max(made, key=lambda kind: means[made[kind]])
    rows.append(
        Measured(
            "fixed",
            ours="; ".join(f"{kind} {_spread(found[name])}" for kind, name in alone.items())
            + f" against {means[made[worst]]:.3f} of {worst}, the worst made by tokens",
            holds=min(means[name] for name in alone.values()) > means[made[worst]],
            note="the mixers of both have the convolution, which the tokens go through all the same",
        )
    )
    return rows


# --------------------------------------------------------------------------------------------------
# Computed.


@torch.no_grad()
def _structure() -> dict[str, Any]:
    """Ranks and differences in float64, of matrices made by random tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = Hydra(32, heads=2, state_dim=4).double()
        x = torch.randn(2, 48, 32, dtype=torch.float64)
        cuts = tuple(range(8, 44, 6))
        dense = mixer.matrix(x)
        found: dict[str, Any] = {"hydra": float((materialize(mixer, x) - dense).abs().max())}
        found["ranks"] = list(off_diagonal_ranks(dense, cuts))
        found["whole rank"] = int(torch.linalg.matrix_rank(dense, rtol=1e-8).min())
        mixer.skip.add_(1.0)
        moved = mixer.matrix(x) - dense
        found["diagonal"] = float((moved - torch.eye(48, dtype=torch.float64)).abs().max())
        differences = {}
        for kind in ("low_rank", "toeplitz", "quasiseparable"):
            for dependent in (True, False):
                one = MatrixMixer(32, kind, dependent, heads=2, qk_dim=4, max_len=48).double()
                differences[f"{kind} {dependent}"] = float((materialize(one, x) - one.matrix(x)).abs().max())
        found["products"] = differences
    return found


def _structure_rows(found: dict[str, Any]) -> list[Measured]:
    below, above = found["ranks"]
    return [
        Measured(
            "matrix",
            ours=f"ranks {below} and {above} for N = 4 (the whole matrix: {found['whole rank']}); scans against the "
            f"matrix {found['hydra']:.1e}; the diagonal moved alone to {found['diagonal']:.1e}",
            holds=max(below, above) <= 4 and max(found["hydra"], found["diagonal"]) <= 1e-5,
            note="T = 48, float64, by unit vectors through the scans",
        ),
        Measured(
            "sub-quadratic",
            ours="; ".join(f"{name} {value:.0e}" for name, value in found["products"].items()),
            holds=max(found["products"].values()) <= 1e-10,
            note="largest differences; True: made by tokens. Dense, Vandermonde, Cauchy and attention are O(T²)",
        ),
    ]


@torch.no_grad()
def _beginnings() -> dict[str, float]:
    """How far the matrix of 32 of 48 tokens is from the beginning of the whole one, relative; in float64."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, 48, 32, dtype=torch.float64)
        for kind in CLASSES:
            mixer = MatrixMixer(32, kind, True, heads=2, qk_dim=4, max_len=8).double()
            # The convolution looks three tokens ahead. A common factor may depend on the length; the softmax, alone of
            # all, divides every row by a sum over all columns.
            whole, part = (matrix[..., :29, :29] for matrix in (mixer.matrix(x), mixer.matrix(x[:, :32])))
            if kind == "attention":
                whole, part = (matrix / matrix.sum(-1, keepdim=True) for matrix in (whole, part))
            whole, part = (matrix / matrix.norm() for matrix in (whole, part))
            found[kind] = float((whole - part).abs().max() / whole.abs().max())
    return found


def _extends_row(found: dict[str, float]) -> Measured:
    return Measured(
        "extends",
        ours="; ".join(f"{kind} {error:.0e}" for kind, error in found.items()),
        holds=max(found.values()) <= 1e-10,
        note="float64, up to a factor; 32 and 48 tokens, where 8 places were learned; attention up to its rows' sums. "
        "The convolution before it sees three tokens ahead, which are left out",
    )
