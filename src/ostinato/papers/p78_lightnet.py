"""78 LightNet: additive weights need one scan for any number of dimensions (arXiv 2405.21022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch

from ostinato.layers.md_tpe import MDTPE
from ostinato.mixers.registry import mixer
from ostinato.models.grid_classifier import GridClassifier
from ostinato.models.plan import Layer, Plan
from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.base import Task
from ostinato.tasks.masked_text import MaskedText
from ostinato.tasks.shifted_digits import ShiftedDigits
from ostinato.tasks.text import Text
from ostinato.timing import time_together
from ostinato.training.ensemble import Ensemble, fit_together
from ostinato.training.evaluate import evaluate
from ostinato.training.recorded import Recorded

claims = (
    Claim(
        "exact",
        "the additive recurrence is a gated scan, and its last state the one sum over the whole input",
        theirs="equations",
    ),
    Claim(
        "places",
        "a global sum needs position encodings: without them, ≥ 5 points below both together",
        theirs="not confirmed; the ablation's gains partly marginal (reviews)",
    ),
    Claim(
        "one scan",
        "one pass is enough: within 1.5 points of a gated model that scans in four orders",
        theirs="similar to softmax attention and multi-scan models (reviews)",
    ),
    Claim(
        "softmax key",
        "the softmax over positions is what helps: above plain linear attention with the same encodings",
        theirs="not compared (a criticism of the reviews)",
    ),
    Claim(
        "masked",
        "as a language model of both directions ahead of the others: lower loss on masked bytes",
        theirs="clearly ahead within 24 hours of training (reviews)",
    ),
    Claim("latency", "a layer is ≥ 2 × as fast as two scans, and ≥ 3 × as fast as four", theirs="lower (a figure)"),
    Claim(
        "causal",
        "as a causal language model within 0.1 nats of GLA",
        theirs="about level with Mamba (reviews)",
    ),
)

GRID = (8, 8)


def _arms() -> dict[str, tuple[dict[str, Any], bool]]:
    """Name -> a layer's name and options, and whether MD-TPE stands before the first."""
    lightnet = {"name": "whole_lightnet", "heads": 2, "grid": GRID}
    scans = {"name": "multi_scan_gla", "heads": 2}
    return {
        "LightNet, no places": ({**lightnet, "position": None}, False),
        "LightNet, MD-LRPE": (lightnet, False),
        "LightNet, MD-TPE": ({**lightnet, "position": None}, True),
        "LightNet, both": (lightnet, True),
        "linear attention, both": ({**lightnet, "weights": "elu"}, True),
        "LightNet, 2-D RoPE": ({**lightnet, "position": "rotary"}, False),
        "GLA, 1 scan": ({**scans, "scans": 1, "grid": GRID}, False),
        "GLA, 2 scans": ({**scans, "scans": 2, "grid": GRID}, False),
        "GLA, 4 scans": ({**scans, "scans": 4, "grid": GRID}, False),
        "GLA, 2 scans of their own": ({**scans, "scans": 2, "grid": GRID, "own": True}, False),
        "GLA, 4 scans of their own": ({**scans, "scans": 4, "grid": GRID, "own": True}, False),
        "softmax attention, 2-D RoPE": ({"name": "whole_attention", "heads": 2, "grid": GRID}, False),
    }


_MASKED = {
    "LightNet": "whole_lightnet(heads=2)",
    "LightNet, no places": "whole_lightnet(heads=2, position=none)",
    "linear attention": "whole_lightnet(heads=2, weights=elu)",
    "GLA, 2 scans": "multi_scan_gla(heads=2, own=True)",
    "softmax attention": "whole_attention(heads=2)",
}
_SHORT = ("LightNet, no places", "LightNet, both", "linear attention, both")
"""What fits two cores."""
_TEXT = {
    "LightNet": "lightnet(heads=2)",
    "LightNet, no places": "lightnet(heads=2, position=none)",
    "GLA": "gla(heads=2, expand_k=1)",
}


