"""GLA (Yang et al. 2023, arXiv 2312.06635): a decay of its own for every key channel, in matrix products.

Exactness of the chunks, with decays so strong that the plain parallel form overflows; then text, in which only the
decay differs: none, fixed, one per head that depends on the data, one per channel; and recall.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import ostinato
from ostinato.analysis.state_collapse import loss_by_position
from ostinato.models.token_classifier import TokenClassifier
from ostinato.ops.linear_attention import linear_attention
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.base import Task
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.text import Text
from ostinato.training.ensemble import fit_seeds
from ostinato.training.evaluate import evaluate

claims = (
    Claim("exact", "chunks, loop and the whole matrix give the same outputs and gradients", theirs="an identity"),
    Claim("stable", "chunks stay finite under strong decays, where keys divided by decays overflow", theirs="stated"),
    Claim("order", "on text: no decay is worse than a fixed one, a fixed one no better than GLA", theirs="direction"),
    Claim("gain", "a decay per channel lowers the loss against none", theirs="direction; asked: 0.05 nats"),
    Claim("attention", "GLA is near softmax attention", theirs="28.65 against 28.39 (340M)"),
    Claim("scalar", "one data-dependent decay per head is better than a fixed one", theirs="direction"),
    Claim("channel", "and a decay per channel is better than one per head", theirs="direction"),
    Claim("length", "text many times as long as what was trained on is read no worse", theirs="2K to 18–20K (figure)"),
    Claim("recall", "a decay that depends on the data raises recall over a fixed one", theirs="not in the paper"),
    Claim("large", "language models of 340M and 1.3B, speed against FlashAttention-2", theirs="tables"),
)

_ARMS = {
    "no decay": "gla(decay=off)",
    "fixed": "gla(decay=fixed)",
    "head": "gla(decay=head)",
    "GLA": "gla",
    "attention": "attention",
}
_LARGE = "trained on 15B and 100B tokens; the kernels' speed stands in the benchmarks"


def experiment(run: Run) -> list[Measured]:
    """The exact statements, text and recall."""
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    run.sizes["seeds"] = seeds
    rows = _forms(run) + _text(run, seeds) + _recall(run, seeds)
    return [*rows, Measured("large", "not measured", None, _LARGE)]


def _forms(run: Run) -> list[Measured]:
    time, dim = run.choose(smoke=(40, 8), cpu=(256, 32), gpu=(256, 32))
    strong = run.choose(smoke=128, cpu=512, gpu=512)
    errors: dict[str, float] = run.part("forms", _errors, time, dim, run.seed)
    stress: dict[str, Any] = run.part("strong decays", _stress, strong, dim, run.seed)
    run.sizes["forms"] = f"batch 2, heads 2, time {time} (strong decays: {strong}), keys and values of {dim}"
    found = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    return [
        Measured(
            "exact",
            found,
            max(errors.values()) <= 1e-10,
            "float64, largest error over the largest magnitude of outputs, last state and all gradients; asked: 1e-10",
        ),
        Measured(
            "stable",
            f"chunks: {stress['bad']} numbers not finite, error {stress['error']:.0e}; keys divided by decays: "
            f"{stress['bad plainly']} of {stress['numbers']} outputs not finite",
            stress["bad"] == 0 and stress["error"] <= 1e-4 and stress["bad plainly"] > 0,
            "float32, α down to 1e-3 a step; outputs and gradients; error relative to the loop in float64",
        ),
    ]


def _draw(time: int, dim: int, seed: int, strongest: float) -> list[Tensor]:
    """Queries, keys, values and log α in [strongest, 0], float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, time, 2, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    return [q * dim**-0.5, k, v, strongest * torch.rand(2, time, 2, dim, generator=generator, dtype=torch.float64)]


def _whole(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """O = ((Q ⊙ B)(K ⊘ B)ᵀ ⊙ M) V and S = (K ⊙ B_T ⊘ B)ᵀ V, B the products of decays: exact, until 1/B overflows."""
    q, k, v, total = (part.transpose(1, 2) for part in (q, k, v, log_decay.cumsum(1)))
    scores = (q * total.exp()) @ (k * (-total).exp()).mT
    return (scores.tril() @ v).transpose(1, 2), (k * (total[:, :, -1:] - total).exp()).mT @ v


def _found(call: Any, drawn: list[Tensor]) -> list[Tensor]:
    """Outputs, last state, and the gradients of a weighted sum of both."""
    arguments = [argument.clone().requires_grad_() for argument in drawn]
    outputs, state = call(*arguments)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    gradients = torch.autograd.grad((outputs * weights).sum() + state.sum(), arguments)
    return [outputs.detach(), state.detach(), *gradients]


def _worst(values: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, wanted, strict=True))


