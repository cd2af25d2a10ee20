"""How the kernels of `exponential_attention` are launched: sizes of blocks, segments of time, scratch memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ostinato.ops.kernels.triton.exponential_attention_gates import gates_kernel
from ostinato.ops.kernels.triton.exponential_attention_memory import combine_kernel, states_kernel
from ostinato.ops.kernels.triton.launch import LINE, attend, card, dot_precision, fitting, power_of_two

WIDEST = 256
"""Channels of a head that the kernels take."""


class Walk(NamedTuple):
    """How a walk over time is launched."""

    block_keys: int
    block_values: int
    warps: int
    stages: int
    segment: int
    """Chunks of a segment."""
    segments: int

    def smaller(self, *blocks: str) -> list[Walk]:
        """This, and what to take where the card has no room for it: `blocks` can be halved; the segments stay."""
        halved = {name: max(16, getattr(self, name) // 2) for name in blocks}
        return [self, self._replace(stages=1), self._replace(stages=1, **halved)]


class Call(NamedTuple):
    """The sizes of a call, and what follows from its type."""

    batch: int
    time: int
    heads: int
    keys: int
    values: int
    length: int
    chunks: int
    exact: bool
    wide: torch.dtype
    precision: str
    processors: int
    two_terms: bool

    @property
    def rows(self) -> int:
        """Memories, one of each head of each sequence."""
        return self.batch * self.heads

    def cut(self, programs: int, wanted: int) -> tuple[int, int]:
        """Segments so that `programs` each fill the card; none shorter than 8 chunks."""
        segments = max(1, min(wanted // programs, self.chunks // 8))
        segment = -(-self.chunks // segments)
        return segment, -(-self.chunks // segment)

    def key(self, kernel: str, *flags: bool) -> tuple[Any, ...]:
        """What the shared memory of a kernel depends on."""
        return kernel, self.keys, self.values, self.precision, self.wide, *flags

    def dimensions(self) -> dict[str, Any]:
        """What all kernels of the memory are specialised by."""
        return {
            "KEYS": self.keys,
            "VALUES": self.values,
            "WIDE": tl.bfloat16 if self.wide == torch.bfloat16 else tl.float32,
            "PRECISION": self.precision,
            "LENGTH": self.length,
            "TWO": self.two_terms,
        }


def call(queries: Tensor, values: Tensor) -> Call:
    """What all launches for these arguments share."""
    batch, time, heads, keys = queries.shape
    exact = queries.dtype == torch.float32
    length = 32 if exact else 64
    return Call(
        batch,
        time,
        heads,
        keys,
        values.shape[-1],
        length,
        -(-time // length),
        exact,
        torch.bfloat16 if queries.dtype == torch.bfloat16 else torch.float32,
        dot_precision(queries.dtype),
        card(queries.device).processors,
        queries.dtype == torch.bfloat16,
    )


def block(call: Call, size: int, most: int) -> int:
    """Channels of a tile: a power of two to `most`.

    In half precision they fill lines (see `launch.narrowest`): tiles of 32 values beside 64 keys gave an H200 results
    that were wrong by 88 %.
    """
    return min(max(16 if call.exact else LINE, power_of_two(size)), most)


def outputs_walk(call: Call) -> Walk:
    """How the walk that makes the outputs is cut."""
    keys = block(call, call.keys, WIDEST)
    values = block(call, call.values, 32 if call.exact else 64)
    warps = 8 if keys * values > 8192 else 4
    programs = call.rows * -(-call.values // values)
    return Walk(keys, values, warps, 1 if call.exact else 2, *call.cut(programs, call.processors * (8 // warps)))


def states_walk(call: Call) -> Walk:
    """Of `states_kernel`; in the segments of `outputs_walk`, whose entering states it shares."""
    keys = block(call, call.keys, 64)
    values = block(call, call.values, 64 if call.exact else 128)
    return Walk(keys, values, 4, 2, *outputs_walk(call)[-2:])


def chunk_gradients_walk(call: Call) -> Walk:
    """Of `chunk_gradients_kernel`, whose segments are chunks."""
    values = block(call, call.values, WIDEST)
    keys = block(call, call.keys, 32 if call.exact else 64)
    return Walk(keys, values, 4 if values <= 128 else 8, 1 if call.exact else 2, 1, call.chunks)


def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Matrices, the last two axes of four, as kernels load them: in blocks of `rows` × `columns`, by the hardware.

    What the constructor would check of each of twenty in a call, `whole` and the plans here see to.
    """
    attend()
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, list(tensor.shape), list(tensor.stride())
    made.block_shape, made.padding = [1, 1, rows, columns], "zero"
    return made


