"""Linear time-invariant systems over a whole sequence: a convolution inside blocks, a recurrence between them.

One system x_t = Ā x_{t−1} + B̄ u_t, y_t = C x_t per channel, with N real coordinates. For a block of L steps it is
four constant maps: the kernel C Ā^t B̄ (what the block's inputs give to its outputs), the write Ā^{L−1−t} B̄ (what
they leave in the state), the read C Ā^{t+1} (what the entering state gives to the outputs), and the carry Ā^L.
`diagonal_block` computes them for diagonal systems (S4D); `dplr_block` for diagonal plus low rank (S4), from L
evaluations of the generating function. `apply_blocks` runs any of them over a sequence, resets included.

Systems stand in complex coordinates of which conjugates are left out (see `hippo.py`): x is N/2 complex numbers, y =
2 Re(C x). Their real coordinates, in which states are kept, are (…, N/2, 2), flattened to N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from ostinato.ops.long_convolution import long_convolution


class Block(NamedTuple):
    """The maps of a system over `length` steps, for every channel, in real coordinates."""

    kernel: Float[Tensor, "length channels"]
    write: Float[Tensor, "channels size length"]
    read: Float[Tensor, "channels size length"]
    carry: Float[Tensor, "channels size size"] | Complex[Tensor, "channels half"]
    """Ā^L: a real matrix, or the complex diagonal."""
    after_write: Float[Tensor, "channels size size"] | None = None
    """A matrix still to be applied to what `write` gives."""
    before_read: Float[Tensor, "channels size size"] | None = None
    """A matrix to be applied to the entering state before `read`."""


def apply_blocks(
    block: Callable[[int], Block],
    inputs: Float[Tensor, "batch time channels"],
    state: Float[Tensor, "batch channels size"],
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    length: int = 256,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels size"]]:
    """y_t = C x_t for all t, and the last state, from the maps of whole blocks.

    Args:
        block: gives the system's maps for a number of steps.
        inputs: u.
        state: x before the first step, in real coordinates.
        reset: True marks the first step of a new sequence: x counts as zero there.
        length: steps per block: memory is in O(length · channels · size), and in O(T/length) for the states. A
            sequence that is no longer is one convolution.
    """
    time = inputs.shape[1]
    rest = time % length
    outputs = []
    for first, last, steps in ((0, time - rest, length), (time - rest, time, rest)):
        if first < last:
            part = None if reset is None else reset[:, first:last]
            y, state = _equal_blocks(block(steps), inputs[:, first:last], state, part, steps)
            outputs.append(y)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _equal_blocks(
    maps: Block, inputs: Tensor, state: Tensor, reset: Tensor | None, length: int
) -> tuple[Tensor, Tensor]:
    batch, time, channels = inputs.shape
    count = time // length
    u = inputs.reshape(batch * count, length, channels)
    marks = None if reset is None else reset.reshape(batch * count, length)
    y, _ = long_convolution(u, maps.kernel, reset=marks)
    written, keep = u, None
    if marks is not None:
        upto = marks.long().cumsum(1)
        # Only inputs after the last reset reach the state; the entering state reaches outputs before the first.
        written = u * (upto == upto[:, -1:]).unsqueeze(-1)
        keep = (upto[:, -1] == 0).view(batch, count, 1, 1)
    left = torch.einsum("btd,dst->bds", written, maps.write)
    if maps.after_write is not None:
        left = torch.einsum("dij,bdj->bdi", maps.after_write, left)
    left = left.view(batch, count, channels, -1)

    entering = []
    for index in range(count):
        entering.append(state)
        carried = _advance(maps.carry, state)
        if keep is not None:
            carried = carried * keep[:, index]
        state = carried + left[:, index]
    h = torch.stack(entering, dim=1).flatten(0, 1)
    if maps.before_read is not None:
        h = torch.einsum("dij,bdj->bdi", maps.before_read, h)
    seen = torch.einsum("bds,dst->btd", h, maps.read)
    if marks is not None:
        seen = seen * (upto == 0).unsqueeze(-1)
    return (y + seen).reshape(batch, time, channels), state


def _advance(carry: Tensor, state: Tensor) -> Tensor:
    if carry.is_complex():
        return to_real(carry * to_complex(state))
    return torch.einsum("dij,bdj->bdi", carry, state)


def to_real(x: Complex[Tensor, "... half"]) -> Float[Tensor, "... size"]:
    """Complex coordinates as real ones: real and imaginary parts, interleaved."""
    return torch.stack([x.real, x.imag], dim=-1).flatten(-2)


def to_complex(x: Float[Tensor, "... size"]) -> Complex[Tensor, "... half"]:
    """Real coordinates as complex ones; the inverse of `to_real`."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.complex(pairs[..., 0], pairs[..., 1])


