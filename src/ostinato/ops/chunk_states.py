"""From chunk to chunk: the states that the matrix engines carry, with adjoints of their own.

Inside a chunk everything is a product of matrices (`ostinato.ops.chunks`); here are the few long steps between
chunks. Tensors are chunk first. Both recurrences are differentiated by running them backwards, so derivatives of any
order are exact, and only the entering states are kept.

Source: Parallel DeltaNet (arXiv 2406.06484), section 3; the adjoint: Martin & Cundy 2018 (arXiv 1709.04057).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _ChunkStates(torch.autograd.Function):
    """S_{n+1} = c_n ⊙ S_n + B_n over chunks: the S that enters each chunk, and the last one.

    Few long steps with a large state: a loop is the best scan. Its derivative is the adjoint loop,
    μ_n = g_n + c_n ⊙ μ_{n+1}: this function again, run backwards, and what enters a chunk from behind is the
    gradient of what was written there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(reverse: bool, carried: Tensor, written: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        state, entering, count = initial, [], written.shape[0]
        for n in range(count - 1, -1, -1) if reverse else range(count):
            entering.append(state)
            state = torch.addcmul(written[n], carried[n], state)
        return torch.stack(entering[::-1] if reverse else entering), state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.reverse, carried, _, _ = inputs
        ctx.save_for_backward(carried, output[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        carried, entering = ctx.saved_tensors
        grad_written, grad_initial = _ChunkStates.apply(not ctx.reverse, carried, grad, grad_last)
        grad_carried = _sum_to(grad_written * entering, carried) if ctx.needs_input_grad[1] else None
        return None, grad_carried, grad_written, grad_initial


def _sum_to(grad: Tensor, factor: Tensor) -> Tensor:
    """Sum over the axes along which `factor` was broadcast."""
    axes = [axis for axis, size in enumerate(factor.shape) if size == 1 and grad.shape[axis] > 1]
    return grad.sum(axes, keepdim=True) if axes else grad


def chunk_states(
    carried: Float[Tensor, "chunks batch #heads #key_dim #value_dim"] | None,
    written: Float[Tensor, "chunks batch heads key_dim value_dim"],
    initial: Float[Tensor, "batch heads key_dim value_dim"],
) -> tuple[Float[Tensor, "chunks batch heads key_dim value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """The state that enters each chunk, and the last one, of S_{n+1} = carried_n ⊙ S_n + written_n.

    `carried` None is 1. Differentiable to any order.
    """
    if carried is None:
        states = torch.cat([initial.unsqueeze(0), written]).cumsum(0)
        return states[:-1], states[-1]
    return _ChunkStates.apply(False, carried, written, initial)


class _CorrectedStates(torch.autograd.Function):
    """y_n = U_n + P_n S_n,  S_{n+1} = c_n ⊙ S_n + L_nᵀ y_n + B_n over chunks: all y, all entering S, the last S.

    The transition c + LᵀP is never formed: two thin products a chunk cost less. With μ the gradient of S and ν
    that of y,
        ν_n = g_n + L_n μ_{n+1},   μ_n = c_n ⊙ μ_{n+1} + P_nᵀ ν_n + h_n,
    is this function again, run backwards, with L and P in each other's place.
    Batch and heads are one axis: P and L (chunks, m, steps, key_dim), U and y (chunks, m, steps, value_dim).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        reverse: bool,
        carried: Tensor | None,
        read: Tensor,
        fresh: Tensor,
        write: Tensor,
        added: Tensor | None,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        state, values, entering, count = initial, [], [], read.shape[0]
        for n in range(count - 1, -1, -1) if reverse else range(count):
            entering.append(state)
            values.append(torch.baddbmm(fresh[n], read[n], state))
            kept = state if carried is None else state * carried[n]
            state = torch.baddbmm(kept if added is None else kept + added[n], write[n].mT, values[-1])
        if reverse:
            values.reverse()
            entering.reverse()
        return torch.stack(values), torch.stack(entering), state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.reverse, carried, read, _, write, added, _ = inputs
        ctx.adds = added is not None
        ctx.save_for_backward(carried, read, write, *output[:2])

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, grad_entering: Tensor, grad_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        carried, read, write, values, entering = ctx.saved_tensors
        nu, mu, grad_initial = _CorrectedStates.apply(
            not ctx.reverse, carried, write, grad, read, grad_entering, grad_last
        )
        grad_carried = _sum_to(mu * entering, carried) if ctx.needs_input_grad[1] else None
        added = mu if ctx.adds else None
        return None, grad_carried, nu @ entering.mT, nu, values @ mu.mT, added, grad_initial


def corrected_states(
    carried: Float[Tensor, "chunks batch #heads #key_dim 1"] | None,
    read: Float[Tensor, "chunks batch heads steps key_dim"],
    fresh: Float[Tensor, "chunks batch heads steps value_dim"],
    write: Float[Tensor, "chunks batch heads steps key_dim"],
    added: Float[Tensor, "chunks batch heads key_dim value_dim"] | None,
    initial: Float[Tensor, "batch heads key_dim value_dim"],
) -> tuple[
    Float[Tensor, "chunks batch heads steps value_dim"],
    Float[Tensor, "chunks batch heads key_dim value_dim"],
    Float[Tensor, "batch heads key_dim value_dim"],
]:
    """States whose chunks look at them before they write: y_n = fresh_n + read_n S_n,
    S_{n+1} = carried_n ⊙ S_n + write_nᵀ y_n + added_n.

    Returns y, the state that enters each chunk, and the last one. `carried` None is 1, `added` None is 0.
    Differentiable to any order.
    """
    heads = initial.shape[:2]
    if carried is not None:
        carried = carried.expand(-1, *heads, -1, -1).flatten(1, 2)
    values, entering, last = _CorrectedStates.apply(
        False,
        carried,
        read.flatten(1, 2),
        fresh.flatten(1, 2),
        write.flatten(1, 2),
        None if added is None else added.flatten(1, 2),
        initial.flatten(0, 1),
    )
    return values.unflatten(1, heads), entering.unflatten(1, heads), last.unflatten(0, heads)
