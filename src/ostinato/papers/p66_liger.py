"""66 Liger: a trained Transformer as a gated recurrence with a window, after a little low-rank adaptation
(arXiv 2503.01496).
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from ostinato.files import write_atomically
from ostinato.layers.lora import add_lora
from ostinato.models.language import LanguageModel
from ostinato.models.linearize import added_parameters, linearize
from ostinato.papers import liger_smollm2
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.text import Text
from ostinato.training.attention_transfer import transfer_attention
from ostinato.training.ensemble import fit_together
from ostinato.training.fit import fit

claims = (
    Claim("recovers", "adapted Liger-GLA recovers ≥ 0.85 of the teacher", theirs="93 % (8B, 0.02 % of the tokens)"),
    Claim("gate", "the gate off the keys does better than a fresh one", theirs="perplexity 2.96 against 3.16"),
    Claim(
        "features", "softmax as the feature map does better than a learned one", theirs="perplexity 2.96 against 9.04"
    ),
    Claim("ungated", "the gate does better than none", theirs="perplexity 2.96 against 3.00"),
    Claim("low rank", "LoRA does better than learning every weight", theirs="perplexity 2.96 against 3.23"),
    Claim("window", "the recurrence alone is worse by ≥ 0.1 nats", theirs="perplexity 2.96 against 3.75"),
    Claim("window alone", "both halves do better than the window alone", theirs="perplexity 2.96 against 3.01"),
    Claim("parameters", "conversion adds no parameter", theirs="definition"),
    Claim("steps", "step by step is the parallel pass (1e-4 in float32)", theirs="definition"),
    *liger_smollm2.claims,
)

_ARMS: dict[str, dict[str, Any]] = {
    "Liger-GLA": {},
    "fresh gate": {"gate": "fresh"},
    "learned features": {"features": "learned"},
    "no gate": {"gate": "none"},
    "full fine-tuning": {},
    "recurrence alone": {"mix": 1.0},
    "window alone": {"recurrence": None},
    "Liger-HGRN2": {"recurrence": "hgrn2"},
    "Liger-GSA": {"recurrence": "gsa"},
    "LoLCATs": {"recurrence": "lolcats"},
    "teacher": {},
    "random weights": {},
}
_CONTROLS = {
    "gate": ("fresh gate", 0.0),
    "features": ("learned features", 0.0),
    "ungated": ("no gate", 0.0),
    "low rank": ("full fine-tuning", 0.0),
    "window": ("recurrence alone", 0.1),
    "window alone": ("window alone", 0.0),
}
"""The arm that a claim sets beside Liger-GLA, and by how many nats it is to be worse."""
_WINDOW = 16


def experiment(run: Run) -> list[Measured]:
    """A teacher on four fifths of a text; conversions and controls adapted to the rest, all with the same updates."""
    length = run.choose(smoke=32, cpu=128, gpu=256)
    steps = run.choose(smoke=2, cpu=1500, gpu=3000)
    updates = run.choose(smoke=1, cpu=150, gpu=150)
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    several = ["Liger-GLA", *(arm for arm, _ in _CONTROLS.values())]
    several = several if run.budget != "cpu" else ["Liger-GLA", "fresh gate", "recurrence alone"]
    width = run.choose(smoke=16, cpu=128, gpu=128)
    run.sizes |= {
        "teacher": f"4 layers, d {width}, 4 heads, bytes, T {length}, {steps} steps of 16, AdamW 1e-3",
        "adaptation": f"LoRA 8 on q, k, v, {updates} steps of 8, AdamW 1e-3, window {_WINDOW}, 16 slots; what an arm "
        "adds (a gate, features), and every weight in full fine-tuning, is learned at the same rate",
        "share of the teacher's tokens": updates * 8 / (steps * 16),
        "seeds": f"{len(seeds)} of {', '.join(several)}; 1 of the others, and of the teacher",
        "LoLCATs": "the first half of its updates are attention transfer (AdamW 1e-2), the second LoRA",
    }
    folder = run.folder / f"teacher-{run.budget}-{run.seed}"
    # Used here, so that no arm begins before the teacher is there.
    run.sizes["teacher's parameters"] = int(run.part("teacher", _teach, folder, width, length, steps, run.seed))
    if not (folder / "config.json").is_file():
        _teach(folder, width, length, steps, run.seed)
    found = {
        name: [
            run.part(f"{name}-{seed}", _adapt, folder, name, length, updates, seed)
            for seed in (seeds if name in several else seeds[:1])
        ]
        for name in _ARMS
        if name != "Liger-GSA" or run.budget != "cpu"  # seconds an update on two cores
    }
    exact = run.part("exact", _exact, folder)
    real = liger_smollm2.gather(run)
    run.figure(
        "Nats per byte of held-out text",
        [
            Series(when, list(range(len(found))), [mean(each[when] for each in arm) for arm in found.values()])
            for when in ("converted", "adapted")
        ],
        categories=list(found),
        y_label="nats per byte",
    )
    rows = _rows(found)
    if run.budget == "smoke":
        rows = [Measured(row.key, row.ours, None, "too small a budget to tell") for row in rows]
    return [
        *rows,
        Measured("parameters", f"{exact['after']} of {exact['before']}", exact["after"] == exact["before"]),
        Measured(
            "steps", f"largest difference {exact['difference']:.1e}", exact["difference"] <= 1e-4, "3 recurrences"
        ),
        *liger_smollm2.measure(run, real),
    ]


def _rows(found: dict[str, list[dict[str, float]]]) -> list[Measured]:
    loss = {name: mean(each["adapted"] for each in arm) for name, arm in found.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in loss.items())
    floor, ours, teacher = loss["random weights"], loss["Liger-GLA"], loss["teacher"]
    share = (floor - ours) / (floor - teacher)
    own = [each["adapted"] for each in found["Liger-GLA"]]
    rows = [Measured("recovers", f"{share:.3f}", share >= 0.85, f"nats per byte: {shown}")]
    for key, (arm, least) in _CONTROLS.items():
        # An arm of one seed is set beside the same seed of ours.
        worse = [control["adapted"] - with_it for control, with_it in zip(found[arm], own, strict=False)]
        by_seed = ", ".join(f"{value:+.4f}" for value in worse)
        wanted = f"held if all are at least {least}" if least else "held if all are above 0"
        holds = min(worse) >= least if least else min(worse) > 0
        rows.append(Measured(key, f"{mean(worse):+.4f} nats with {arm}", holds, f"by seed: {by_seed}; {wanted}"))
    return rows


def _texts(folder: Path, length: int) -> tuple[Text, Text]:
    """The teacher's text, and the rest, of which a quarter is held out."""
    whole = Text(window=length, held_out=0.2, carry=False)
    folder.mkdir(parents=True, exist_ok=True)
    rest = folder / "rest.txt"

    def write(path: Path) -> None:
        path.write_bytes(whole.test_bytes)

    write_atomically(rest, write)  # others may be reading it
    return whole, Text(files=(str(rest),), window=length, held_out=0.25, carry=False, binary=True)