def experiment(run: Run) -> list[Measured]:
    """Equations, digits by ten models, the time of a layer, a causal language model."""
    seeds = [run.seed + index for index in range(run.choose(smoke=2, cpu=3, gpu=3))]
    steps = run.choose(smoke=1, cpu=300, gpu=1220)
    text_steps = run.choose(smoke=1, cpu=0, gpu=1500)
    tested = run.choose(smoke=20, cpu=500, gpu=500)
    sides = run.choose(smoke=(4,), cpu=(32, 64), gpu=(32, 64))
    run.sizes |= {
        "digits": f"8 × 8 pixels as tokens; 2 blocks, d 64, heads of 32, SwiGLU; AdamW 2e-3, batch 64, {steps} steps "
        f"of 64 ({steps * 64 / 1297:.0f} epochs), shifts by up to 1 pixel; 1297 train, 500 test",
        "text": f"pydoc topics, windows of 128 bytes, d 96, 2 layers, {text_steps} steps of 32; a fifth masked"
        if text_steps
        else "none",
        "timing": f"forward and backward of one layer, d 128, one head of 128, grids of {sides} squared",
        "seeds": len(seeds),
    }
    exact = run.part("equations", _equations)
    arms = _arms()
    found = {
        name: run.part(f"digits-{name}", _digits, *arms[name], steps, seeds, tested, run)
        for name in run.choose(smoke=(*_SHORT, "GLA, 4 scans"), cpu=_SHORT, gpu=tuple(arms))
    }
    floors = run.part("floors", ShiftedDigits(test_size=tested).baselines)
    times = run.timed_part("timings", _times, sides)
    text, masked = (
        {
            name: run.part(f"{kind}-{name}", function, plan, text_steps, seeds, run)
            for name, plan in plans.items()
            if text_steps
        }
        for kind, function, plans in (("text", _text, _TEXT), ("masked", _masked, _MASKED))
    )
    # Every part before any value: parts may be computed side by side.
    rows = [
        Measured(
            "exact",
            ours=f"largest difference {exact['scan']:.1e}; last state {exact['state']:.1e}; constant added to k "
            f"{exact['shift']:.1e}",
            holds=max(exact.values()) <= 1e-10,
            note="float64, T = 300, against the explicit mean",
        )
    ]
    rows += _digit_rows(run, found, floors)
    rows.append(_latency_row(times))
    if run.budget == "cpu":
        why = "the gpu budget trains language models"
        return [*rows, *(Measured(key, "not measured", None, why) for key in ("causal", "masked"))]
    best = min(mean(text[name]) for name in ("LightNet", "LightNet, no places"))
    rows.append(
        Measured(
            "causal",
            ours="; ".join(f"{name} {_spread(values)}" for name, values in text.items()),
            holds=best - mean(text["GLA"]) <= 0.1,
            note="nats per byte of held-out text, mean ± deviation over seeds; no short convolution in any",
        )
    )
    rows.append(_masked_row(masked))
    if run.budget == "smoke":
        return [rows[0], *(Measured(row.key, row.ours, None, "too small a budget to tell") for row in rows[1:])]
    return rows


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def _equations() -> dict[str, float]:
    from ostinato.ops.additive_attention import additive_attention
    from ostinato.ops.sequences import sequence_softmax, whole_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    y, last = additive_attention(q, 3 * k, v)
    weight = (3 * k).exp()
    memory = torch.einsum("bthk,bthv->bthkv", weight, v).cumsum(1) / weight.cumsum(1).unsqueeze(-1)
    whole = torch.einsum("bthk,bthv->bhkv", sequence_softmax(3 * k), v)
    one, other = (whole_attention(q, sequence_softmax(3 * k + constant), v) for constant in (0.0, 5.0))
    return {
        "scan": float((y - torch.einsum("bthk,bthkv->bthv", q, memory)).abs().max()),
        "state": float((last.memory - whole).abs().max()),
        "shift": float((one - other).abs().max()),
    }


def _digits(options: dict[str, Any], placed: bool, steps: int, seeds: list[int], tested: int, run: Run) -> list[float]:
    """Test accuracy of every seed."""
    task = ShiftedDigits(test_size=tested)
    layer = Layer(options["name"], {key: value for key, value in options.items() if key != "name"})

    def build(seed: int) -> GridClassifier:
        tpe = MDTPE(64, heads=2, axes=GRID) if placed else None
        return GridClassifier(1, 10, 64, Plan((layer,)), 2, positions=tpe)

    ensemble = fit_together(
        build, task, seeds, steps=steps, batch_size=64, learning_rate=2e-3, warmup=min(50, steps), say=run.say
    )
    return [evaluate(model, task)["accuracy"] for model in ensemble]


def _digit_rows(run: Run, found: dict[str, list[float]], floor: dict[str, float]) -> list[Measured]:
    means = {name: 100 * mean(values) for name, values in found.items()}
    shown = "; ".join(f"{name} {100 * mean(v):.1f} ± {100 * stdev(v):.1f}" for name, v in found.items())
    note = f"accuracy in %; {shown}; nearest image {100 * floor['nearest image']:.1f}"
    run.figure(
        "Digits: accuracy on the test set",
        [Series("a seed", *zip(*((i, score) for i, each in enumerate(found.values()) for score in each), strict=True))],
        categories=list(found),
        y_label="accuracy",
        levels={"nearest image": floor["nearest image"]},
    )
    short = "" if run.budget == "gpu" else "trained too little to tell; "
    both, plain = means["LightNet, both"], means["linear attention, both"]
    # The better of the two: orders that share their decays can cancel each other's sense of place.
    four = max((value for name, value in means.items() if name.startswith("GLA, 4 scans")), default=None)
    noise = max(stdev(found["LightNet, both"]), stdev(found["linear attention, both"])) * 100
    return [
        Measured(
            "places",
            ours=f"{means['LightNet, no places']:.1f} against {both:.1f}",
            holds=both - means["LightNet, no places"] >= 5,
            note=note,
        ),
        Measured("one scan", "not measured", None, "the gpu budget trains models that scan")
        if four is None
        else Measured(
            "one scan",
            ours=f"{both:.1f} against {four:.1f}",
            holds=four - both <= 1.5,
            note="; ".join(f"{name} {means[name]:.1f}" for name in means if name.startswith(("GLA", "softmax"))),
        ),
        Measured(
            "softmax key",
            ours=f"{both:.1f} against {plain:.1f}",
            holds=both - plain > noise if run.budget == "gpu" else None,
            note=f"{short}a difference counts that exceeds the larger deviation over seeds, {noise:.1f}",
        ),
    ]


