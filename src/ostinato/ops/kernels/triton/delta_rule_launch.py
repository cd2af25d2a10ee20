"""Launches of the kernels of `delta_rule`: what each kernel is handed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.ops.kernels.triton import delta_rule_channels as of_channels
from ostinato.ops.kernels.triton import delta_rule_channels_gradients as of_channels_gradients
from ostinato.ops.kernels.triton import delta_rule_chunks as of_heads
from ostinato.ops.kernels.triton import delta_rule_walk as walks
from ostinato.ops.kernels.triton.delta_rule_parts import KEPT, ROWS
from ostinato.ops.kernels.triton.delta_rule_plan import Plan
from ostinato.ops.kernels.triton.launch import cdiv, dot_precision, power_of_two


class Inputs(NamedTuple):
    """What a call is given, beside the initial state."""

    queries: Tensor
    keys: Tensor
    """Those that read, and those that write where these have none of their own."""
    values: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    write_keys: Tensor | None
    """Only where decays are per channel."""
    reset: Tensor | None
    normalize: bool

    def options(self) -> dict[str, Any]:
        """The compile-time constants of the kernels of chunks that say what there is."""
        return {
            "BETA": self.beta is not None,
            "RESET": self.reset is not None,
            "NORMALIZE": self.normalize,
            "PRECISION": dot_precision(self.queries.dtype),
        }

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Writing keys, β, log-decays and resets; in the place of those there are not, any tensor."""
        write_keys, beta, log_decay, reset = (
            self.keys if x is None else x for x in (self.write_keys, self.beta, self.log_decay, self.reset)
        )
        return write_keys, beta, log_decay, reset


class Chunks(NamedTuple):
    """What a call's chunks are made of: all that the walks read beside the values."""

    asking: Tensor
    """The queries as they are multiplied; where decays are per channel, with their decays."""
    reading: Tensor
    writing: Tensor
    """The keys, likewise."""
    inverse: Tensor
    scores: Tensor
    factors: Tensor
    carried: Tensor
    totals: Tensor | None
    """The decays per channel, summed up."""

    def walks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of a walk that belong to chunks."""
        return self.inverse, self.scores, self.factors, self.carried


OPERANDS = torch.float16
"""As what half precision is multiplied: float16, or, to see what that costs, bfloat16 without scales."""


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The type in which inputs of `dtype` are multiplied, and in which the walks leave what they keep."""
    return torch.float32 if dtype == torch.float32 else OPERANDS


