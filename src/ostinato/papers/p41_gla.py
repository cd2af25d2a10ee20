"""GLA (Yang et al. 2023, arXiv 2312.06635): a decay of its own for every key channel, in matrix products.

Exactness of the chunks, with decays so strong that the plain parallel form overflows; then text, in which only the
decay differs: none, fixed, one per head that depends on the data, one per key channel, one per value channel too; and
recall.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import ostinato
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.outer_gated_attention import outer_gated_attention
from ostinato.papers.forms import relative_error, with_gradients
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.papers.small_models import Rows, gaps, listed, scores, signed, train_arms
from ostinato.report import Series
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.text import Text

claims = (
    Claim("exact", "chunks, loop and the whole matrix give the same outputs and gradients", theirs="an identity"),
    Claim("stable", "chunks stay finite under strong decays, where keys divided by decays overflow", theirs="stated"),
    Claim("general", "so for the general gate α βᵀ, on values too", theirs="derived"),
    Claim("order", "on text: no decay is worse than a fixed one, a fixed one no better than GLA", theirs="direction"),
    Claim("gain", "a decay per channel lowers the loss against none", theirs="direction; asked: 0.05 nats"),
    Claim("attention", "GLA is near softmax attention", theirs="28.65 against 28.39 (340M)"),
    Claim("scalar", "one data-dependent decay per head is better than a fixed one", theirs="direction"),
    Claim("channel", "and a decay per channel is better than one per head", theirs="direction"),
    Claim("values", "a gate on values too can be left out", theirs="β = 1 in the models; its cost: not told"),
    Claim("length", "text many times as long as what was trained on is read no worse", theirs="2K to 18–20K (figure)"),
    Claim("recall", "a decay that depends on the data raises recall over a fixed one", theirs="not in the paper"),
    Claim("large", "language models of 340M and 1.3B, speed against FlashAttention-2", theirs="tables"),
)

_ARMS = {
    "no decay": "gla(decay=off)",
    "fixed": "gla(decay=fixed)",
    "head": "gla(decay=head)",
    "GLA": "gla",
    "values too": "gla(gate_values=True)",
    "attention": "attention",
}
_RECALL = {
    "off": "decay=off",
    "fixed": "decay=fixed",
    "head": "decay=head",
    "channel": "decay=channel",
    "values too": "gate_values=True",
}
_LARGE = "trained on 15B and 100B tokens; the kernels' speed stands in the benchmarks"


def experiment(run: Run) -> list[Measured]:
    """The exact statements, text and recall."""
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    run.sizes["seeds"] = seeds
    # All parts are asked for before the value of one is looked at: other processes may be computing them.
    sections: list[Rows] = [_forms(run), _text(run, seeds), _recall(run, seeds)]
    return [*(row for rows in sections for row in rows()), Measured("large", "not measured", None, _LARGE)]


def _forms(run: Run) -> Rows:
    time, dim = run.choose(smoke=(40, 8), cpu=(256, 32), gpu=(256, 32))
    strong = run.choose(smoke=128, cpu=512, gpu=512)
    run.sizes["forms"] = f"batch 2, heads 2, time {time} (strong decays: {strong}), keys and values of {dim}"
    errors = run.part("forms", _errors, time, dim, run.seed)
    stress = run.part("strong decays", _stress, strong, dim, run.seed)
    return partial(_forms_rows, errors, stress)


def _forms_rows(errors: dict[str, dict[str, float]], stress: dict[str, dict[str, Any]]) -> list[Measured]:
    found = {gate: ", ".join(f"{name} {error:.0e}" for name, error in each.items()) for gate, each in errors.items()}
    exact = {gate: max(each.values()) <= 1e-10 for gate, each in errors.items()}
    told = {
        gate: f"chunks: {one['bad']} numbers not finite, error {one['error']:.0e}; divided by decays: "
        f"{one['bad plainly']} of {one['numbers']} outputs not finite"
        for gate, one in stress.items()
    }
    stable = {gate: one["bad"] == 0 and one["error"] <= 1e-4 and one["bad plainly"] > 0 for gate, one in stress.items()}
    how = "float64, largest error over the largest magnitude of outputs, last state and all gradients; asked: 1e-10"
    where = "float32, decays down to 1e-3 a step; outputs and gradients; error relative to the loop in float64: 1e-4"
    return [
        Measured("exact", found["keys"], exact["keys"], how),
        Measured("stable", told["keys"], stable["keys"], where),
        Measured(
            "general",
            f"{found['values too']}; {told['values too']}",
            exact["values too"] and stable["values too"],
            f"{how}. {where}",
        ),
    ]


def _draw(time: int, dim: int, seed: int, strongest: float) -> list[Tensor]:
    """Queries, keys, values, log β and log α in [strongest, 0], float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, time, 2, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, beta = (strongest * torch.rand(2, time, 2, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return [q * dim**-0.5, k, v, beta, alpha]


def _whole(q: Tensor, k: Tensor, v: Tensor, *log_decays: Tensor) -> tuple[Tensor, Tensor]:
    """O = ((Q ⊙ B)(K ⊘ B)ᵀ ⊙ M) V and S = (K ⊙ B_T ⊘ B)ᵀ V, B the products of decays: exact, until 1/B overflows.

    Of two decays the first is that of the values: V ⊘ D in V's place, and O ⊙ D, S ⊙ D_T in the end.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    total = log_decays[-1].transpose(1, 2).cumsum(2)
    by_value = log_decays[0].transpose(1, 2).cumsum(2) if len(log_decays) == 2 else torch.zeros_like(v)
    v = v * (-by_value).exp()
    scores = (q * total.exp()) @ (k * (-total).exp()).mT
    state = (k * (total[:, :, -1:] - total).exp()).mT @ v
    return ((scores.tril() @ v) * by_value.exp()).transpose(1, 2), state * by_value[:, :, -1:].exp()


_GATES: dict[str, tuple[Callable[..., Any], slice]] = {
    "keys": (linear_attention, slice(4, None)),
    "values too": (outer_gated_attention, slice(3, None)),
}
"""The engine of each gate, and which of the decays drawn it takes."""


def _errors(time: int, dim: int, seed: int) -> dict[str, dict[str, float]]:
    """Relative errors of the chunked and of the whole form against the loop, with decays that the latter bears."""
    all_drawn = _draw(time, dim, seed, -0.1)
    errors: dict[str, dict[str, float]] = {}
    for gate, (engine, decays) in _GATES.items():
        drawn = [*all_drawn[:3], *all_drawn[decays]]
        with ostinato.backend("reference"):
            wanted = with_gradients(engine, drawn)
        errors[gate] = {"whole matrix": relative_error(with_gradients(_whole, drawn), wanted)}
        with ostinato.backend("parallel"):
            for size in (16, 64, 128):
                chunked = with_gradients(partial(engine, chunk_size=size), drawn)
                errors[gate][f"chunks of {size}"] = relative_error(chunked, wanted)
    return errors


def _stress(time: int, dim: int, seed: int) -> dict[str, dict[str, Any]]:
    """Decays down to 1e-3 a step, in float32."""
    all_drawn = _draw(time, dim, seed, -6.9)
    found = {}
    for gate, (engine, decays) in _GATES.items():
        drawn = [*all_drawn[:3], *all_drawn[decays]]
        single = [argument.float() for argument in drawn]
        with ostinato.backend("reference"):
            wanted = with_gradients(engine, drawn)
        with ostinato.backend("parallel"):
            chunks = with_gradients(engine, single)
        plainly, _ = _whole(*single)
        found[gate] = {
            "bad": sum(int((~value.isfinite()).sum()) for value in chunks),
            "error": relative_error(chunks, wanted),
            "bad plainly": int((~plainly.isfinite()).sum()),
            "numbers": plainly.numel(),
        }
    return found


def _text(run: Run, seeds: list[int]) -> Rows:
    width, window, batch, steps = run.choose(smoke=(16, 16, 2, 1), cpu=(64, 128, 8, 300), gpu=(128, 256, 16, 1500))
    task = Text(window=window, carry=False, max_bytes=run.choose(smoke=4000, cpu=200_000, gpu=None))
    run.sizes["text"] = {"width": width, "layers": 4, "window": window, "batch": batch, "steps": steps, "plans": _ARMS}
    bins = [0, window // 2, *(window * 2**power for power in range(5))]
    longer = [] if run.budget == "cpu" else bins
    parts = train_arms(run, "text", _ARMS, 4, width, task, seeds, batch, steps, 1e-3, bins=longer)
    return partial(_text_rows, run, task, parts, steps, bins)


def _text_rows(run: Run, task: Text, parts: dict[str, Any], steps: int, bins: list[int]) -> list[Measured]:
    found = {name: scores(part, "loss") for name, part in parts.items()}
    every = {name: [mean(values) for values in part["losses"]] for name, part in parts.items()}
    run.figure(
        f"Loss in training on text (mean of {len(found['GLA'])} seeds)",
        [Series(name, [(i + 1) * steps / len(v) for i in range(len(v))], v) for name, v in every.items()],
        x_label="step",
        y_label="cross-entropy (nats per byte)",
    )
    sizes = ", ".join(f"{name} {part['members'][0]['parameters']:,}" for name, part in parts.items())
    baselines = ", ".join(f"{name} {value:.2f}" for name, value in task.baselines().items())
    each = "; ".join(f"{name} {listed(values)}" for name, values in found.items())
    note = f"nats per byte, held out: {each}; parameters {sizes}; bits per byte of the classics: {baselines}"
    judge = run.budget != "smoke"
    average = {name: mean(values) for name, values in found.items()}

    def lower(key: str, ours: str, other: str, margin: float, said: str) -> Measured:
        ahead = gaps(found[ours], found[other])
        holds = mean(ahead) >= margin and min(ahead) > 0
        return Measured(key, f"lower by {listed(ahead)}", holds if judge else None, said)

    near = average["GLA"] - average["attention"]
    more = gaps(found["values too"], found["GLA"])
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
        Measured(
            "values",
            f"with it lower by {listed(more)}",
            mean(more) <= 0.01 if judge else None,
            "nats per byte; asked: at most 0.01 in the mean. How β is made: as α is (inferred)",
        ),
        _length(
            run, bins, {name: scores(part, "along") for name, part in parts.items()} if run.budget != "cpu" else {}
        ),
    ]


def _length(run: Run, bins: list[int], along: dict[str, list[list[float]]]) -> Measured:
    """The loss by position, beyond the trained length."""
    if not along:
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
    others = "; ".join(f"{name} {signed(values)}" for name, values in rises.items() if name != "GLA")
    return Measured(
        "length",
        f"{signed(rises['GLA'])} nats",
        max(rises["GLA"]) <= 0.01 if run.budget == "gpu" else None,
        f"at {bins[-2]}–{bins[-1]} less at {bins[1]}–{bins[2]}, where training ended; asked of each seed: at most 0.01 "
        f"more. The others: {others}",
    )


def _recall(run: Run, seeds: list[int]) -> Rows:
    if run.budget == "cpu":
        why = "trained in the gpu budget: no room for it on two cores"
        return lambda: [Measured("recall", "not measured", None, why)]
    vocabulary, length, pairs, width, batch, steps, test = run.choose(
        smoke=(16, 16, 4, 8, 4, 2, 8), cpu=None, gpu=(256, 128, 16, 64, 64, 1500, 1000)
    )
    task = MultiQueryRecall(vocabulary=vocabulary, length=length, pairs=pairs, test_size=test)
    plans = {name: f"gla(heads=2, expand_k=1, conv=4, {gate})" for name, gate in _RECALL.items()}
    run.sizes["recall"] = {"task": str(task), "width": width, "layers": 2, "batch": batch, "steps": steps}
    run.sizes["recall"] |= {"plans": plans, "learning rate": 3e-3}
    parts = train_arms(run, "recall", plans, 2, width, task, seeds, batch, steps, 3e-3, channel_mixer=None)
    return partial(_recall_rows, run, task, parts)


def _recall_rows(run: Run, task: MultiQueryRecall, parts: dict[str, Any]) -> list[Measured]:
    found = {name: scores(part, "accuracy") for name, part in parts.items()}
    return [
        Measured(
            "recall",
            "; ".join(f"{name} {listed(values)}" for name, values in found.items()),
            None if run.budget == "smoke" else min(gaps(found["fixed"], found["channel"])) > 0,
            f"asked: per channel over fixed, every seed; chance {task.chance:.3f}, last value "
            f"{task.baselines()['last value']:.3f}",
        )
    ]