def conjugate(x: Complex[Tensor, " ..."]) -> Complex[Tensor, " ..."]:
    """x*, as numbers rather than as a flag on x: `vmap` cannot take the parts of a flagged tensor."""
    return torch.complex(x.real, -x.imag)


def powers(transition: Complex[Tensor, " ..."], count: int) -> Complex[Tensor, "... count"]:
    """1, a, a², …, a^{count−1} along a new last axis, by doubling: no logarithm, so a may be 0."""
    series = torch.ones_like(transition).unsqueeze(-1)
    factor = transition.unsqueeze(-1)
    while series.shape[-1] < count:
        series = torch.cat([series, series * factor], dim=-1)
        factor = factor * factor
    return series[..., :count]


def diagonal_block(
    transition: Complex[Tensor, "channels half"],
    inputs: Complex[Tensor, "channels half"],
    outputs: Complex[Tensor, "channels half"],
    length: int,
) -> Block:
    """The maps of x_t = Ā ∘ x_{t−1} + B̄ u_t, y_t = 2 Re(C x_t) over `length` steps.

    Kernel: K_t = 2 Re Σ_n C_n B̄_n Ā_n^t.

    Source: S4D (arXiv 2206.11893), equation 5.
    """
    series = powers(transition, length + 1)
    kernel = 2 * torch.einsum("dn,dnt->td", outputs * inputs, series[..., :length]).real
    write = (inputs.unsqueeze(-1) * series[..., :length]).flip(-1)
    read = outputs.unsqueeze(-1) * series[..., 1:]
    return Block(
        kernel,
        torch.stack([write.real, write.imag], dim=2).flatten(1, 2),
        torch.stack([2 * read.real, -2 * read.imag], dim=2).flatten(1, 2),
        series[..., length],
    )


# --------------------------------------------------------------------------------------------------
# Diagonal plus low rank: A = Λ − P P*, with the bilinear rule.

# On a CPU the terms of Cauchy sums are formed for so many numbers at a time: more fall out of the caches.
_CACHED = 1 << 19


class DplrSystem(NamedTuple):
    """x' = (Λ − P P*) x + B u, y = 2 Re(C x), with a step Δ per channel; rank axis second."""

    eigenvalues: Complex[Tensor, "channels half"]
    low_rank: Complex[Tensor, "channels rank half"]
    inputs: Complex[Tensor, "channels half"]
    outputs: Complex[Tensor, "channels half"]
    step: Float[Tensor, "channels 1"]


def dplr_multiply(system: DplrSystem, x: Complex[Tensor, "... channels half"]) -> Complex[Tensor, "... channels half"]:
    """A x = Λ∘x − P (P* x). P* x, a sum over conjugate pairs, is real."""
    low = system.low_rank
    inner = 2 * (conjugate(low) * x.unsqueeze(-2)).sum(-1, keepdim=True).real
    return system.eigenvalues * x - (low * inner).sum(-2)


def dplr_solve(system: DplrSystem, x: Complex[Tensor, "... channels half"]) -> Complex[Tensor, "... channels half"]:
    """(I − ΔA/2)^{-1} x in O(N), by the Woodbury identity."""
    half_step = system.step / 2
    low = system.low_rank
    inverse = 1 / (1 - half_step * system.eigenvalues)
    solved = inverse * x
    inner = 2 * (conjugate(low) * solved.unsqueeze(-2)).sum(-1).real
    scaled = inverse.unsqueeze(-2) * low
    gram = 2 * torch.einsum("drn,dsn->drs", conjugate(low), scaled).real
    inner = _solve_small(gram * half_step.unsqueeze(-1), inner * half_step)
    return solved - (scaled * inner.unsqueeze(-1)).sum(-2)


