"""Chunks: what the matrix engines (`linear_attention`, `delta_rule`) share.

A recurrence whose state is a matrix S (key_dim × value_dim) is computed in chunks of C tokens: inside a chunk
everything is a product of matrices, and only the state at the edges of chunks is carried from one to the
next. Tensors here are chunk first, (chunks, batch, heads, C, dim), so that the step from chunk to chunk
reads and writes contiguous memory.

Decays are sums of logarithms. With G_i the sum of the log-decays of a chunk's tokens up to and with i, token j
reaches token i ≥ j with the factor exp(G_i − G_j) ≤ 1. Only such differences are exponentiated, never exp(−G_j)
alone, which overflows under strong decay; and they are summed up, not subtracted, so that a weak decay after a
strong one keeps its digits. Where the decay differs by channel the factor does not leave the sum over channels,
and the lower triangle is cut in halves until it does (`_HalvingScores`).

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


def check_chunk_size(chunk_size: int) -> None:
    """Raise `ConfigurationError` for a chunk size below 1."""
    if chunk_size < 1:
        raise ConfigurationError(f"chunk_size must be positive, got {chunk_size}")


def chunk_length(chunk_size: int, time: int) -> int:
    """The chunk length that is used: `chunk_size`, or `time` if shorter, rounded up to a power of two."""
    return 1 << (min(chunk_size, time) - 1).bit_length()


def cut(
    sequence: Float[Tensor, "batch steps heads dim"], length: int, micro: int = 1
) -> Float[Tensor, "chunks batch heads _ dim"]:
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
    channels: Float[Tensor, "chunks batch heads length key_dim"] | None
    """The log-decays themselves, where they differ by channel."""
    squares: tuple[Tensor, Tensor] | None
    """Their `_square_factors`."""
    entering: Float[Tensor, "chunks batch heads length channels"] | None
    """What is left of the entering state when a token reads it: exp(G), 0 after a reset."""
    leaving: Float[Tensor, "chunks batch heads length channels"] | None
    """What is left of a token at the end of the chunk: exp(G_C − G), 0 before a reset."""
    carried: Float[Tensor, "chunks batch heads channels 1"] | None
    """What is left of the entering state at the end of the chunk."""

    def scores(
        self,
        rows: Float[Tensor, "chunks batch heads read dim"],
        columns: Float[Tensor, "chunks batch heads written dim"],
        *,
        strict: bool = False,
    ) -> Float[Tensor, "chunks batch heads read written"]:
        """P_ij = Σ_c rows_ic columns_jc exp(G_ic − G_jc) where token(i) ≥ token(j) in one segment, else 0.

        Args:
            rows: what reads, m steps per token.
            columns: what was written, n steps per token; the steps of a token share its decay.
            strict: only columns of earlier steps than the row's (m = n): j < i.
        """
        if self.channels is None or self.squares is None:
            scores = rows @ columns.mT
        else:
            # torch.compile traces no function that is given one tensor twice.
            columns = columns.view_as(columns) if columns is rows else columns
            scores = _HalvingScores.apply(rows, columns, self.channels, *self.squares)
        if self.pairs is not None:
            scores = scores * _repeat(self.pairs, rows.shape[-2], columns.shape[-2])
        elif self.channels is None and not strict:
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
        same = (segment == segment.mT).to(dtype)
        first, final = (segment == 0).to(dtype), (segment == segment[..., -1:, :]).to(dtype)
    if log_decay is None:
        if same is None or first is None:
            return ChunkDecay(None, None, None, None, None, None)
        return ChunkDecay(same.tril(), None, None, first, final, first[..., -1:, :])

    if log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    if reset is not None:
        log_decay = log_decay.masked_fill(reset.unsqueeze(-1).unsqueeze(-1), 0)
    # e to this is 0 in this type, with some to spare; sums of it stay finite, where those of −∞ would not.
    log_decay = cut(log_decay.clamp(min=2 * math.log(torch.finfo(dtype).tiny)), length)
    entering = torch.exp(log_decay.cumsum(-2))
    leaving = torch.exp(F.pad(_reverse_cumsum(log_decay[..., 1:, :]), (0, 0, 0, 1)))
    carried = entering[..., -1:, :].mT
    if first is not None and final is not None:
        entering, leaving, carried = entering * first, leaving * final, carried * first[..., -1:, :]
    if log_decay.shape[-1] == 1:
        pairs = _PairDecay.apply(log_decay)
        return ChunkDecay(pairs if same is None else pairs * same, None, None, entering, leaving, carried)
    return ChunkDecay(same, log_decay, _square_factors(log_decay.detach()), entering, leaving, carried)


# --------------------------------------------------------------------------------------------------
# Decays between the tokens of a chunk.


def _reverse_cumsum(tensor: Tensor) -> Tensor:
    """Σ_{t ≥ s} over the tokens of a chunk."""
    return tensor.flip(-2).cumsum(-2).flip(-2)


def _square_sums(log_decay: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What lies between the two halves of each block of 2s tokens, s = 1, 2, 4, …: (…, blocks, s, channels) each.

    First G_i − R for the tokens of the late half, then R − G_j for those of the early half, R the G of the last
    early token. Each is a sum, built from those of smaller blocks: no two large sums are ever subtracted.
    """
    before, after = log_decay.unsqueeze(-2), torch.zeros_like(log_decay).unsqueeze(-2)
    squares = []
    while before.shape[-3] > 1:
        early, late = before.unflatten(-3, (-1, 2)).unbind(-3)
        early_rest, late_rest = after.unflatten(-3, (-1, 2)).unbind(-3)
        squares.append((late, early_rest))
        before = torch.cat([early, early[..., -1:, :] + late], dim=-2)
        after = torch.cat([early_rest + late[..., -1:, :], late_rest], dim=-2)
    return squares