def _errors(time: int, dim: int, seed: int) -> dict[str, float]:
    """Relative errors of the chunked and of the whole form against the loop, with decays that the latter bears."""
    drawn = _draw(time, dim, seed, -0.1)
    with ostinato.backend(linear_attention="reference"):
        wanted = _found(linear_attention, drawn)
    errors = {"whole matrix": _worst(_found(_whole, drawn), wanted)}
    with ostinato.backend(linear_attention="parallel"):
        for size in (16, 64, 128):
            errors[f"chunks of {size}"] = _worst(
                _found(lambda *arguments, size=size: linear_attention(*arguments, chunk_size=size), drawn), wanted
            )
    return errors


def _stress(time: int, dim: int, seed: int) -> dict[str, Any]:
    """Decays down to 1e-3 a step, in float32."""
    drawn = _draw(time, dim, seed, -6.9)
    single = [argument.float() for argument in drawn]
    with ostinato.backend(linear_attention="reference"):
        wanted = _found(linear_attention, drawn)
    with ostinato.backend(linear_attention="parallel"):
        chunks = _found(linear_attention, single)
    plainly, _ = _whole(*single)
    return {
        "bad": sum(int((~value.isfinite()).sum()) for value in chunks),
        "error": _worst([value.double() for value in chunks], wanted),
        "bad plainly": int((~plainly.isfinite()).sum()),
        "numbers": plainly.numel(),
    }