def _times(sides: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward and a backward pass, by side and layer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 16 if device.type == "cuda" else 1
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        grid = (side, side)
        x = torch.randn(batch, side * side, 128, device=device, requires_grad=True)
        layers: dict[str, Any] = {
            "LightNet": mixer("whole_lightnet", 128, heads=1, grid=grid),
            "LightNet, no places": mixer("whole_lightnet", 128, heads=1, grid=grid, position=None),
            **{f"GLA, {n}": mixer("multi_scan_gla", 128, heads=1, scans=n, grid=grid) for n in (1, 2, 4)},
        }

        calls: dict[str, Callable[[], Any]] = {
            name: partial(_pass, layer.to(device), x) for name, layer in layers.items()
        }
        timed = time_together(calls, rounds=7, budget=20, device=device)
        found[f"{side}²"] = {name: 1e3 * timing.median for name, timing in timed.items()}
        if device.type == "cuda":
            replayed = {name: Recorded(call, device) for name, call in calls.items()}
            timed = time_together(dict(replayed), rounds=7, warm_up=5, budget=20, device=device)
            if any(one.refused for one in replayed.values()):
                continue
            found[f"{side}², replayed"] = {name: 1e3 * timing.median for name, timing in timed.items()}
    return found


def _pass(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])


def _latency_row(times: dict[str, dict[str, float]]) -> Measured:
    every = {
        side: (took["GLA, 2"] / took["LightNet"], took["GLA, 4"] / took["LightNet"]) for side, took in times.items()
    }
    ratios = {side: pair for side, pair in every.items() if "replayed" not in side}
    graphs = {side: pair for side, pair in every.items() if side not in ratios}
    without = "".join(
        f"; without the launching of kernels, {s}: {two:.1f} × and {f:.1f} ×" for s, (two, f) in graphs.items()
    )
    return Measured(
        "latency",
        ours="; ".join(f"{side}: {two:.1f} × and {four:.1f} ×" for side, (two, four) in ratios.items()),
        holds=all(two >= 2 and four >= 3 for two, four in ratios.values()),
        note="milliseconds: "
        + "; ".join(
            f"{side} " + ", ".join(f"{name} {took:.1f}" for name, took in each.items()) for side, each in times.items()
        )
        + without
        + "; scans share one set of projections and run as one, stacked along the batch",
    )


def _text(plan: str, steps: int, seeds: list[int], run: Run) -> list[float]:
    """Nats per byte of held-out text, for every seed."""
    task = Text(window=128, carry=False)
    ensemble = _trained(task, lambda _: TokenClassifier(256, 96, plan, 2), steps, seeds, run)
    return [evaluate(model, task, batches=None if steps > 10 else 1)["loss"] for model in ensemble]


def _masked(plan: str, steps: int, seeds: list[int], run: Run) -> list[float]:
    """Nats per masked byte of held-out text, for every seed."""
    task = MaskedText(test_size=run.choose(smoke=4, cpu=256, gpu=256))

    def make(_: int) -> TokenClassifier:
        return TokenClassifier(task.vocab_size, 96, plan, 2, num_classes=task.num_classes)

    return [evaluate(model, task)["loss"] for model in _trained(task, make, steps, seeds, run)]


def _trained(task: Task, make: Callable[[int], TokenClassifier], steps: int, seeds: list[int], run: Run) -> Ensemble:
    """A model of every seed, trained on a text."""
    return fit_together(
        make,
        task,
        seeds,
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup=min(50, steps),
        say=run.say,
    )


def _masked_row(found: dict[str, list[float]]) -> Measured:
    means = {name: mean(values) for name, values in found.items()}
    others = min(value for name, value in means.items() if not name.startswith("LightNet"))
    return Measured(
        "masked",
        ours="; ".join(f"{name} {_spread(values)}" for name, values in found.items()),
        holds=means["LightNet"] < others,
        note="nats per masked byte, held out; means are compared; equal updates, not equal time",
    )