def dplr_step(
    system: DplrSystem, inputs: Float[Tensor, "batch channels"], state: Float[Tensor, "batch channels size"]
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels size"]]:
    """One step of the bilinear rule in O(N): x⁺ = x + (I − ΔA/2)^{-1} Δ(A x + B u), y = 2 Re(C x⁺).

    Source: S4 (arXiv 2111.00396), appendix C.2, rearranged so that a small step loses no digits.
    """
    x = to_complex(state)
    change = dplr_multiply(system, x) + system.inputs * inputs.unsqueeze(-1)
    x = x + dplr_solve(system, system.step * change)
    return 2 * (system.outputs * x).sum(-1).real, to_real(x)


def dplr_kernel(
    system: DplrSystem, corrected: Complex[Tensor, "channels half"], length: int, *, damping: float = 0.0
) -> Float[Tensor, "length channels"]:
    """K_t = 2 Re(C Ā^t B̄), t < L, from the generating function at L nodes: O(N L) work.

    With D(ω) = 1/((1 − ω) − (1 + ω)ΔΛ/2) and s = (1 + ω)Δ/2,
        K̂(ω) = Σ_t ω^t K_t = Δ·[C̄DB − s·C̄DP (1 + s·P*DP)^{-1} P*DB],     C̄ = C(I − ω^L Ā^L),
    sums over conjugate pairs. This is the formula of the paper with both sides of 2/(1+ω) multiplied out, so the
    node ω = −1 is an ordinary one and gives the limit ΔC̄B/2.

    The nodes are ω_j = e^{−a/L} e^{−2πij/L} with a = `damping`, and K_t = e^{at/L}·irfft(K̂)_t. The paper has a = 0,
    the roots of unity, which come arbitrarily close to the poles of systems that hardly decay (LegT, FouT, small
    steps) and lose half of the digits of float32 there. With a = 1 nothing is lost.

    `corrected` is C̄, for the same damping, from `dplr_corrected`.

    Source: S4 (arXiv 2111.00396), section 3.2 and appendix C.3.
    """
    size = (length // 2 + 1) * 2 * corrected.shape[-1]
    group = max(1, _CACHED // size) if corrected.device.type == "cpu" else corrected.shape[0]
    parts = [
        _kernel(
            DplrSystem(*(part[first : first + group] for part in system)),
            corrected[first : first + group],
            length,
            damping,
        )
        for first in range(0, corrected.shape[0], group)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _kernel(system: DplrSystem, corrected: Tensor, length: int, damping: float) -> Tensor:
    """`dplr_kernel` for all channels at once."""
    cauchy, scale = _cauchy(system, length, damping)
    bras = torch.stack([corrected, *conjugate(system.low_rank).unbind(1)], dim=1)
    kets = torch.stack([system.inputs, *system.low_rank.unbind(1)], dim=1)
    # All Cauchy sums in one product: row 0 is C̄, column 0 is B, the others are P* and P.
    sums = torch.einsum("drsn,jdn->jdrs", _pairs(bras).unsqueeze(2) * _pairs(kets).unsqueeze(1), cauchy)
    inner = _solve_small(sums[..., 1:, 1:] * scale.unsqueeze(-1), sums[..., 1:, 0] * scale)
    spectrum = system.step.squeeze(-1) * (sums[..., 0, 0] - (sums[..., 0, 1:] * inner).sum(-1))
    return _inverse(spectrum, length, damping)


def _cauchy(system: DplrSystem, length: int, damping: float) -> tuple[Tensor, Tensor]:
    """D(ω) = 1/((1 − ω) − (1 + ω)ΔΛ/2), (nodes, channels, size) over all pairs, and s = (1 + ω)Δ/2."""
    node = torch.arange(length // 2 + 1, device=system.step.device, dtype=system.step.dtype)
    radius = torch.full_like(node, math.exp(-damping / length))
    omega = torch.polar(radius, (-2 * math.pi / length) * node).view(-1, 1, 1)
    scale = (1 + omega) * (system.step / 2)
    return 1 / ((1 - omega) - scale * _pairs(system.eigenvalues)), scale


class _Nodes(NamedTuple):
    """What the resolvents share: over nodes, channels and all conjugate pairs."""

    cauchy: Tensor  # D(ω) = 1/((1 − ω) − (1 + ω)ΔΛ/2)
    scale: Tensor  # s = (1 + ω)Δ/2
    gram: Tensor  # s·P*DP
    ket: Tensor  # P
    bra: Tensor  # P*


def _nodes(system: DplrSystem, length: int, damping: float) -> _Nodes:
    cauchy, scale = _cauchy(system, length, damping)
    ket, bra = _pairs(system.low_rank), _pairs(conjugate(system.low_rank))
    gram = torch.einsum("drsn,jdn->jdrs", bra.unsqueeze(2) * ket.unsqueeze(1), cauchy) * scale.unsqueeze(-1)
    return _Nodes(cauchy, scale, gram, ket, bra)


def _columns(system: DplrSystem, nodes: _Nodes) -> Tensor:
    """(I − ωĀ)^{-1} B̄ = Δ·[DB − s·DP (1 + s·P*DP)^{-1} P*DB], (nodes, channels, size)."""
    right = nodes.cauchy * _pairs(system.inputs)
    inner = _solve_small(nodes.gram, torch.einsum("drn,jdn->jdr", nodes.bra, right) * nodes.scale)
    return system.step * (right - nodes.cauchy * torch.einsum("drn,jdr->jdn", nodes.ket, inner))


def _rows(corrected: Tensor, nodes: _Nodes) -> Tensor:
    """C̄ [(1 − ω)I − (1 + ω)ΔA/2]^{-1}, (nodes, channels, size)."""
    left = nodes.cauchy * _pairs(corrected)
    inner = _solve_small(nodes.gram.mT, torch.einsum("drn,jdn->jdr", nodes.ket, left) * nodes.scale)
    return left - nodes.cauchy * torch.einsum("drn,jdr->jdn", nodes.bra, inner)


def _inverse(spectrum: Tensor, length: int, damping: float) -> Tensor:
    """The sequence, along axis 0, whose generating function at the nodes is `spectrum`."""
    sequence = torch.fft.irfft(spectrum, n=length, dim=0)
    if damping == 0:
        return sequence
    time = torch.arange(length, device=sequence.device, dtype=sequence.dtype)
    return sequence * torch.exp(time * (damping / length)).view(-1, *[1] * (sequence.ndim - 1))


def _pairs(x: Tensor) -> Tensor:
    """A coordinate and its conjugate, all coordinates first: N/2 -> N."""
    return torch.cat([x, conjugate(x)], dim=-1)


def _solve_small(matrix: Tensor, vector: Tensor) -> Tensor:
    """(I + M)^{-1} v for M of rank × rank; ranks 1 and 2 (all that occur) are written out."""
    rank = matrix.shape[-1]
    if rank == 1:
        return vector / (1 + matrix[..., 0])
    if rank == 2:
        a, b = 1 + matrix[..., 0, 0], matrix[..., 0, 1]
        c, d = matrix[..., 1, 0], 1 + matrix[..., 1, 1]
        x, y = vector[..., 0], vector[..., 1]
        return torch.stack([d * x - b * y, a * y - c * x], dim=-1) / (a * d - b * c).unsqueeze(-1)
    identity = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(matrix + identity, vector.unsqueeze(-1)).squeeze(-1)


def dplr_growth(system: DplrSystem, length: int) -> Float[Tensor, "channels size size"]:
    """Ā^L − I in real coordinates, by squaring. The difference is kept because Ā is close to I for small steps."""
    size = 2 * system.eigenvalues.shape[-1]
    channels = system.step.shape[0]
    identity = torch.eye(size, dtype=system.step.dtype, device=system.step.device)
    basis = to_complex(identity).unsqueeze(1).expand(size, channels, -1)
    change = dplr_solve(system, system.step * dplr_multiply(system, basis))
    base = to_real(change).permute(1, 2, 0)
    result = None
    while length:
        if length & 1:
            result = base if result is None else result + base + result @ base
        length >>= 1
        if length:
            base = 2 * base + base @ base
    assert result is not None
    return result


def dplr_corrected(
    system: DplrSystem, growth: Float[Tensor, "channels size size"], *, damping: float = 0.0
) -> Complex[Tensor, "channels half"]:
    """C̄ = C(I − e^{−damping} Ā^L), with Ā^L − I from `dplr_growth`."""
    row = to_real(conjugate(system.outputs)).unsqueeze(1)
    decay = math.exp(-damping)
    return conjugate(to_complex(((1 - decay) * row - decay * (row @ growth)).squeeze(1)))


def dplr_block(system: DplrSystem, length: int, *, damping: float = 1.0) -> Block:
    """The maps of the system under the bilinear rule over `length` steps: O(N L) by resolvents, and Ā^L.

    The inverse transforms of the resolvents are periodic sums: Σ_m ω^{mL} Ā^{t+mL} B̄ = (I − ω^L Ā^L)^{-1} Ā^t B̄ for
    the write, so I − ω^L Ā^L is applied to what it gives; C̄ takes care of it in the kernel and the read. The
    read C̄ [..]^{-1} meets the state after (I + ΔA/2), the state of the continuous system. `damping` as in
    `dplr_kernel`.

    Source: S4 (arXiv 2111.00396), appendix C.3; the authors' code for the continued state.
    """
    growth = dplr_growth(system, length)
    corrected = dplr_corrected(system, growth, damping=damping)
    nodes = _nodes(system, length, damping)
    columns, rows = _columns(system, nodes), _rows(corrected, nodes)
    half = corrected.shape[-1]
    kernel = _inverse((_pairs(corrected) * columns).sum(-1), length, damping)
    plus, minus = columns[..., :half], columns[..., half:]
    write = torch.stack([(plus + minus) / 2, (plus - minus) / 2j], dim=-1).flatten(-2)
    plus, minus = rows[..., :half], rows[..., half:]
    read = torch.stack([plus + minus, 1j * (plus - minus)], dim=-1).flatten(-2)
    identity = torch.eye(2 * half, dtype=growth.dtype, device=growth.device)
    basis = to_complex(identity).unsqueeze(1).expand(-1, growth.shape[0], -1)
    ahead = to_real(dplr_multiply(system, basis) * (system.step / 2)).permute(1, 2, 0)
    decay = math.exp(-damping)
    return Block(
        kernel,
        _inverse(write, length, damping).flip(0).permute(1, 2, 0),
        _inverse(read, length, damping).permute(1, 2, 0),
        growth + identity,
        after_write=(1 - decay) * identity - decay * growth,
        before_read=ahead + identity,
    )