def _teach(folder: Path, width: int, length: int, steps: int, seed: int) -> int:
    """Train the teacher and save it; its parameters."""
    task, _ = _texts(folder, length)
    # One seed, but recorded: on a GPU its steps would take longer to launch than to compute.
    (teacher,) = fit_together(
        lambda seed: LanguageModel(d_model=width, plan="attention(heads=4)", depth=4),
        task,
        [seed],
        steps=steps,
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup=min(200, steps // 20),
        final_learning_rate=0.1,
    )
    assert isinstance(teacher, LanguageModel)
    teacher.save_pretrained(folder)
    return teacher.num_parameters()


def _adapt(folder: Path, name: str, length: int, updates: int, seed: int) -> dict[str, float]:
    """Nats per byte of the held-out quarter, before and after the updates."""
    torch.manual_seed(seed)
    teacher = LanguageModel.from_pretrained(folder)
    _, task = _texts(folder, length)
    model = teacher if name == "teacher" else linearize(teacher, window=_WINDOW, **_ARMS[name])
    if name == "random weights":
        model = LanguageModel(**model.config)
    before = _nats(model, task, length)
    transfers = updates // 2 if name == "LoLCATs" else 0
    if transfers:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shown = (task.train_batch(step, 8, seed).inputs for step in range(transfers))
        transfer_attention(model.to(device), teacher.to(device), shown)
    if name not in ("random weights", "full fine-tuning"):
        add_lora(model, rank=8)
        if name != "LoLCATs":  # whose features have had their updates
            for parameter in added_parameters(model).values():
                parameter.requires_grad_(True)
    fit(
        model.train(),
        task,
        steps=updates - transfers,
        batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.0,
        seed=seed,
        progress=False,
        evaluate_every=0,
        evaluation_batches=1,
    )
    return {"converted": before, "adapted": _nats(model, task, length)}


@torch.no_grad()
def _nats(model: LanguageModel, task: Text, length: int) -> float:
    """The loss over the held-out bytes, in pieces of the trained length, each read from its beginning."""
    tokens = torch.frombuffer(bytearray(task.test_bytes), dtype=torch.uint8).long()
    pieces = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)[:128].to(model.device)
    model.eval()
    logits, _ = model(pieces[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())) if len(pieces) else math.inf


@torch.no_grad()
def _exact(folder: Path) -> dict[str, float]:
    """Parameters before and after, and the largest difference between steps and the parallel pass."""
    teacher = LanguageModel.from_pretrained(folder)
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    worst, after = 0.0, 0
    for recurrence in ("gla", "hgrn2", "gsa"):
        model = linearize(teacher, recurrence, _WINDOW)
        after = max(after, model.num_parameters())
        together, _ = model(tokens)
        state = model.initial_state(2)
        for t in range(tokens.shape[1]):
            logits, state = model.step(tokens[:, t], state)
            worst = max(worst, float((logits - together[:, t]).abs().max()))
    return {"before": teacher.num_parameters(), "after": after, "difference": worst}
