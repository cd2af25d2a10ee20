"""Parallel DeltaNet (Yang et al. 2024, arXiv 2406.06484): the delta rule in chunks, in recall and in hybrids.

Five things are tried: that the chunks of the WY form give the loop's numbers and gradients, and how much faster; the
recall of a memory that replaces against memories that add, at equal state; text, alone and with attention; text many
times as long as what was trained on; and synthetic tasks, in `parallel_delta_net_synthetics`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import ostinato
from ostinato.ops.delta_rule import delta_rule
from ostinato.papers import parallel_delta_net_synthetics as synthetics
from ostinato.papers.forms import relative_error, with_gradients
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.papers.small_models import Rows, gaps, listed, scores, signed, train_arms
from ostinato.report import Series
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.text import Text
from ostinato.timing import time_together

claims = (
    Claim("exact", "chunks, loop and the whole matrix give the same outputs and gradients", theirs="an identity"),
    Claim("speed", "the chunks are faster than the loop, at length 1024 by 10 times or more", theirs="figure, H100"),
    Claim("growth", "the speed-up grows with the length", theirs="figure, H100"),
    Claim("recall", "the delta rule solves associative recall", theirs="near-perfect at 512, 64 pairs"),
    Claim("additive", "memories that only add, or decay alike for all, fall behind it", theirs="figure"),
    Claim("gated", "so do memories whose decay depends on the data (GLA, Mamba-2)", theirs="ahead of GLA, Mamba"),
    Claim("convolution", "the short convolution lowers the loss on text", theirs="29.08 to 28.24 (perplexity)"),
    Claim("sliding window", "so does attention over a window in every other layer", theirs="28.24 to 27.06"),
    Claim("two global", "and attention in two layers", theirs="28.24 to 27.51"),
    Claim("hybrids", "both hybrids do better than attention alone", theirs="28.39 (attention)"),
    Claim("norm", "the norm of keys and queries matters, their activation little", theirs="31.12, 28.03, 28.75, 28.24"),
    Claim("length", "beyond the trained length plain DeltaNet, without a decay, gets worse", theirs="stated: limited"),
    Claim("decay", "there it does worse than with a decay (Gated DeltaNet)", theirs="not in the paper"),
    *synthetics.claims,
    Claim("large", "language models of 340M and 1.3B; recall of real text", theirs="tables"),
)

_RECALL = {
    "delta rule": "delta_net(heads=2)",
    "no decay": "linear_attention(heads=2, conv=4)",
    "RetNet": "retnet(heads=2, expand_v=1)",
    "GLA": "gla(heads=2, expand_k=1, conv=4)",
    "Mamba-2": "mamba2(heads=2, state_dim={quarter})",
    "attention": "attention(heads=2)",
}
_TEXT = {
    "delta rule": "delta_net",
    "sliding window": "delta_net, attention(window=64)",
    "two global": "delta_net, attention*2, delta_net",
    "attention": "attention",
    "no convolution": "delta_net(conv=None)",
    "L1, 1 + elu": "delta_net(qk_norm=l1, qk_activation=elu)",
    "L2, 1 + elu": "delta_net(qk_activation=elu)",
    "L2, relu": "delta_net(qk_activation=relu)",
}
_LENGTHS = {
    "delta rule": "delta_net",
    "with a decay": "gated_delta_net",
    "sliding window": "delta_net, attention(window={quarter})",
    "attention": "attention",
}
_ON_GPU = "trained in the gpu budget: there is no room for text on two cores"
_LARGE = "trained on 15B and 100B tokens; both hybrids are plan strings, trained here at a small size"


def experiment(run: Run) -> list[Measured]:
    """The exact statements and speed, recall, text, longer text, and synthetic tasks."""
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    run.sizes["seeds"] = seeds
    # All parts are asked for before the value of one is looked at: other processes may be computing them.
    sections: list[Rows] = [
        _forms(run),
        _speeds(run),
        _recall(run, seeds),
        _text(run, seeds),
        _lengths(run, seeds),
        synthetics.mad(run, seeds),
        synthetics.regbench(run, seeds),
    ]
    return [*(row for rows in sections for row in rows()), Measured("large", "not measured", None, _LARGE)]


def _forms(run: Run) -> Rows:
    time, dim = run.choose(smoke=(40, 8), cpu=(1024, 64), gpu=(1024, 64))
    run.sizes["forms"] = f"batch 2, heads 2, time {time}, keys and values of {dim}, float64"
    return partial(_forms_rows, run.part("forms", _errors, time, dim, run.seed))


def _forms_rows(errors: dict[str, float]) -> list[Measured]:
    found = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    note = "float64, largest error over the largest magnitude of outputs, last state and all gradients; asked: 1e-10"
    return [Measured("exact", found, max(errors.values()) <= 1e-10, note)]


def _whole(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """O = tril(Q Kᵀ) T V and S = Kᵀ T V, with T = (I + tril(β K Kᵀ, −1))⁻¹ diag(β): one matrix, no chunks."""
    q, k, v, rate = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), beta.transpose(1, 2).unsqueeze(-1)
    lower = (rate * (k @ k.mT)).tril(-1)
    written = torch.linalg.solve_triangular(lower, rate * v, upper=False, unitriangular=True)
    return ((q @ k.mT).tril() @ written).transpose(1, 2), k.mT @ written


def _draw(time: int, dim: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys of unit length, values and β, for two sequences and two heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, time, 2, dim, generator=generator, dtype=dtype) for _ in range(3))
    beta = torch.rand(2, time, 2, generator=generator, dtype=dtype)
    return [q * dim**-0.5, torch.nn.functional.normalize(k, dim=-1), v, beta]


def _errors(time: int, dim: int, seed: int) -> dict[str, float]:
    """Relative errors of the chunked and of the whole form against the loop."""
    drawn = _draw(time, dim, seed, torch.float64)
    with ostinato.backend(delta_rule="reference"):
        wanted = with_gradients(delta_rule, drawn)
    errors = {"whole matrix": relative_error(with_gradients(_whole, drawn), wanted)}
    with ostinato.backend(delta_rule="parallel"):
        for size in (16, 32, 64):
            chunked = with_gradients(partial(delta_rule, chunk_size=size), drawn)
            errors[f"chunks of {size}"] = relative_error(chunked, wanted)
    return errors


def _speeds(run: Run) -> Rows:
    lengths = run.choose(smoke=(16, 32), cpu=(128, 256, 512, 1024, 2048), gpu=(128, 256, 512, 1024, 2048))
    dims = run.choose(smoke=(8,), cpu=(16, 64), gpu=(16, 64))
    ratios = run.timed_part("speed", _ratios, lengths, dims, run.choose(smoke=1, cpu=5, gpu=5))
    return partial(_speeds_rows, run, lengths, dims, ratios)


def _speeds_rows(
    run: Run, lengths: tuple[int, ...], dims: tuple[int, ...], ratios: dict[str, list[float]]
) -> list[Measured]:
    run.figure(
        "Times that chunks are faster than the loop (processor, float32)",
        [Series(name, list(lengths), values) for name, values in ratios.items()],
        x_label="length",
        y_label="loop / chunks",
        log_x=True,
        log_y=True,
        levels={"asked at 1024": 10.0},
    )
    judge = run.budget != "smoke"
    largest = ratios[f"dim {dims[-1]}"]
    said = "; ".join(f"{name}: " + ", ".join(f"{value:.1f}" for value in values) for name, values in ratios.items())
    note = (
        f"at lengths {', '.join(map(str, lengths))}, forward, batch 2, heads 2, {torch.get_num_threads()} threads, "
        "medians of rounds taken in turn; on the processor also in the gpu budget"
    )
    fast = largest[lengths.index(1024)] >= 10 if judge else None
    return [
        Measured("speed", said, fast, f"{note}; judged at length 1024, dimension {dims[-1]}"),
        Measured("growth", said, all(v[-1] > v[0] for v in ratios.values()) if judge else None, note),
    ]


@torch.no_grad()
def _ratios(lengths: tuple[int, ...], dims: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {}
    for dim in dims:
        for time in lengths:
            arguments = _draw(time, dim, 0, torch.float32)

            def by(route: str, arguments: list[Tensor] = arguments) -> Any:
                with ostinato.backend(delta_rule=route):
                    return delta_rule(*arguments, chunk_size=64)

            taken = time_together(
                {"loop": lambda by=by: by("reference"), "chunks": lambda by=by: by("parallel")},  # type: ignore[misc]
                rounds=rounds,
                warm_up=1,
            )
            ratios.setdefault(f"dim {dim}", []).append(taken["chunks"].ratio_to(taken["loop"]))
    return ratios


def _recall(run: Run, seeds: list[int]) -> Rows:
    vocabulary, length, pairs, width, batch, steps, test = run.choose(
        smoke=(16, 16, 4, 8, 4, 2, 8), cpu=(64, 32, 8, 64, 32, 1000, 512), gpu=(256, 128, 16, 64, 64, 1200, 1000)
    )
    task = MultiQueryRecall(vocabulary=vocabulary, length=length, pairs=pairs, test_size=test)
    plans = {name: plan.format(quarter=max(1, width // 4)) for name, plan in _RECALL.items()}
    run.sizes["recall"] = {"task": str(task), "width": width, "layers": 2, "plans": plans}
    run.sizes["recall"] |= {"batch": batch, "steps": steps, "learning rate": 3e-3}
    parts = train_arms(run, "recall", plans, 2, width, task, seeds, batch, steps, 3e-3, channel_mixer=None)
    return partial(_recall_rows, run, task, parts)


def _recall_rows(run: Run, task: MultiQueryRecall, parts: dict[str, Any]) -> list[Measured]:
    found = {name: scores(part, "accuracy") for name, part in parts.items()}
    first = {name: part["members"][0] for name, part in parts.items()}
    facts = [f"{name} {one['parameters']:,} parameters, state {one['state']:,}" for name, one in first.items()]
    judge = run.budget != "smoke"
    mine = found["delta rule"]
    settings = (
        f"one learning rate for all, 0.003, without a sweep; chance {task.chance:.3f}, last "
        f"value {task.baselines()['last value']:.3f}; attention {listed(found['attention'])}; {'; '.join(facts)}"
    )

    def behind(names: tuple[str, ...], margin: float, note: str) -> tuple[str, bool | None, str]:
        ahead = [mean(mine) - mean(found[name]) for name in names]
        ours = "; ".join(f"{name} {listed(found[name])}" for name in names) + f"; delta rule {listed(mine)}"
        return ours, min(ahead) > margin if judge else None, note

    unlike = "asked: 0.2 behind, each; RetNet has no short convolution here, as in its paper: the others do"
    return [
        Measured("recall", listed(mine), min(mine) >= 0.95 if judge else None, f"asked: 0.95; {settings}"),
        Measured("additive", *behind(("no decay", "RetNet"), 0.2, unlike)),
        Measured("gated", *behind(("GLA", "Mamba-2"), 0.0, "no bound was set: the means are compared; state is alike")),
    ]


def _text(run: Run, seeds: list[int]) -> Rows:
    if run.budget == "cpu":
        keys = ("convolution", "sliding window", "two global", "hybrids", "norm")
        return lambda: [Measured(key, "not measured", None, _ON_GPU) for key in keys]
    width, window, batch, steps = run.choose(smoke=(16, 16, 2, 1), cpu=None, gpu=(128, 256, 16, 500))
    task = Text(window=window, carry=False, max_bytes=run.choose(smoke=2000, cpu=None, gpu=None))
    run.sizes["text"] = {"width": width, "layers": 4, "window": window, "batch": batch, "steps": steps, "plans": _TEXT}
    parts = train_arms(run, "text", _TEXT, 4, width, task, seeds, batch, steps, 1e-3)
    return partial(_text_rows, run, task, parts)


def _text_rows(run: Run, task: Text, parts: dict[str, Any]) -> list[Measured]:
    found = {name: scores(part, "loss") for name, part in parts.items()}
    baselines = ", ".join(f"{name} {value:.2f}" for name, value in task.baselines().items())
    each = "; ".join(f"{name} {listed(values)}" for name, values in found.items())
    note = f"nats per byte, held-out pydoc text; all arms: {each}; bits per byte of the classics: {baselines}"
    judge = run.budget != "smoke"

    def row(key: str, ours: str, others: str) -> Measured:
        ahead = gaps(found[ours], found[others])
        words = f"{ours} lower than {others} by {listed(ahead)}"
        return Measured(key, words, min(ahead) > 0 if judge else None, "asked of every seed: lower")

    both = [gaps(found[hybrid], found["attention"]) for hybrid in ("sliding window", "two global")]
    default = mean(found["delta rule"])
    norm = mean(found["L1, 1 + elu"]) - mean(found["L2, 1 + elu"])
    activation = max(abs(mean(found[name]) - default) for name in ("L2, 1 + elu", "L2, relu"))
    return [
        row("convolution", "delta rule", "no convolution"),
        row("sliding window", "sliding window", "delta rule"),
        row("two global", "two global", "delta rule"),
        Measured(
            "hybrids",
            f"lower than attention by {listed(both[0])} (window), {listed(both[1])} (two global)",
            min(map(min, both)) > 0 if judge else None,
            note,
        ),
        Measured(
            "norm",
            f"L1 for L2: {norm:+.3f} nats; another activation: {activation:.3f} at most",
            norm > activation if judge else None,
            "means over seeds; asked: the change of norm costs more than any change of activation",
        ),
    ]


def _lengths(run: Run, seeds: list[int]) -> Rows:
    """Text in pieces many times as long as those of the training."""
    width, depth, window, times, batch, steps = run.choose(
        smoke=(16, 1, 16, 4, 2, 1), cpu=(64, 2, 64, 16, 8, 250), gpu=(128, 4, 128, 16, 16, 500)
    )
    names = run.choose(smoke=tuple(_LENGTHS), cpu=tuple(_LENGTHS)[:2], gpu=tuple(_LENGTHS))
    plans = {name: _LENGTHS[name].format(quarter=window // 4) for name in names}
    task = Text(window=window, carry=False, max_bytes=run.choose(smoke=4000, cpu=None, gpu=None))
    bins = [0, window // 2, *(window * 2**power for power in range(times.bit_length()))]
    run.sizes["lengths"] = {"width": width, "layers": depth, "window": window, "batch": batch, "steps": steps}
    run.sizes["lengths"] |= {"plans": plans, "tested": bins}
    parts = train_arms(run, "lengths", plans, depth, width, task, seeds, batch, steps, 1e-3, bins=bins)
    return partial(_lengths_rows, run, bins, parts)


def _lengths_rows(run: Run, bins: list[int], parts: dict[str, Any]) -> list[Measured]:
    found: dict[str, list[list[float]]] = {name: scores(part, "along") for name, part in parts.items()}
    run.figure(
        f"Loss along a text, trained on {bins[2]} bytes (mean of {len(found['delta rule'])} seeds)",
        [
            Series(name, [(a + b) / 2 for a, b in pairwise(bins)], [mean(at) for at in zip(*each, strict=True)])
            for name, each in found.items()
        ],
        x_label="position",
        y_label="nats per byte",
        log_x=True,
    )
    rises = {name: [one[-1] - one[1] for one in each] for name, each in found.items()}
    plain, decayed = found["delta rule"], found["with a decay"]
    more = gaps(rises["with a decay"], rises["delta rule"])
    each = "; ".join(f"{name} {listed([mean(at) for at in zip(*one, strict=True)])}" for name, one in found.items())
    where = f"at {bins[-2]}–{bins[-1]} less at {bins[1]}–{bins[2]}, where training ended"
    edges = ", ".join(map(str, bins))
    judge = run.budget != "smoke"
    return [
        Measured(
            "length",
            f"{signed(rises['delta rule'])} nats",
            min(rises["delta rule"]) > 0 if judge else None,
            f"{where}; asked of every seed: above 0. The other arms: "
            + "; ".join(f"{name} {signed(values)}" for name, values in rises.items() if name != "delta rule")
            + f". Nats per byte between {edges}, mean of seeds, the same bytes in each: {each}",
        ),
        Measured(
            "decay",
            f"rises by {signed(more)} more; loss there {listed([v[-1] for v in plain])} "
            f"against {listed([v[-1] for v in decayed])}",
            min(more) > 0 if judge else None,
            "asked of every seed: above 0",
        ),
    ]
