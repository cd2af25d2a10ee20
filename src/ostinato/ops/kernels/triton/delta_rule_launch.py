"""Launches of the kernels of `delta_rule`: how a call is cut up, and what each kernel is handed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.ops.checks import HALF
from ostinato.ops.kernels.triton import delta_rule_channels as of_channels
from ostinato.ops.kernels.triton import delta_rule_chunks as of_heads
from ostinato.ops.kernels.triton import delta_rule_walk as walks
from ostinato.ops.kernels.triton.launch import dot_precision, power_of_two


class Plan(NamedTuple):
    """Sizes and launch options of one call."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    micro: int
    """Rows to a token."""
    chunk: int
    """Rows to a chunk."""
    chunks: int
    query_block: int
    key_block: int
    value_block: int
    """Value channels of a program of the walk."""
    walk_warps: int
    walk_stages: int
    back_block: int
    back_warps: int
    back_stages: int
    gradient_block: int
    gradient_warps: int
    gradient_stages: int
    prepare_warps: int

    @property
    def pairs(self) -> int:
        """Batch × heads."""
        return self.batch * self.heads

    @property
    def levels(self) -> int:
        """Halvings of a chunk's tokens."""
        return (power_of_two(self.chunk // self.micro) - 1).bit_length()

    def sizes(self) -> tuple[int, int, int]:
        """The sizes that are arguments of all kernels."""
        return self.tokens, self.heads, self.chunks

    def constants(self, *, values: int = 0) -> dict[str, Any]:
        """The compile-time constants that all kernels share; with `values`, also the value block of that width."""
        found = {
            "K": self.key_dim,
            "BK": self.key_block,
            "C": self.chunk,
            "MICRO": self.micro,
            "BQ": self.query_block,
        }
        return {**found, "V": self.value_dim, "BV": values} if values else found


OVERRIDES: dict[str, int] = {}
"""Launch options to try instead of the planned ones, by their names in `Plan`: for tuning."""


def plan(queries: Tensor, keys: Tensor, values: Tensor, *, channels: bool) -> Plan:
    """Choose the sizes of a call: chunks of 64 rows, or 32 where tiles are large, and value blocks to fit registers."""
    batch, tokens, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    micro = keys.shape[1] // tokens
    half = queries.dtype in HALF
    key_block, all_values = max(16, power_of_two(key_dim)), max(16, power_of_two(value_dim))
    large = not half or (channels and key_block > 128)
    chunk = OVERRIDES.get("chunk", 32 if large else 64)
    per_chunk = chunk // micro
    widest = min(64, 8192 // key_block) if half else 32
    found = Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        micro=micro,
        chunk=chunk,
        chunks=_cdiv(tokens, per_chunk),
        query_block=max(16, power_of_two(per_chunk)),
        key_block=key_block,
        value_block=min(widest, all_values),
        walk_warps=4,
        walk_stages=2,
        back_block=min(widest, all_values),
        back_warps=4,
        back_stages=2,
        gradient_block=min(64 if half and key_block <= 128 else 32, all_values),
        gradient_warps=8,
        gradient_stages=1,
        prepare_warps=8 if channels else 4,
    )
    return found._replace(**OVERRIDES) if OVERRIDES else found


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


class Chunks(NamedTuple):
    """What a call's chunks are made of: all that the walks read beside the values."""

    asking: Tensor
    """The queries, as they come where decays are per head, else with their decays."""
    reading: Tensor
    writing: Tensor
    """The keys, likewise."""
    inverse: Tensor
    scores: Tensor
    factors: Tensor
    carried: Tensor
    totals: Tensor | None
    """The decays per channel, summed up."""

    def walks(self) -> tuple[Tensor, ...]:
        """The arguments of a walk that belong to chunks."""
        return self.inverse, self.scores, self.factors, self.carried


def _options(queries: Tensor, beta: Tensor | None, reset: Tensor | None, normalize: bool) -> dict[str, Any]:
    return {
        "BETA": beta is not None,
        "RESET": reset is not None,
        "NORMALIZE": normalize,
        "PRECISION": dot_precision(queries.dtype),
    }


def empty_chunks(p: Plan, queries: Tensor, *, channels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for T, P, the factors of the rows and those of the states."""
    kept = (p.pairs, p.chunks)
    return (
        queries.new_empty(*kept, p.chunk, p.chunk),
        queries.new_empty(*kept, p.query_block, p.chunk),
        queries.new_empty(*kept, 4, p.chunk, dtype=torch.float32),
        queries.new_empty(*kept, *((p.key_dim,) if channels else ()), dtype=torch.float32),
    )


def prepare(
    p: Plan,
    queries: Tensor,
    keys: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    reset: Tensor | None,
    normalize: bool,
) -> Chunks:
    """T, P and the factors of all chunks; where decays are per channel also their sums, and all decayed."""
    options = _options(queries, beta, reset, normalize)
    options["SOLVE"] = "ieee" if queries.dtype == torch.float32 else "tf32x3"
    rates, flags = keys if beta is None else beta, keys if reset is None else reset
    if log_decay is None or log_decay.ndim == 3:
        room = empty_chunks(p, queries, channels=False)
        of_heads.prepare[(p.chunks, p.pairs)](
            queries,
            keys,
            rates,
            keys if log_decay is None else log_decay,
            flags,
            *room,
            *p.sizes(),
            **p.constants(),
            **options,
            DECAY=log_decay is not None,
            EXACT=queries.dtype == torch.float32,
            num_warps=p.prepare_warps,
        )
        return Chunks(queries, keys, keys, *room, None)
    room = empty_chunks(p, queries, channels=True)
    exact = torch.float64 if queries.dtype == torch.float32 else torch.float32
    totals = queries.new_empty(p.pairs, p.chunks, p.query_block, p.key_dim, dtype=exact)
    block = min(32, p.key_block)
    of_channels.cumulate[(_cdiv(p.key_dim, block), p.chunks, p.pairs)](
        log_decay,
        flags,
        totals,
        room[3],
        *p.sizes(),
        K=p.key_dim,
        BLOCK=block,
        TOKENS=p.chunk // p.micro,
        BQ=p.query_block,
        RESET=reset is not None,
        num_warps=4,
    )
    asking, reading, writing = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(keys)
    of_channels.prepare[(p.chunks, p.pairs)](
        queries,
        keys,
        rates,
        totals,
        flags,
        *room[:3],
        asking,
        reading,
        writing,
        *p.sizes(),
        **p.constants(),
        **options,
        LEVELS=p.levels,
        num_warps=p.prepare_warps,
    )
    return Chunks(asking, reading, writing, *room, totals)


def walk(
    p: Plan,
    chunks: Chunks,
    values: Tensor,
    state: Tensor | None,
    *,
    outputs: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The walk, with outputs or keeping the entering states and u. Returns the last state."""
    last = values.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    walks.walk[(_cdiv(p.value_dim, p.value_block), p.pairs, 1)](
        chunks.asking,
        chunks.reading,
        chunks.writing,
        values,
        *chunks.walks(),
        last if state is None else state,
        values if outputs is None else outputs,
        last,
        *((values, values) if kept is None else kept),
        *p.sizes(),
        p.chunks,
        **p.constants(values=p.value_block),
        OUTPUT=outputs is not None,
        KEEP=kept is not None,
        INITIAL=state is not None,
        TRANSITION=False,
        TIED=chunks.totals is None,
        CHANNELS=chunks.totals is not None,
        PRECISION=dot_precision(values.dtype),
        STAGES=p.walk_stages,
        num_warps=p.walk_warps,
    )
    return last


def walk_back(
    p: Plan, chunks: Chunks, grad_outputs: Tensor, grad_last: Tensor | None, kept: tuple[Tensor, Tensor]
) -> Tensor:
    """The walk back, keeping the gradients of the leaving states and dx. Returns the initial state's gradient."""
    grad_initial = grad_outputs.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    walks.walk_back[(_cdiv(p.value_dim, p.back_block), p.pairs, 1)](
        chunks.asking,
        chunks.reading,
        chunks.writing,
        grad_outputs,
        *chunks.walks(),
        grad_initial if grad_last is None else grad_last,
        grad_initial,
        *kept,
        *p.sizes(),
        p.chunks,
        **p.constants(values=p.back_block),
        KEEP=True,
        FINAL=grad_last is not None,
        TIED=chunks.totals is None,
        CHANNELS=chunks.totals is not None,
        PRECISION=dot_precision(grad_outputs.dtype),
        STAGES=p.back_stages,
        num_warps=p.back_warps,
    )
    return grad_initial


def gradients(
    p: Plan,
    chunks: Chunks,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    walked: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_outputs: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values, β and log-decays (empty where there is none).

    `walked` are S, dS', u and dx of all chunks.
    """
    queries, keys, values, beta, log_decay, reset = inputs
    grad_beta, grad_decay = (
        queries.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (beta, log_decay)
    )
    found = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values), grad_beta, grad_decay
    rates, flags = keys if beta is None else beta, keys if reset is None else reset
    options = {
        **p.constants(values=p.gradient_block),
        **_options(queries, beta, reset, normalize),
        "STAGES": p.gradient_stages,
        "num_warps": p.gradient_warps,
    }
    if chunks.totals is None:
        of_heads.gradients[(p.chunks, p.pairs)](
            queries,
            keys,
            values,
            rates,
            keys if log_decay is None else log_decay,
            flags,
            chunks.scores,
            *walked,
            grad_outputs,
            *found,
            *p.sizes(),
            **options,
            DECAY=log_decay is not None,
            EXACT=queries.dtype == torch.float32,
        )
    else:
        of_channels.gradients[(p.chunks, p.pairs)](
            queries,
            keys,
            values,
            rates,
            chunks.totals,
            chunks.carried,
            flags,
            *walked,
            grad_outputs,
            *found,
            *p.sizes(),
            **options,
            LEVELS=p.levels,
        )
    return found
