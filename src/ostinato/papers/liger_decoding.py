"""Decoding speed and bytes of state on SmolLM2-135M: the original with its caches beside Liger-GLA (arXiv 2503.01496).

One part for each kind of decoding and each context. A step takes as long whatever a cache holds, so that the caches of
the original are filled at random, at once; Liger-GLA reads as many tokens, to show what its state weighs then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

import ostinato.state
from ostinato.mixers.attention import AttentionCache
from ostinato.models.captured import CapturedStep
from ostinato.models.fixed_cache import FixedCacheDecoder
from ostinato.models.language import LanguageModel, LanguageState
from ostinato.papers.runner import Measured, Run
from ostinato.report import Series
from ostinato.timing import time_together

Made = Callable[[str], LanguageModel]
"""The model of an arm, by name: "original" or "Liger-GLA"."""
Speeds = dict[str, dict[int, dict[str, dict[str, float]]]]
"""By kind of decoding and context: "tokens/s" and "bytes", by how the steps were made."""

GROWN, FIXED, LIGER = "original, its own state", "original, fixed cache", "Liger-GLA"
_PIECE = 16384
"""Tokens that are read at once: a piece launches as many kernels as any other."""


def gather(run: Run, made: Made, contexts: list[int], steps: int) -> Speeds:
    """The parts: every kind of decoding at every context."""
    return {
        kind: {
            context: run.timed_part(f"real decoding {kind} {context}", decoded, made, kind, context, steps)
            for context in contexts
        }
        for kind in (GROWN, FIXED, LIGER)
    }


@torch.no_grad()
def decoded(made: Made, kind: str, context: int, steps: int) -> dict[str, dict[str, float]]:
    """Tokens a second after `context` tokens, of all rows together, and bytes of state.

    Step by step; on a GPU, in bfloat16, also as a CUDA graph, of one row and of eight. The state that grows is copied
    at every step, and no graph holds it.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = _placed(made, "original" if kind != LIGER else "Liger-GLA", where)
    if kind == GROWN:
        grown = _filled(model, context)
        size = float(ostinato.state.num_bytes(grown.layers))
        rate = _rate(_walk(model, grown, steps, model.device), steps, model.device)
        return {"tokens/s": {kind: rate}, "bytes": {kind: size}}
    stepper: Any
    state: Any
    stepper, state = _fixed(model, context, 1) if kind == FIXED else (model, _read(model, context))
    rates = {kind: _rate(_walk(stepper, state, steps, model.device), steps, model.device)}
    size = float(ostinato.state.num_bytes((state.keys, state.values) if kind == FIXED else state.layers))
    sizes = {kind: size}
    for batch in (1, 8) if where == "cuda" else ():
        if batch > 1:
            state = _fixed(model, context, batch)[1] if kind == FIXED else ostinato.state.select(state, [0] * batch)
        name = f"{kind}, graph" + (f", batch {batch}" if batch > 1 else "")
        rates[name] = batch * _rate(_replay(CapturedStep(stepper, state), batch, steps), steps, model.device)
        if batch > 1:
            sizes[f"{kind}, batch {batch}"] = batch * size
    return {"tokens/s": rates, "bytes": sizes}


@lru_cache(maxsize=2)
def _placed(made: Made, name: str, where: str) -> LanguageModel:
    """On the device, in the type that it decodes in there."""
    return made(name).to(where, torch.bfloat16 if where == "cuda" else torch.float32).eval()


def _rate(call: Callable[[], None], steps: int, device: torch.device) -> float:
    """Calls of `steps` steps as steps a second: the median of three, after one that does not count."""
    return steps / time_together({"steps": call}, rounds=3, warm_up=1, device=device)["steps"].median


def _walk(model: Any, state: Any, steps: int, device: torch.device) -> Callable[[], None]:
    token = torch.zeros(1, dtype=torch.long, device=device)

    def walk() -> None:
        now = state
        for _ in range(steps):
            _, now = model.step(token, now)

    return walk


def _replay(graph: CapturedStep, batch: int, steps: int) -> Callable[[], None]:
    token = torch.zeros(batch, dtype=torch.long, device="cuda")

    def replay() -> None:
        for _ in range(steps):
            graph(token)

    return replay


def _fixed(model: LanguageModel, context: int, batch: int) -> tuple[FixedCacheDecoder, Any]:
    """The original with a cache of the context's capacity, full."""
    decoder = FixedCacheDecoder(model, context)
    cache = decoder.initial_state(batch)
    for part in (*cache.keys, *cache.values):
        part.normal_()
    cache.filled.fill_(context)
    return decoder, cache


def _filled(model: LanguageModel, context: int) -> LanguageState:
    """A state of full attention after `context` steps, filled at random."""
    empty = model.initial_state(1)
    layers = []
    for cache in empty.layers:
        keys, values = (x.new_empty(1, context, *x.shape[2:]).normal_() for x in (cache.keys, cache.values))
        valid = torch.ones(1, context, dtype=torch.bool, device=keys.device)
        layers.append(AttentionCache(keys, values, valid, torch.full_like(cache.position, context)))
    return LanguageState(tuple(layers), empty.output)


def _read(model: LanguageModel, context: int) -> LanguageState:
    """The state after `context` random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (1, context), generator=generator).to(model.device)
    state = model.initial_state(1)
    for part in tokens.split(_PIECE, dim=1):
        _, state = model._hidden(part, state)
    return ostinato.state.clone(state)


def figure(run: Run, speeds: Speeds) -> None:
    """Tokens a second over the context."""
    contexts = list(speeds[LIGER])
    run.figure(
        "SmolLM2-135M, decoding one sequence, or eight at once",
        [Series(name, contexts, each) for name, each in _by_name(speeds, "tokens/s").items()],
        x_label="tokens of context",
        y_label="tokens per second",
        log_x=True,
        log_y=True,
    )


def row(key: str, speeds: Speeds) -> Measured:
    """Liger-GLA against the fastest way to decode with the original, at the longest context."""
    contexts = list(speeds[LIGER])
    rates, sizes = _by_name(speeds, "tokens/s"), _by_name(speeds, "bytes")
    alone = [name for name in rates if "batch" not in name]
    own = max(rates[name][-1] for name in alone if name.startswith(LIGER))
    theirs = max(rates[name][-1] for name in alone if name.startswith("original"))
    table = "; ".join(f"{name} {', '.join(f'{rate:.0f}' for rate in each)}" for name, each in rates.items())
    state = "; ".join(f"{name} {', '.join(f'{size / 1e6:.1f}' for size in each)}" for name, each in sizes.items())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Measured(
        key,
        f"{own:.0f} tokens/s against {theirs:.0f} at {contexts[-1]}, {sizes[LIGER][-1] / 1e6:.1f} MB of state "
        f"against {sizes[FIXED][-1] / 1e6:.1f}",
        len(set(sizes[LIGER])) == 1 and own > theirs,
        f"against the original's fastest, batch 1. At {', '.join(map(str, contexts))} tokens on {device}, tokens/s: "
        f"{table}. MB: {state}",
    )


def _by_name(speeds: Speeds, what: str) -> dict[str, list[float]]:
    """By how the steps were made, at every context."""
    found: dict[str, list[float]] = {}
    for of_contexts in speeds.values():
        for each in of_contexts.values():
            for name, value in each[what].items():
                found.setdefault(name, []).append(value)
    return found
