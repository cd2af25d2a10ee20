"""36 Just read twice: what a recurrence recalls depends on the order it reads in, unless it reads twice or reads the
prompt as a whole (arXiv 2407.05483).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ostinato.mixers.attention import Attention
from ostinato.mixers.prefix_linear_attention import PrefixLinearAttention
from ostinato.models.jrt import PromptClassifier
from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.just_read_twice_records import (
    LAYERS,
    READERS,
    fill_row,
    fitted,
    reader_rows,
    readers,
    spread,
    whole_reader,
)
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.read_again import ReadAgain
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.set_disjointness import SetDisjointness
from ostinato.timing import time_together
from ostinato.training.evaluate import evaluate

claims = (
    Claim(
        "order",
        "a causal recurrence does better when the shorter set comes first, by ≥ 0.15 at equal lengths",
        theirs="figure 2 (no number)",
    ),
    Claim("whole", "reading the prompt as a whole halves that gap, and the longer set first rises", theirs="figure 2"),
    Claim("twice", "so does reading it twice", theirs="+11.0 ± 1.3 points on six recall tasks (JRT-Prompt)"),
    Claim("memory", "the smaller the state, the larger the gap", theirs="figure 2 (4 to 24 features)"),
    Claim("recall", "two readings of the pairs: recall ≥ 0.10 above one", theirs="+11.0 ± 1.3 points"),
    Claim("state", "reading the prompt and stepping is the parallel form (1e-5 in float32)", theirs="definition"),
    Claim(
        "fill",
        "a prompt shorter than the prefix: reading it again is best, then reading anew at each token, then padding",
        theirs="82.0, 76.3, 61.9 (FDA cut at 512)",
    ),
    Claim(
        "quality",
        "asked for a value, reading the prompt as a whole is near attention, ahead of the causal layer and of Mamba",
        theirs="42.9; attention 43.4, Based 29.2, Mamba 24.0 (360M)",
    ),
    Claim("longer", "ahead of the causal layer on prompts longer than any trained on too", theirs="beyond 2k tokens"),
    Claim(
        "prefill",
        "reads a prompt faster than attention does: JRT-RNN, and twice by the causal layer",
        theirs="19.2 × and 11.9 × FlashAttention-2 (32k, batch 16, H100)",
    ),
)

_ARMS = {
    "causal": (LAYERS.format(8), False, 1),
    "whole prompt": (LAYERS.format(8), True, 1),
    "read twice": (LAYERS.format(8), False, 2),
    "softmax attention": ("gated_convolution, attention(heads=2, rope=False)", False, 1),
}
"""The layers, whether the prompt is a prefix, and the readings."""
_TRAINED = ("order", "whole", "twice", "memory", "fill", "quality", "longer")
"""The claims that the gpu budget alone trains for."""
_NARROW = (2, 4)
"""Features of the causal layer with a smaller state; above they are 8."""


def experiment(run: Run) -> list[Measured]:
    """Two sets in both orders, pairs read once and twice, short prompts, the time of a prompt."""
    seeds = [run.seed + index for index in range(run.choose(smoke=2, cpu=3, gpu=3))]
    steps = {
        "sets": run.choose(smoke=1, cpu=0, gpu=6000),
        "pairs": run.choose(smoke=1, cpu=1000, gpu=3000),
        "records": run.choose(smoke=1, cpu=0, gpu=3000),
    }
    run.sizes |= {
        "model": "2 × [gated convolution (3), linear attention with Taylor features of 8], d 48, 2 heads, no MLP",
        "training": "AdamW 8e-4 (pairs and records 2e-3), warm-up, cosine to 0; batch 126 of all sizes; "
        f"steps {steps} ({steps['sets'] * 126 / 120_000:.1f} epochs of 120,000 for sets)",
        "seeds": len(seeds),
    }
    tests = run.choose(smoke=4, cpu=256, gpu=512)
    sets = {
        name: run.part(f"sets-{name}", _sets, *arm, steps["sets"], tests, seeds, run)
        for name, arm in _ARMS.items()
        if steps["sets"]
    }
    pairs = {
        str(readings): run.part(f"pairs-{readings}", _pairs, readings, steps["pairs"], tests, seeds, run)
        for readings in (1, 2)
    }
    gap = run.part("state", _state)
    times = run.timed_part("prefill times", _times, run.choose(smoke=(64,), cpu=(1024, 4096), gpu=(2048, 8192, 32768)))
    narrow = {
        width: run.part(f"sets-causal-{width}", _sets, LAYERS.format(width), False, 1, steps["sets"], tests, seeds, run)
        for width in _NARROW
        if steps["sets"]
    }
    # JRT-RNN is trained once, for prompts of every length.
    whole = (
        run.part("records by JRT-RNN", whole_reader, steps["records"], tests, seeds, run) if steps["records"] else []
    )
    read = {
        name: run.part(f"readers-{name}", readers, *reader, steps["records"], tests, seeds, run)
        for name, reader in READERS.items()
        if steps["records"]
    }
    # Every part before any value: parts may be computed side by side.
    rows = [_pairs_row(pairs)]
    if steps["sets"]:
        _draw(run, sets)
        rows += [*_set_rows(sets), _memory_row({**narrow, 8: sets["causal"]})]
        rows.append(fill_row([each["short"] for each in whole]))
        rows += reader_rows({"JRT-RNN": [each["read"] for each in whole], **read})
    else:
        why = "trained in the gpu budget: too long for two cores"
        rows += [Measured(key, "not measured", None, why) for key in _TRAINED]
    rows.append(_times_row(times))
    if run.budget == "smoke":
        rows = [Measured(row.key, row.ours, None, "too small a budget to tell") for row in rows]
    state = Measured(
        "state", f"largest difference {gap:.1e}", gap <= 1e-5, "float32, 3 seeds, prompts of 40 of 64 tokens"
    )
    return [*rows, state]


# --------------------------------------------------------------------------------------------------
# Two sets.


def _sets(
    plan: str, whole: bool, readings: int, steps: int, tests: int, seeds: list[int], run: Run
) -> list[dict[str, float]]:
    """Every seed's accuracy on each pair of sizes."""
    task = SetDisjointness(readings=readings, mixed=True, test_size=tests)

    def build(seed: int) -> PromptClassifier:
        return PromptClassifier(task.vocab_size, 48, plan, 4, start=1, ask=3, whole=whole, channel_mixer=None)

    ensemble = fitted(build, task, steps, seeds, 8e-4, 126, run)
    found = [evaluate(model, task) for model in ensemble]
    return [
        {key.partition("/")[2]: value for key, value in each.items() if key.startswith("accuracy/")} for each in found
    ]


