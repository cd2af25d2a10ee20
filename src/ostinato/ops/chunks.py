"""Chunks: what the matrix engines (`linear_attention`, `delta_rule`) share.

A recurrence whose state is a matrix S (key_dim × value_dim) is computed in chunks of C tokens: inside a chunk
everything is a product of matrices, and only the state at the edges of chunks is carried from one to the
next. Tensors here are chunk first, (chunks, batch, heads, C, dim), so that the step from chunk to chunk
reads and writes contiguous memory.

Decays are sums of logarithms. With G_i the sum of the log-decays of a chunk's tokens up to and with i, token j
reaches token i ≥ j with the factor exp(G_i − G_j) ≤ 1. Only such differences are exponentiated, never exp(−G_j)
alone, which overflows under strong decay; and they are summed up, not subtracted, so that a weak decay after a
strong one keeps its digits. Where the decay differs by channel the factor does not leave the sum over channels,
and the lower triangle is cut in halves until it does (`ChunkDecay.scores`).

A reset cuts a chunk into segments. Its own log-decay is dropped from the sum, which stays finite, and pairs of
tokens from different segments are masked.

Source: GLA (arXiv 2312.06635), sections 4.1 to 4.3, with halving in place of its two fixed levels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.scan import DIAGONAL, Affine


def check_chunk_size(chunk_size: int) -> None:
    """Raise `ConfigurationError` for a chunk size below 1."""
    if chunk_size < 1:
        raise ConfigurationError(f"chunk_size must be positive, got {chunk_size}")


def chunk_length(chunk_size: int, time: int) -> int:
    """The chunk length that is used: `chunk_size`, or `time` if shorter, rounded up to a power of two."""
    return 1 << (min(chunk_size, time) - 1).bit_length()


def cut(
    sequence: Float[Tensor, "batch time*micro heads dim"], length: int, micro: int = 1
) -> Float[Tensor, "chunks batch heads length*micro dim"]:
    """Cut a sequence into chunks of `length` tokens (of `micro` steps each), the last filled up with zeros."""
    width = length * micro
    missing = -sequence.shape[1] % width
    if missing:
        sequence = F.pad(sequence, (0, 0, 0, 0, 0, missing))
    return sequence.unflatten(1, (-1, width)).permute(1, 0, 3, 2, 4).contiguous()


def join(chunks: Float[Tensor, "chunks batch heads length dim"], time: int) -> Float[Tensor, "batch time heads dim"]:
    """The inverse of `cut`: the sequence, without the filling."""
    return chunks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :time]


class ChunkDecay(NamedTuple):
    """How much of each token and of the entering state is left, in every chunk.

    Each part is None where the factor is 1 for all. `channels` is 1 (one decay for all channels) or key_dim.
    """

    pairs: Float[Tensor, "chunks batch heads length length"] | None
    """exp(G_i − G_j) for i ≥ j in one segment, else 0. Where the decay differs by channel: 1 or 0."""
    squares: list[tuple[Tensor, Tensor]] | None
    """Where the decay differs by channel, for s = 1, 2, 4, …: the factors of `_halving_scores` for blocks of s."""
    entering: Float[Tensor, "chunks batch heads length channels"] | None
    """What is left of the entering state when a token reads it: exp(G), 0 after a reset."""
    leaving: Float[Tensor, "chunks batch heads length channels"] | None
    """What is left of a token at the end of the chunk: exp(G_C − G), 0 before a reset."""
    carried: Float[Tensor, "chunks batch heads channels 1"] | None
    """What is left of the entering state at the end of the chunk."""

    def scores(
        self,
        rows: Float[Tensor, "chunks batch heads length*m dim"],
        columns: Float[Tensor, "chunks batch heads length*n dim"],
        *,
        strict: bool = False,
    ) -> Float[Tensor, "chunks batch heads length*m length*n"]:
        """P_ij = Σ_c rows_ic columns_jc exp(G_ic − G_jc) where token(i) ≥ token(j) in one segment, else 0.

        Args:
            rows: what reads, m steps per token.
            columns: what was written, n steps per token; the steps of a token share its decay.
            strict: only columns of earlier steps than the row's (m = n): j < i.
        """
        scores = rows @ columns.mT if self.squares is None else _halving_scores(rows, columns, self.squares)
        if self.pairs is not None:
            scores = scores * _repeat(self.pairs, rows.shape[-2], columns.shape[-2])
        elif self.squares is None and not strict:
            micro = columns.shape[-2] // rows.shape[-2]
            scores = scores.tril() if micro == 1 else _token_tril(scores, micro)
        return scores.tril(-1) if strict else scores


def _repeat(pairs: Tensor, rows: int, columns: int) -> Tensor:
    """Pairs of tokens -> pairs of steps."""
    length = pairs.shape[-1]
    if rows > length:
        pairs = pairs.repeat_interleave(rows // length, dim=-2)
    if columns > length:
        pairs = pairs.repeat_interleave(columns // length, dim=-1)
    return pairs


def _token_tril(scores: Tensor, micro: int) -> Tensor:
    """Keep the pairs (token i, step j) with token(j) ≤ i."""
    length = scores.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later.repeat_interleave(micro, dim=-1), 0)


def _halving_scores(rows: Tensor, columns: Tensor, squares: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`ChunkDecay.scores` for decays that differ by channel, without resets.

    A block of 2s tokens has two halves that are blocks of s, and a square, late rows against early columns. With
    R the G of the last early token, exp(G_i − G_j) = exp(G_i − R) exp(R − G_j), both ≤ 1: the square is a
    product of matrices. All blocks of one size are done together, from single tokens up.
    """
    length = 2 ** len(squares)
    rows, columns = rows.unflatten(-2, (length, -1)), columns.unflatten(-2, (length, -1))
    blocks = rows @ columns.mT  # Of one token each: there is no decay between the steps of a token.
    for late, early in squares:
        halves = (early.shape[-3], 2, early.shape[-2])
        read = rows.unflatten(-3, halves)[..., 1, :, :, :] * late.unsqueeze(-2)
        write = columns.unflatten(-3, halves)[..., 0, :, :, :] * early.unsqueeze(-2)
        square = read.flatten(-3, -2) @ write.flatten(-3, -2).mT
        upper, lower = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = _below(upper, square, lower, 0.0)
    return blocks.squeeze(-3)