def _text(run: Run, seeds: list[int]) -> list[Measured]:
    width, window, batch, steps = run.choose(smoke=(16, 16, 2, 1), cpu=(64, 128, 8, 300), gpu=(128, 256, 16, 2000))
    task = Text(window=window, carry=False, max_bytes=run.choose(smoke=4000, cpu=200_000, gpu=None))
    run.sizes["text"] = {"width": width, "layers": 4, "window": window, "batch": batch, "steps": steps, "plans": _ARMS}
    found: dict[str, list[float]] = {}
    sizes = []
    bins = [0, window // 2, *(window * 2**power for power in range(5))]
    longer = [] if run.budget == "cpu" else [bins]
    along: dict[str, list[list[float]]] = {}
    for name, plan in _ARMS.items():
        part = run.part(f"text {name}", _train, plan, 4, width, task, seeds, batch, steps, 1e-3, run, *longer)
        along[name] = [one["along"] for one in part["members"] if "along" in one]
        found[name] = [one["loss"] for one in part["members"]]
        sizes.append(f"{name} {part['members'][0]['parameters']:,}")
        losses = [mean(values) for values in part["losses"]]
        run.sizes["text"].setdefault("training losses", {})[name] = losses
    every = run.sizes["text"].pop("training losses")
    run.figure(
        f"Loss in training on text (mean of {len(seeds)} seeds)",
        [Series(name, [(i + 1) * steps / len(v) for i in range(len(v))], v) for name, v in every.items()],
        x_label="step",
        y_label="cross-entropy (nats per byte)",
    )
    baselines = ", ".join(f"{name} {value:.2f}" for name, value in task.baselines().items())
    each = "; ".join(f"{name} {_list(values)}" for name, values in found.items())
    note = f"nats per byte, held out: {each}; parameters {', '.join(sizes)}; bits per byte of the classics: {baselines}"
    judge = run.budget != "smoke"
    average = {name: mean(values) for name, values in found.items()}

    def lower(key: str, ours: str, other: str, margin: float, said: str) -> Measured:
        gaps = [b - a for a, b in zip(found[ours], found[other], strict=True)]
        ahead = mean(gaps) >= margin and min(gaps) > 0
        return Measured(key, f"lower by {_list(gaps)}", ahead if judge else None, said)

    near = average["GLA"] - average["attention"]
    return [
        Measured(
            "order",
            ", ".join(f"{name} {average[name]:.3f}" for name in ("no decay", "fixed", "GLA")),
            average["no decay"] > average["fixed"] >= average["GLA"] if judge else None,
            note,
        ),
        lower("gain", "GLA", "no decay", 0.05, "asked: 0.05 in the mean, and lower for every seed"),
        Measured("attention", f"{near:+.3f} nats", near <= 0.1 if judge else None, "means; asked: at most 0.1 above"),
        lower("scalar", "head", "fixed", 0.0, "asked of every seed: lower"),
        lower("channel", "GLA", "head", 0.0, "asked of every seed: lower"),
        _length(run, bins, along),
    ]


def _length(run: Run, bins: list[int], along: dict[str, list[list[float]]]) -> Measured:
    """The loss by position, beyond the trained length."""
    if run.budget == "cpu":
        return Measured("length", "not measured", None, "measured in the gpu budget")
    means = {name: [mean(at) for at in zip(*each, strict=True)] for name, each in along.items()}
    run.sizes["text"]["tested along"] = bins
    run.figure(
        f"Loss along a text, trained on {bins[2]} bytes",
        [Series(name, [(a + b) / 2 for a, b in pairwise(bins)], values) for name, values in means.items()],
        x_label="position",
        y_label="nats per byte",
        log_x=True,
    )
    rises = {name: [one[-1] - one[1] for one in each] for name, each in along.items()}

    def told(name: str) -> str:
        return ", ".join(f"{value:+.3f}" for value in rises[name])

    return Measured(
        "length",
        f"{told('GLA')} nats",
        max(rises["GLA"]) <= 0.01 if run.budget == "gpu" else None,
        f"at {bins[-2]}–{bins[-1]} less at {bins[1]}–{bins[2]}, where training ended; asked of each seed: at most 0.01 "
        "more. The others: " + "; ".join(f"{name} {told(name)}" for name in rises if name != "GLA"),
    )


def _recall(run: Run, seeds: list[int]) -> list[Measured]:
    if run.budget == "cpu":
        return [Measured("recall", "not measured", None, "trained in the gpu budget: no room for it on two cores")]
    vocabulary, length, pairs, width, batch, steps, test = run.choose(
        smoke=(16, 16, 4, 8, 4, 2, 8), cpu=None, gpu=(256, 128, 16, 64, 64, 2000, 1000)
    )
    task = MultiQueryRecall(vocabulary=vocabulary, length=length, pairs=pairs, test_size=test)
    plans = {name: f"gla(heads=2, expand_k=1, conv=4, decay={name})" for name in ("off", "fixed", "head", "channel")}
    run.sizes["recall"] = {"task": str(task), "width": width, "layers": 2, "batch": batch, "steps": steps}
    run.sizes["recall"] |= {"plans": plans, "learning rate": 3e-3}
    found = {}
    for name, plan in plans.items():
        part = run.part(f"recall {name}", _train, plan, 2, width, task, seeds, batch, steps, 3e-3, run)
        found[name] = [one["accuracy"] for one in part["members"]]
    ahead = all(a > b for a, b in zip(found["channel"], found["fixed"], strict=True))
    return [
        Measured(
            "recall",
            "; ".join(f"{name} {_list(values)}" for name, values in found.items()),
            None if run.budget == "smoke" else ahead,
            f"asked: per channel over fixed, every seed; chance {task.chance:.3f}, last value "
            f"{task.baselines()['last value']:.3f}",
        )
    ]


def _train(
    plan: str,
    depth: int,
    width: int,
    task: Task,
    seeds: list[int],
    batch: int,
    steps: int,
    rate: float,
    run: Run,
    bins: list[int] | None = None,
) -> dict[str, Any]:
    """Scores and sizes of every seed, of text the loss between `bins` of longer pieces, and the losses in training."""
    channel_mixer = None if isinstance(task, MultiQueryRecall) else "swiglu"
    members: list[dict[str, Any]] = []
    losses = []
    trained = fit_seeds(
        lambda _: TokenClassifier(task.vocab_size, width, plan, depth, channel_mixer=channel_mixer),
        task,
        seeds,
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        weight_decay=0.1,
        warmup=min(100, steps),
        say=run.say,
    )
    for ensemble in trained:
        losses.append(ensemble.losses)
        for model in ensemble:
            scores = evaluate(model, task)
            parameters = sum(value.numel() for value in model.parameters())
            members.append({"accuracy": scores["accuracy"], "loss": scores["loss"], "parameters": parameters})
            if bins is not None and isinstance(task, Text):
                pieces = list(task.pieces(bins[-1], task.window))
                members[-1]["along"] = [part["loss"] for part in loss_by_position(model, pieces, bins)]
    return {
        "members": members,
        "losses": [[one for group in values for one in group] for values in zip(*losses, strict=True)],
    }


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