def _orders(each: dict[str, float]) -> tuple[float, float]:
    """Accuracy with the shorter set first, and with the longer."""
    sizes = {key: [int(part.split()[1]) for part in key.split(", ")] for key in each}
    short = [each[key] for key, (first, second) in sizes.items() if first < second]
    long = [each[key] for key, (first, second) in sizes.items() if first > second]
    return mean(short), mean(long)


def _set_rows(found: dict[str, list[dict[str, float]]]) -> list[Measured]:
    orders = {name: [_orders(each) for each in arm] for name, arm in found.items()}
    shown = {
        name: f"{spread([s for s, _ in each])} shorter first, {spread([long for _, long in each])} longer first"
        for name, each in orders.items()
    }
    gaps = {name: mean(short - long for short, long in each) for name, each in orders.items()}
    longer = {name: mean(long for _, long in each) for name, each in orders.items()}
    note = f"(2, 32), (4, 48) and back; softmax attention: {shown['softmax attention']}; chance 0.008"

    def halves(key: str, name: str) -> Measured:
        # Half of a gap that is not there says nothing.
        known = gaps["causal"] >= 0.05
        held = abs(gaps[name]) <= gaps["causal"] / 2 and longer[name] > longer["causal"]
        return Measured(
            key,
            ours=f"gap {gaps[name]:.3f} against {gaps['causal']:.3f}; {shown[name]}",
            holds=held if known else None,
            note="" if known else "the causal arm shows no gap to halve",
        )

    first = Measured("order", f"gap {gaps['causal']:.3f}: {shown['causal']}", gaps["causal"] >= 0.15, note)
    return [first, halves("whole", "whole prompt"), halves("twice", "read twice")]


def _memory_row(found: dict[int, list[dict[str, float]]]) -> Measured:
    gaps = {width: mean(short - long for short, long in map(_orders, each)) for width, each in found.items()}
    orders = {
        width: [spread(list(one)) for one in zip(*map(_orders, each), strict=True)] for width, each in found.items()
    }
    return Measured(
        "memory",
        ours="; ".join(f"{width} features {gap:+.3f}" for width, gap in gaps.items()),
        holds=list(gaps.values()) == sorted(gaps.values(), reverse=True) and gaps[_NARROW[0]] > 0,
        note="accuracy with the shorter set first less with the longer; asked: it falls as the features grow, and is "
        "above 0 with the fewest. Shorter, longer first: "
        + "; ".join(f"{width}: {short}, {long}" for width, (short, long) in orders.items()),
    )