def empty_chunks(p: Plan, queries: Tensor, *, channels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for Y, P, the factors of the rows and those of the states."""
    kept, dtype = (p.pairs, p.chunks), narrow(queries.dtype)
    return (
        queries.new_empty(*kept, p.chunk, p.chunk, dtype=dtype),
        queries.new_empty(*kept, p.query_block, p.chunk, dtype=dtype),
        queries.new_empty(*kept, ROWS.value, p.chunk, dtype=torch.float32),
        queries.new_empty(*kept, *((p.key_dim,) if channels else ()), dtype=torch.float32),
    )


class Walked(NamedTuple):
    """What the walks leave for the gradients."""

    entering: Tensor
    """S, the states that enter the chunks."""
    leaving: Tensor
    """dS', the gradients of those that leave them."""
    fresh: Tensor
    """r, what of the values is new."""
    residual: Tensor
    """e, its gradient."""
    units: Tensor
    """What each of these is to be multiplied by, by chunk and block of values."""


def empty_walked(p: Plan, values: Tensor) -> Walked:
    """Room for it."""
    dtype = narrow(values.dtype)
    state = (p.pairs, p.chunks, p.key_dim, p.value_dim)
    entering, leaving = (values.new_empty(state, dtype=dtype) for _ in range(2))
    fresh, residual = (torch.empty_like(values, dtype=dtype) for _ in range(2))
    units = values.new_empty(p.pairs, p.chunks, KEPT.value, p.blocks, dtype=torch.float32)
    return Walked(entering, leaving, fresh, residual, units)


def prepare(p: Plan, inputs: Inputs) -> Chunks:
    """Y, P and the factors of all chunks; where decays are per channel also their sums, and all decayed."""
    queries, keys, options = inputs.queries, inputs.keys, inputs.options()
    write_keys, beta, log_decay, reset = inputs.pointers()
    options["SOLVE"] = "ieee" if queries.dtype == torch.float32 else "tf32"
    if inputs.log_decay is None or inputs.log_decay.ndim == 3:
        room = empty_chunks(p, queries, channels=False)
        asking, reading = (torch.empty_like(x, dtype=narrow(x.dtype)) for x in (queries, keys))
        of_heads.prepare[(p.chunks, p.pairs)](
            queries,
            keys,
            beta,
            log_decay,
            reset,
            *room,
            asking,
            reading,
            *p.sizes(),
            **p.constants(),
            **options,
            DECAY=inputs.log_decay is not None,
            EXACT=queries.dtype == torch.float32,
            num_warps=p.prepare_warps,
            maxnreg=p.prepare_registers,
        )
        return Chunks(asking, reading, reading, *room, None)
    room = empty_chunks(p, queries, channels=True)
    exact = torch.float64 if queries.dtype == torch.float32 else torch.float32
    totals = queries.new_empty(p.pairs, p.chunks, p.query_block, p.key_dim, dtype=exact)
    block = min(32, p.key_block)
    of_channels.cumulate[(cdiv(p.key_dim, block), p.chunks, p.pairs)](
        log_decay,
        reset,
        totals,
        room[3],
        *p.sizes(),
        K=p.key_dim,
        BLOCK=block,
        C=p.chunk,
        MICRO=p.micro,
        BQ=p.query_block,
        RESET=inputs.reset is not None,
        num_warps=4,
    )
    asking, reading, writing = (torch.empty_like(x, dtype=narrow(x.dtype)) for x in (queries, keys, keys))
    of_channels.prepare[(p.chunks, p.pairs)](
        queries,
        keys,
        write_keys,
        beta,
        totals,
        reset,
        *room[:3],
        asking,
        reading,
        writing,
        *p.sizes(),
        **p.constants(),
        **options,
        LEVELS=p.levels,
        TIED=inputs.write_keys is None,
        num_warps=p.prepare_warps,
        maxnreg=p.prepare_registers,
    )
    return Chunks(asking, reading, writing, *room, totals)


def _walk(
    p: Plan,
    chunks: Chunks,
    values: Tensor,
    initial: Tensor | None,
    last: Tensor,
    *,
    outputs: Tensor | None = None,
    kept: Walked | None = None,
    transition: bool = False,
) -> None:
    constants, width = p.constants(values=True), p.value_dim
    if transition:
        width = p.key_dim
        constants.update(V=p.key_dim, BV=min(p.value_block, p.key_block))
    walks.walk[(cdiv(width, constants["BV"]), p.pairs, p.segments)](
        chunks.asking,
        chunks.reading,
        chunks.writing,
        values,
        *chunks.walks(),
        last if initial is None else initial,
        values if outputs is None else outputs,
        last,
        *((values, values, values) if kept is None else (kept.entering, kept.fresh, kept.units)),
        *p.sizes(),
        p.segment,
        **constants,
        OUTPUT=outputs is not None,
        KEEP=kept is not None,
        INITIAL=initial is not None,
        TRANSITION=transition,
        TIED=chunks.totals is None,
        CHANNELS=chunks.totals is not None,
        PRECISION=dot_precision(values.dtype),
        STAGES=p.again_stages if outputs is None and kept is not None else p.walk_stages,
        num_warps=p.walk_warps,
    )


def _walk_back(
    p: Plan,
    chunks: Chunks,
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    grad_initial: Tensor,
    kept: Walked | None,
    grad_values: Tensor | None = None,
) -> None:
    none = grad_outputs
    walks.walk_back[(p.blocks, p.pairs, p.segments)](
        chunks.asking,
        chunks.reading,
        chunks.writing,
        grad_outputs,
        *chunks.walks(),
        grad_initial if grad_last is None else grad_last,
        grad_initial,
        *((none, none) if kept is None else (kept.leaving, kept.residual)),
        none if grad_values is None else grad_values,
        none if kept is None else kept.units,
        *p.sizes(),
        p.segment,
        **p.constants(values=True),
        KEEP=kept is not None,
        FINAL=grad_last is not None,
        TIED=chunks.totals is None,
        CHANNELS=chunks.totals is not None,
        PRECISION=dot_precision(grad_outputs.dtype),
        STAGES=p.back_stages,
        num_warps=p.back_warps,
    )


def _enter(
    p: Plan, transitions: Tensor, added: Tensor, initial: Tensor | None, last: Tensor, *, back: bool = False
) -> Tensor:
    """The state that enters each segment (or the gradient of the one that leaves it); fills `last`."""
    entering, block = torch.empty_like(added), min(32, max(16, power_of_two(p.value_dim)))
    walks.enter[(cdiv(p.value_dim, block), p.pairs)](
        transitions,
        added,
        last if initial is None else initial,
        entering,
        last,
        p.segments,
        K=p.key_dim,
        V=p.value_dim,
        BK=p.key_block,
        BV=block,
        INITIAL=initial is not None,
        BACK=back,
        PRECISION="tf32" if p.half else "tf32x3",
        num_warps=8,
    )
    return entering


def empty_segments(p: Plan, values: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the states that enter the segments and their transitions; empty where there is one segment."""
    if p.segments == 1:
        return values.new_empty(0), values.new_empty(0)
    kept = (p.pairs, p.segments, p.key_dim)
    wide = torch.float32
    return values.new_empty(*kept, p.value_dim, dtype=wide), values.new_empty(*kept, p.key_dim, dtype=wide)


def walk(
    p: Plan, chunks: Chunks, values: Tensor, state: Tensor | None, outputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `outputs`; returns the last state, and of several segments the entering states and transitions."""
    last = values.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    added, transitions = empty_segments(p, values)
    if p.segments == 1:
        _walk(p, chunks, values, state, last, outputs=outputs)
        return last, added, transitions
    _walk(p, chunks, values, None, added)
    _walk(p, chunks, values, None, transitions, transition=True)
    entering = _enter(p, transitions, added, state, last)
    _walk(p, chunks, values, entering, added, outputs=outputs)
    return last, entering, transitions


def walk_again(p: Plan, chunks: Chunks, values: Tensor, state: Tensor | None, entering: Tensor, kept: Walked) -> None:
    """The walk for the backward pass: keeps the states that enter the chunks, and r."""
    initial = state if p.segments == 1 else entering
    last = values.new_empty(p.pairs, p.segments, p.key_dim, p.value_dim, dtype=torch.float32)
    _walk(p, chunks, values, initial, last, kept=kept)


def walk_back(
    p: Plan,
    chunks: Chunks,
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    transitions: Tensor,
    kept: Walked,
    grad_values: Tensor,
) -> Tensor:
    """The walk back: keeps the gradients of the leaving states, and e. Fills the values' gradient; returns the
    initial state's.
    """
    grad_initial = grad_outputs.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    if p.segments == 1:
        _walk_back(p, chunks, grad_outputs, grad_last, grad_initial, kept, grad_values)
        return grad_initial
    added, _ = empty_segments(p, grad_outputs)
    _walk_back(p, chunks, grad_outputs, None, added, None)
    leaving = _enter(p, transitions, added, grad_last, grad_initial, back=True)
    _walk_back(p, chunks, grad_outputs, leaving, added, kept, grad_values)
    return grad_initial


def gradients(
    p: Plan, chunks: Chunks, inputs: Inputs, walked: Walked, grad_outputs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, β, log-decays and writing keys (empty where there is none)."""
    queries, keys = inputs.queries, inputs.keys
    write_keys, _, log_decay, reset = inputs.pointers()
    grad_beta, grad_decay = (
        queries.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (inputs.beta, inputs.log_decay)
    )
    grad_queries, grad_keys = torch.empty_like(queries), torch.empty_like(keys)
    grad_write_keys = keys.new_empty(0 if inputs.write_keys is None else keys.shape)
    options = {
        **p.constants(values=True),
        **inputs.options(),
        "STAGES": p.gradient_stages,
        "num_warps": p.gradient_warps,
        "maxnreg": p.gradient_registers,
    }
    if chunks.totals is None:
        of_heads.gradients[(p.chunks, p.pairs)](
            chunks.asking,
            chunks.reading,
            log_decay,
            reset,
            chunks.scores,
            chunks.factors,
            *walked,
            grad_outputs,
            grad_queries,
            grad_keys,
            grad_beta,
            grad_decay,
            *p.sizes(),
            **options,
            DECAY=inputs.log_decay is not None,
            EXACT=queries.dtype == torch.float32,
        )
    else:
        of_channels_gradients.gradients[(p.chunks, p.pairs)](
            queries,
            keys,
            write_keys,
            chunks.totals,
            chunks.factors,
            chunks.carried,
            reset,
            *walked,
            grad_outputs,
            grad_queries,
            grad_keys,
            grad_write_keys,
            grad_beta,
            grad_decay,
            *p.sizes(),
            **options,
            LEVELS=p.levels,
            TIED=inputs.write_keys is None,
        )
    return grad_queries, grad_keys, grad_beta, grad_decay, grad_write_keys