def _below(upper: Tensor, square: Tensor, lower: Tensor, fill: float) -> Tensor:
    """The block matrix [[upper, fill], [square, lower]]."""
    top = torch.cat([upper, torch.full_like(upper, fill)], dim=-1)
    return torch.cat([top, torch.cat([square, lower], dim=-1)], dim=-2)


def _sums(log_decay: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Sums of log-decays, built up from halves so that no two large sums are ever subtracted.

    Returns, for blocks of s = 1, 2, 4, … tokens, the sums from the start of each late half and to the end of each
    early half, (…, blocks, s, channels); then, for the whole chunk, G and G_C − G.
    """
    before, after = log_decay.unsqueeze(-2), torch.zeros_like(log_decay).unsqueeze(-2)
    squares = []
    while before.shape[-3] > 1:
        early, late = before.unflatten(-3, (-1, 2)).unbind(-3)
        early_rest, late_rest = after.unflatten(-3, (-1, 2)).unbind(-3)
        squares.append((late, early_rest))
        before = torch.cat([early, early[..., -1:, :] + late], dim=-2)
        after = torch.cat([early_rest + late[..., -1:, :], late_rest], dim=-2)
    return squares, before.squeeze(-3), after.squeeze(-3)


def _pair_sums(log_decay: Tensor, squares: list[tuple[Tensor, Tensor]]) -> Tensor:
    """G_i − G_j for i ≥ j, −∞ elsewhere, of one decay for all channels."""
    blocks = torch.zeros_like(log_decay).unsqueeze(-2)
    for late, early in squares:
        upper, lower = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        blocks = _below(upper, late + early.mT, lower, -torch.inf)
    return blocks.squeeze(-3)


def chunk_decay(
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"] | None,
    reset: Bool[Tensor, "batch time"] | None,
    length: int,
    dtype: torch.dtype,
) -> ChunkDecay:
    """Sum up the log-decays of a sequence in chunks of `length` tokens, and find its segments.

    A log-decay of −∞ is allowed: it forgets everything.
    """
    same = first = final = None
    if reset is not None:
        # The filling is no reset: it belongs to the last segment, whose state it hands on unchanged.
        segment = cut(reset.to(dtype).unsqueeze(-1).unsqueeze(-1), length).cumsum(-2)
        same = segment == segment.mT
        first, final = segment == 0, segment == segment[..., -1:, :]
    if log_decay is None:
        if same is None or first is None or final is None:
            return ChunkDecay(None, None, None, None, None)
        return ChunkDecay(same.tril().to(dtype), None, first.to(dtype), final.to(dtype), first[..., -1:, :].to(dtype))

    if log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    if reset is not None:
        log_decay = log_decay.masked_fill(reset.unsqueeze(-1).unsqueeze(-1), 0)
    # e to this is 0 in this type, with some to spare; sums of it stay finite, where those of −∞ would not.
    log_decay = cut(log_decay.clamp(min=2 * math.log(torch.finfo(dtype).tiny)), length)
    exponents, before, after = _sums(log_decay)
    entering, leaving = torch.exp(before), torch.exp(after)
    carried = entering[..., -1:, :].mT
    pairs = squares = None
    if log_decay.shape[-1] == 1:
        sums = _pair_sums(log_decay, exponents)
        # Mask the exponent, not the exponential: inf · 0 would be NaN in the backward pass.
        pairs = torch.exp(sums if same is None else sums.masked_fill(~same, -torch.inf))
    else:
        squares = [(torch.exp(late), torch.exp(early)) for late, early in exponents]
        pairs = None if same is None else same.to(dtype)
    if first is not None and final is not None:
        entering, leaving, carried = entering * first, leaving * final, carried * first[..., -1:, :]
    return ChunkDecay(pairs, squares, entering, leaving, carried)


def scaled(tensor: Tensor, factor: Tensor | None, micro: int = 1) -> Tensor:
    """`tensor` times a part of `ChunkDecay` (per token; repeated for `micro` steps a token), or as it is."""
    if factor is None:
        return tensor
    return tensor * (factor.repeat_interleave(micro, dim=-2) if micro > 1 else factor)


# --------------------------------------------------------------------------------------------------
# From chunk to chunk.


def _apply_matrix(a: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return a @ h
    return torch.baddbmm(b.flatten(0, 1), a.flatten(0, 1), h.flatten(0, 1)).view(b.shape)


MATRIX = Affine(
    "matrix",
    apply=_apply_matrix,
    multiply=lambda a, b: a @ b,
    adjoint=lambda a: a.mT,
    outer=lambda u, w: u @ w.mT,
)
"""A is a matrix, h a matrix whose columns it multiplies: A (batch, heads, d, d), h (batch, heads, d, e)."""


class _ChunkStates(torch.autograd.Function):
    """S_{n+1} = A_n S_n + B_n over chunks, with S_0 among the results: (chunks + 1, …).

    Few long steps with a large state: a loop is the best scan. Its derivative is the adjoint loop,
    μ_n = g_n + A_nᵀ μ_{n+1}: this function again, run backwards.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(structure: Affine, reverse: bool, transition: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
        states = [initial]
        count = inputs.shape[0]
        for n in range(count - 1, -1, -1) if reverse else range(count):
            states.append(structure.apply(transition[n], states[-1], inputs[n]))
        if reverse:
            states.reverse()
        return torch.stack(states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.reverse, transition, _, _ = inputs
        ctx.save_for_backward(transition, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        structure, reverse = ctx.structure, ctx.reverse
        transition, states = ctx.saved_tensors
        outside, last = (grad[1:], grad[0]) if reverse else (grad[:-1], grad[-1])
        mu = _ChunkStates.apply(structure, not reverse, structure.adjoint(transition), outside, last)
        grad_inputs, grad_initial = (mu[:-1], mu[-1]) if reverse else (mu[1:], mu[0])
        grad_transition = None
        if ctx.needs_input_grad[2]:
            entering = states[1:] if reverse else states[:-1]
            grad_transition = structure.outer(grad_inputs, entering)
            if structure is DIAGONAL:
                axes = [a for a in (-1, -2) if transition.shape[a] == 1 and grad_transition.shape[a] > 1]
                grad_transition = grad_transition.sum(axes, keepdim=True) if axes else grad_transition
        return None, None, grad_transition, grad_inputs, grad_initial


def chunk_states(
    transition: Float[Tensor, "chunks batch heads key_dim key_dim"]
    | Float[Tensor, "chunks batch heads channels 1"]
    | None,
    written: Float[Tensor, "chunks batch heads key_dim value_dim"],
    initial: Float[Tensor, "batch heads key_dim value_dim"],
    *,
    structure: Affine = DIAGONAL,
) -> tuple[Float[Tensor, "chunks batch heads key_dim value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """The state that enters each chunk, and the last one, of S_{n+1} = A_n S_n + written_n.

    `transition` None is the identity; `structure` is `DIAGONAL` (broadcast against S) or `MATRIX`.
    Differentiable to any order.
    """
    if transition is None:
        states = torch.cat([initial.unsqueeze(0), written]).cumsum(0)
    else:
        states = _ChunkStates.apply(structure, False, transition, written, initial)
    return states[:-1], states[-1]