def _square_factors(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The exponentials of `_square_sums`, of the late halves and of the early: (sizes, …, length / 2, dim) each."""
    squares = [(late.flatten(-3, -2), early.flatten(-3, -2)) for late, early in _square_sums(log_decay)]
    if not squares:
        return log_decay.new_zeros(0), log_decay.new_zeros(0)
    late, early = (torch.stack(factors) for factors in zip(*squares, strict=True))
    return torch.exp(late), torch.exp(early)


def _halves(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of every two blocks; blocks are counted along axis −3."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return first, second


def _below(upper: Tensor, square: Tensor, lower: Tensor, fill: float) -> Tensor:
    """The block matrix [[upper, fill], [square, lower]]."""
    top = torch.cat([upper, torch.full_like(upper, fill)], dim=-1)
    return torch.cat([top, torch.cat([square, lower], dim=-1)], dim=-2)


class _PairDecay(torch.autograd.Function):
    """D_ij = exp(Σ_{j < s ≤ i} g_s) for i ≥ j, else 0: (…, length, 1) -> (…, length, length).

    With E = D ⊙ ∂D, ∂g_s sums E over the pairs i ≥ s > j: the row sums less the column sums of E, cumulated from
    the end (pairs on one side of s cancel). It is made of D and ∂D, so it has derivatives itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_decay: Tensor) -> Tensor:
        blocks = torch.zeros_like(log_decay).unsqueeze(-2)
        for late, early in _square_sums(log_decay):
            upper, lower = _halves(blocks)
            blocks = _below(upper, late + early.mT, lower, -torch.inf)
        return torch.exp(blocks.squeeze(-3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (decays,) = ctx.saved_tensors
        weighted = decays * grad
        return _reverse_cumsum(weighted.sum(-1, keepdim=True) - weighted.sum(-2).unsqueeze(-1))


class _HalvingScores(torch.autograd.Function):
    """P_ij = Σ_c rows_ic columns_jc exp(G_ic − G_jc) for token(i) ≥ token(j), else 0: `ChunkDecay.scores`.

    A block of 2s tokens has two halves that are blocks of s, and a square, late rows against early columns. With
    R the G of the last early token, exp(G_i − G_j) = exp(G_i − R) exp(R − G_j), both ≤ 1: the square is a
    product of matrices. All blocks of one size are done together, from single tokens up.

    The factors are functions of the log-decays, and passed only because several scores share them; the
    gradient of the log-decays is ∂g = reversed cumulative sum of rows ⊙ ∂rows − columns ⊙ ∂columns (GLA, section
    4.3, "Gradients"). Where derivatives of the gradients are wanted, the factors are computed anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, columns: Tensor, log_decay: Tensor, late: Tensor, early: Tensor) -> Tensor:
        length = log_decay.shape[-2]
        rows, columns = rows.unflatten(-2, (length, -1)), columns.unflatten(-2, (length, -1))
        scores = rows @ columns.mT  # Of one token each: there is no decay between the steps of a token.
        for level in range(late.shape[0]):
            read, write = _read_and_write(rows, columns, late[level], early[level], 2**level)
            upper, lower = _halves(scores)
            scores = _below(upper, read @ write.mT, lower, 0.0)
        return scores.squeeze(-3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, columns, log_decay, late, early = ctx.saved_tensors
        if torch.is_grad_enabled():
            late, early = _square_factors(log_decay)
        length = log_decay.shape[-2]
        m, n = rows.shape[-2] // length, columns.shape[-2] // length
        rows, columns = rows.unflatten(-2, (length, m)), columns.unflatten(-2, (length, n))
        own = _diagonal_blocks(grad, length)
        grad_rows, grad_columns = own @ columns, own.mT @ rows
        for level in range(late.shape[0]):
            size = 2**level
            read, write = _read_and_write(rows, columns, late[level], early[level], size)
            square = _diagonal_blocks(grad, length // (2 * size))[..., size * m :, : size * n]
            to_late = (square @ write).unflatten(-2, (size, m)) * _steps(late[level], size)
            to_early = (square.mT @ read).unflatten(-2, (size, n)) * _steps(early[level], size)
            grad_rows = _add_to_half(grad_rows, to_late, 1)
            grad_columns = _add_to_half(grad_columns, to_early, 0)
        grad_decay = None
        if ctx.needs_input_grad[2]:
            grad_decay = _reverse_cumsum((rows * grad_rows).sum(-2) - (columns * grad_columns).sum(-2))
        return grad_rows.flatten(-3, -2), grad_columns.flatten(-3, -2), grad_decay, None, None


def _steps(factor: Tensor, size: int) -> Tensor:
    """Factors of halves of `size` tokens, shaped for their steps: (…, length / 2, dim) -> (…, blocks, size, 1, dim)."""
    return factor.unflatten(-2, (-1, size, 1))


def _read_and_write(rows: Tensor, columns: Tensor, late: Tensor, early: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The factors of the squares: late rows and early columns, (…, blocks, size * steps, dim), decayed to R."""
    read = rows.unflatten(-3, (-1, 2, size))[..., 1, :, :, :] * _steps(late, size)
    write = columns.unflatten(-3, (-1, 2, size))[..., 0, :, :, :] * _steps(early, size)
    return read.flatten(-3, -2), write.flatten(-3, -2)


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The `count` blocks on the diagonal of a matrix: (…, r, c) -> (…, count, r / count, c / count)."""
    blocks = matrix.unflatten(-1, (count, -1)).unflatten(-3, (count, -1))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _add_to_half(tensor: Tensor, part: Tensor, half: int) -> Tensor:
    """Add `part` (…, blocks, size, steps, dim) to one half of each block of `tensor` (…, length, steps, dim)."""
    halves = list(tensor.unflatten(-3, (part.shape[-4], 2, part.shape[-3])).unbind(-4))
    halves[half] = halves[half] + part
    return torch.stack(halves, dim=-4).flatten(-5, -3)


def scaled(tensor: Tensor, factor: Tensor | None, micro: int = 1) -> Tensor:
    """`tensor` times a part of `ChunkDecay` (per token; repeated for `micro` steps a token), or as it is."""
    if factor is None:
        return tensor
    return tensor * (factor.repeat_interleave(micro, dim=-2) if micro > 1 else factor)