def sequence(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`described` for (batch, time, heads, channels): a matrix is the sequence of one head."""
    return described(tensor.transpose(1, 2), rows, columns)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or its copy, contiguous and where the hardware can load it: at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def blocks_of_gates(call: Call) -> tuple[int, int]:
    """How many blocks of how many chunks one program of the gates' kernels takes."""
    chunks = min(16, power_of_two(call.chunks))
    return -(-call.chunks // chunks), chunks


class Gates(NamedTuple):
    """What `gates_kernel` computes; the first three are kept for the gradients."""

    per_token: Tensor
    """(7, or 6 for half precision; batch · heads, tokens): `reach`, `source`, `enter` and `leave`, then `inverse` and
    `side` of `outputs_kernel`, and `decayed`."""
    maximum: Tensor
    first_token: Tensor
    carried: Tensor
    last_maximum: Tensor


def gates(
    call: Call, found: Gates, log_input: Tensor, log_forget: Tensor, initial: Tensor | None, reset: Tensor | None
) -> None:
    """Launch `gates_kernel`."""
    reach, source, enter, leave = found.per_token[:4].unbind(0)
    blocks, chunks = blocks_of_gates(call)
    added, least = found.maximum.new_empty(2, call.rows, blocks).unbind(0)
    for summary in (True, False) if blocks > 1 else (False,):
        gates_kernel[(call.rows, blocks)](
            log_input, log_forget, reset, initial,
            found.per_token[-1], reach, source, enter, leave, found.carried, found.maximum, found.first_token,
            found.last_maximum, added, least,
            call.time, call.heads, call.chunks,
            SUMMARY=summary, HAS_RESET=reset is not None, HAS_INITIAL=initial is not None, EXACT=call.exact,
            LENGTH=call.length, CHUNKS=chunks, BLOCKS=power_of_two(blocks),
        )  # fmt: skip


def empty_gates(call: Call, like: Tensor, has_reset: bool) -> Gates:
    """Where `gates_kernel` writes to."""
    tokens = call.chunks * call.length
    return Gates(
        like.new_empty(6 + call.exact, call.rows, tokens, dtype=torch.float32),
        like.new_empty(call.rows, tokens, dtype=torch.float64),
        like.new_empty(call.rows, tokens if has_reset else 0, dtype=torch.int32),
        like.new_empty(call.rows, call.chunks, dtype=torch.float32),
        like.new_empty(call.batch, call.heads, dtype=torch.float32),
    )


class Recurrence(NamedTuple):
    """C ← carried C + Σ_t left_t gate_t right_tᵀ and n ← carried n + Σ_t left_t sum_gate_t, a chunk at a time.

    Forward, the memory; in `reverse`, its gradient.
    """

    left: Tensor
    right: Tensor
    gate: Tensor
    sum_gate: Tensor
    carried: Tensor
    reverse: bool


def states(
    call: Call,
    of: Recurrence,
    initial: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `states_kernel`: the states at the ends of segments and what each segment carries."""
    walk, carried = states_walk(call), of.carried
    segmented = (call.rows, walk.segments)
    last = carried.new_empty(*segmented, call.keys, call.values)
    last_sum = carried.new_empty(*segmented, call.keys)
    last_carried = carried.new_empty(*segmented)
    states, sums = into or (last, last_sum)

    def launch(walk: Walk) -> None:
        keys, values = walk.block_keys, walk.block_values
        states_kernel[(call.rows * walk.segments, -(-call.keys // keys), -(-call.values // values))](
            sequence(of.left, call.length, keys), sequence(of.right, call.length, values),
            of.gate, of.sum_gate, carried, *initial, described(states, keys, values), sums,
            last, last_sum, last_carried, call.heads, call.chunks, walk.segment, walk.segments,
            REVERSE=of.reverse, STORE=into is not None, HAS_INITIAL=initial[0] is not None,
            BLOCK_KEYS=keys, BLOCK_VALUES=values, num_warps=walk.warps, num_stages=walk.stages, **call.dimensions(),
        )  # fmt: skip

    fitting(call.key("states", into is not None), launch, walk.smaller("block_keys", "block_values"))
    return last, last_sum, last_carried


def entering(
    call: Call, into: list[Tensor], of: Recurrence, initial: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The states that enter the segments, written to `into`; an initial one of None is zeros."""
    entering, entering_sum = into
    block = 1024
    combine_kernel[(call.rows, -(-call.keys * call.values // block))](
        *initial, *states(call, of, (None, None), None), entering, entering_sum, states_walk(call).segments,
        KEYS=call.keys, VALUES=call.values, REVERSE=of.reverse, HAS_INITIAL=initial[0] is not None, BLOCK=block,
    )  # fmt: skip
    return entering, entering_sum


def chunk_states(
    call: Call, of: Recurrence, start: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states that enter the chunks, in the type that products take them in, and the last state.

    `start` are those that enter the segments of `states_walk`, of `entering`.
    """
    each = of.left.new_empty(call.rows, call.chunks, call.keys, call.values, dtype=call.wide)
    sums = of.carried.new_empty(call.rows, call.chunks, call.keys)
    last, last_sum, _ = states(call, of, start, (each, sums))
    end = 0 if of.reverse else -1
    shape = (call.batch, call.heads, call.keys)
    return each, sums, last[:, end].reshape(*shape, call.values), last_sum[:, end].reshape(shape)
