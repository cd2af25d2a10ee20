"""`short_convolution`: y_t = Σ_{i < width} w_i ⊙ x_{t−i} (+ b), a few taps per channel, causal, and it streams.

What stands before the recurrence in Mamba, the delta family and RG-LRU. The state is the last width − 1 inputs.
`joint_short_convolution` does it for several inputs, as if they stood side by side, each followed by silu or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.ops.checks import check_finite, check_reset, check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.routes import Engine

_engine = Engine("short_convolution")


def previous_is_same_sequence(reset: Bool[Tensor, "batch time"], lag: int) -> Bool[Tensor, "batch time"]:
    """True where step t − lag belongs to the same sequence as t, the state before the chunk included."""
    same = ~reset
    result = same
    for shift in range(1, lag):
        shifted = F.pad(same[:, :-shift], (shift, 0), value=True) if shift < same.shape[1] else torch.ones_like(same)
        result = result & shifted
    return result


def short_convolution_step(
    inputs: Float[Tensor, "batch channels"],
    weight: Float[Tensor, "width channels"],
    bias: Float[Tensor, " channels"] | None,
    state: Float[Tensor, "batch taps channels"],
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch taps channels"]]:
    """One step, the definition: y, and the last width − 1 inputs, oldest first."""
    window = torch.cat([state, inputs.unsqueeze(1)], dim=1)
    y = (window.flip(1) * weight).sum(1)
    return (y if bias is None else y + bias), window[:, 1:]


Parts = tuple[Tensor, ...]


def _side_by_side(route: Callable[..., Tensor]) -> Callable[..., Parts]:
    """A route for several parts from one for a single tensor."""
    joined = in_accumulation_dtype(route)

    @wraps(route)
    def parts(
        inputs: Parts, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: tuple[bool, ...]
    ) -> Parts:
        whole = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1)
        outputs = joined(whole, weight, bias, state, reset).split([part.shape[-1] for part in inputs], dim=-1)
        return tuple(
            (F.silu(y) if activated else y).to(whole.dtype) for y, activated in zip(outputs, silu, strict=True)
        )

    return parts


@_engine.route("reference")
@_side_by_side
def _reference(inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None) -> Tensor:
    outputs = []
    for t in range(inputs.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t].view(-1, 1, 1), 0)
        y, state = short_convolution_step(inputs[:, t], weight, bias, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


@_engine.route("parallel", priority=10)
@_side_by_side
def _parallel(inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None) -> Tensor:
    time, past = inputs.shape[1], weight.shape[0] - 1
    window = torch.cat([state, inputs], dim=1)
    y = inputs * weight[0]
    for lag in range(1, past + 1):
        tap = window[:, past - lag : past - lag + time] * weight[lag]
        if reset is not None:
            tap = tap.masked_fill(~previous_is_same_sequence(reset, lag).unsqueeze(-1), 0)
        y = y + tap
    return y if bias is None else y + bias


def short_convolution(
    inputs: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "width channels"],
    state: Float[Tensor, "batch taps channels"] | None = None,
    *,
    bias: Float[Tensor, " channels"] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch taps channels"]]:
    """All outputs of y_t = Σ_i w_i ⊙ x_{t−i} + b.

    Args:
        inputs: x.
        weight: w; its row i multiplies the input of i steps ago.
        state: the width − 1 inputs before the first, oldest first; zeros if None.
        bias: b.
        reset: True marks the first step of a new sequence: inputs before it count as zero.
        validate: look for NaN and infinity in the arguments first.

    Returns:
        The outputs in the type of `inputs` (half precision is summed in float32), and the state after the last step.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        NonFiniteError: with `validate`.

    Source: Mamba (arXiv 2312.00752), section 3.4, and H3 (arXiv 2212.14052), whose shift matrix it is.
    """
    (y,), window = joint_short_convolution(
        [inputs], weight, state, bias=bias, reset=reset, silu=[False], validate=validate
    )
    return y, window


def joint_short_convolution(
    inputs: Sequence[Float[Tensor, "batch time _"]],
    weight: Float[Tensor, "width channels"],
    state: Float[Tensor, "batch taps channels"] | None = None,
    *,
    bias: Float[Tensor, " channels"] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    silu: Sequence[bool],
    validate: bool = False,
) -> tuple[tuple[Float[Tensor, "batch time _"], ...], Float[Tensor, "batch taps channels"]]:
    """`short_convolution` of several inputs as if they stood side by side, and silu of those outputs that want it.

    The queries, keys and values of a head mixer, say: one weight and one state for all, and no copy that joins them.

    Args:
        inputs: x, in parts; `channels` is the sum of their widths.
        silu: for each part, whether its output is silu(y).

    The others, and what is raised, as for `short_convolution`. Returns the outputs, in parts, and the state.
    """
    for part in inputs:
        check_sequence("inputs", part, "batch time channels")
        check_shape("inputs", part, (*inputs[0].shape[:2], part.shape[2]), "batch time channels, as the first part")
    check_sequence("weight", weight, "width channels")
    batch, time = inputs[0].shape[:2]
    channels, past = sum(part.shape[2] for part in inputs), weight.shape[0] - 1
    check_shape("weight", weight, (past + 1, channels), "width channels, as inputs")
    if bias is not None:
        check_shape("bias", bias, (channels,), "channels")
    if state is None:
        state = inputs[0].new_zeros(batch, past, channels)
    check_shape("state", state, (batch, past, channels), "batch taps channels")
    check_reset(reset, batch, time)
    if validate:
        for part in inputs:
            check_finite(inputs=part)
        check_finite(weight=weight, bias=bias, state=state)
    state = state.to(inputs[0].dtype)
    outputs: Parts = _engine(tuple(inputs), weight, bias, state, reset, tuple(silu))
    # Only the end: a copy of the whole sequence would cost a pass over it.
    ends = [part[:, max(time - past, 0) :] for part in inputs]
    end = ends[0] if len(ends) == 1 else torch.cat(ends, dim=-1)
    window = torch.cat([state[:, min(time, past) :], end], dim=1)
    if reset is not None and past:
        # An input before the last reset must not reach a later step: forget it.
        after = torch.cat([torch.zeros_like(reset[:, :1]).expand(-1, past), reset], dim=1)[:, -past:]
        later = after.flip(1).cumsum(1).flip(1) - after.long()
        window = window.masked_fill((later > 0).unsqueeze(-1), 0)
    return outputs, window