def _draw(run: Run, found: dict[str, list[dict[str, float]]]) -> None:
    names = list(next(iter(found.values()))[0])
    run.figure(
        "Set disjointness by the sizes of the two sets, in order",
        [
            Series(arm, list(range(len(names))), [mean(each[name] for each in seeds) for name in names])
            for arm, seeds in found.items()
        ],
        categories=names,
        y_label="accuracy",
    )


# --------------------------------------------------------------------------------------------------
# Pairs.


def _pairs(readings: int, steps: int, tests: int, seeds: list[int], run: Run) -> list[float]:
    """Recall of 16 pairs by causal linear attention of few features."""
    recall = MultiQueryRecall(vocabulary=128, length=64, pairs=16, random_filling=False, test_size=tests)
    task = ReadAgain(recall, context=32, readings=readings)
    plan = "gated_convolution, prefix_linear_attention(heads=2, feature_dim=3)"
    ensemble = fitted(
        lambda seed: TokenClassifier(task.vocab_size, 48, plan, 4, channel_mixer=None),
        task,
        steps,
        seeds,
        2e-3,
        64,
        run,
    )
    return [evaluate(model, task)["accuracy"] for model in ensemble]


def _pairs_row(found: dict[str, list[float]]) -> Measured:
    gain = mean(found["2"]) - mean(found["1"])
    return Measured(
        "recall",
        ours=f"one reading {spread(found['1'])}, two {spread(found['2'])}",
        holds=gain >= 0.10,
        note="MQAR, 16 pairs, 13 features a head; chance 0.016",
    )


# --------------------------------------------------------------------------------------------------
# A prompt, its state, and its length.


@torch.no_grad()
def _state() -> float:
    """The largest difference between the parallel form and prompt, then steps; in float32."""
    worst = 0.0
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = PrefixLinearAttention(64, heads=4)
            x = torch.randn(2, 64, 64)
        prefix = (torch.arange(64) < 40).expand(2, -1)
        whole, _ = mixer(x, prefix=prefix)
        first, state = mixer(x[:, :40], prefix=prefix[:, :40])
        pieces = [first]
        for t in range(40, 64):
            y, state = mixer.step(x[:, t], state)
            pieces.append(y.unsqueeze(1))
        worst = max(worst, float((torch.cat(pieces, 1) - whole).abs().max()))
    return worst


# --------------------------------------------------------------------------------------------------
# Time.


def _times(lengths: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds to read a prompt, by its length and the layer."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    width, heads, batch = (1024, 16, 2) if on_gpu else (256, 4, 1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    linear = PrefixLinearAttention(width, heads).to(device, dtype)
    softmax = Attention(width, heads, rope=False).to(device, dtype)
    found: dict[str, dict[str, float]] = {}
    for length in lengths:
        x = torch.randn(batch, length, width, device=device, dtype=dtype)
        calls: dict[str, Callable[[], Any]] = {
            "causal": partial(_read, linear, x, None),
            "read twice": partial(_read, linear, torch.cat([x, x], 1), None),
            "whole": partial(_read, linear, x, torch.ones(batch, length, dtype=torch.bool, device=device)),
            "attention": partial(_attend, softmax, x),
        }
        timed = time_together(calls, rounds=5, warm_up=1, budget=15, device=device)
        found[str(length)] = {name: 1e3 * timing.median for name, timing in timed.items()}
    return found


@torch.no_grad()
def _read(mixer: PrefixLinearAttention, x: torch.Tensor, prefix: torch.Tensor | None) -> None:
    mixer(x, prefix=prefix)


@torch.no_grad()
def _attend(mixer: Attention, x: torch.Tensor) -> None:
    """Fused causal attention: FlashAttention on the H100."""
    maps = mixer.to_query, mixer.to_key, mixer.to_value
    parts = [to(x).unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for to in maps]
    mixer.to_output(scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(-2))


def _times_row(times: dict[str, dict[str, float]]) -> Measured:
    longest = times[list(times)[-1]]
    whole, twice = (longest["attention"] / longest[name] for name in ("whole", "read twice"))
    return Measured(
        "prefill",
        ours=f"{whole:.2f} × and {twice:.2f} × at {list(times)[-1]} tokens",
        holds=whole > 1 and twice > 1,
        note="one layer, milliseconds: "
        + "; ".join(
            f"{length}: " + ", ".join(f"{name} {took:.1f}" for name, took in each.items())
            for length, each in times.items()
        )
        + "; ours has no fused kernel that makes the features on the chip",
    )
