"""What chunks of a gated matrix memory cost, and how its gates scale what passes through it.

The operations of a chunkwise mLSTM and the bytes it moves, by the length of its chunks; the length at which operations
are fewest, and the one at which a device is fastest; and the map of the gain from values to outputs over the two gates'
pre-activations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.exponential_attention import exponential_attention
from ostinato.ops.linear_attention import linear_attention


def chunk_operations(time: int, chunk: float, key_dim: int, value_dim: int, causal: float = 1.0) -> float:
    """Operations of one head over `time` tokens, with the sigmoid gate, each elementary one counted as 1:

        T [L (2F(V + K) + 6F + 1) + (4VK + V + 2K + 11) + (2VK + 5) / L]

    F (`causal`) is the share of a chunk's matrix that is computed: 1/2 if nothing above the diagonal is, else 1.
    Raises `ConfigurationError` for sizes that are not positive. Source: arXiv 2503.14376, appendix.
    """
    _check(time=time, chunk=chunk, key_dim=key_dim, value_dim=value_dim, causal=causal)
    inside = 2 * causal * (value_dim + key_dim) + 6 * causal + 1
    across = 4 * value_dim * key_dim + value_dim + 2 * key_dim + 11
    return time * (chunk * inside + across + (2 * value_dim * key_dim + 5) / chunk)


def fewest_operations(key_dim: int, value_dim: int, causal: float = 1.0) -> float:
    """The chunk L* = √((2VK + 5) / (2F(V + K) + 6F + 1)) at which `chunk_operations` is least.

    Raises `ConfigurationError` for sizes that are not positive. Source: arXiv 2503.14376, appendix.
    """
    _check(key_dim=key_dim, value_dim=value_dim, causal=causal)
    inside = 2 * causal * (value_dim + key_dim) + 6 * causal + 1
    return math.sqrt((2 * value_dim * key_dim + 5) / inside)


def chunk_bytes(
    time: int,
    chunk: float,
    key_dim: int,
    value_dim: int,
    *,
    number_bytes: int = 2,
    gate_bytes: int = 4,
    state_bytes: int = 4,
) -> float:
    """Bytes that one head with the sigmoid gate moves to and from memory over `time` tokens:

        T/L [L(K + V)β + 2Lγ + KVσ]             the kernel that walks from chunk to chunk and stores the states
      + T/L [L(2K + V)β + 2Lγ + KVσ + LVβ]      the kernel that reads them, inside all chunks at once

    with β, γ, σ the bytes of a number of q, k, v and h, of a gate, of a state. Raises `ConfigurationError` for sizes
    that are not positive. Source: arXiv 2503.14376, appendix.
    """
    _check(time=time, chunk=chunk, key_dim=key_dim, value_dim=value_dim)
    _check(number_bytes=number_bytes, gate_bytes=gate_bytes, state_bytes=state_bytes)
    per_token = (3 * key_dim + 3 * value_dim) * number_bytes + 4 * gate_bytes
    return time * (per_token + 2 * key_dim * value_dim * state_bytes / chunk)


def fastest_chunk(
    key_dim: int, value_dim: int, intensity: float, *, causal: float = 1.0, state_bytes: int = 4
) -> float:
    """The chunk at which operations and bytes, one after the other, take the least time on a device:

        L = √((2VK + 5 + 2VKσI) / (2F(V + K) + 6F + 1))

    Args:
        key_dim, value_dim: K and V.
        intensity: I, the operations that the device computes while it moves a byte (an H100: 989e12 / 3.35e12 = 295).
        causal: F, see `chunk_operations`.
        state_bytes: σ, of a number of a state; the others do not matter, as every chunk moves them once.

    It grows as √(d I): states are the dearer the faster a device computes. Raises `ConfigurationError` for sizes that
    are not positive. Source: arXiv 2503.14376, appendix (its runtime model with nothing overlapped).
    """
    _check(key_dim=key_dim, value_dim=value_dim, intensity=intensity, causal=causal, state_bytes=state_bytes)
    inside = 2 * causal * (value_dim + key_dim) + 6 * causal + 1
    across = 2 * value_dim * key_dim
    return math.sqrt((across + 5 + across * state_bytes * intensity) / inside)


def stored_states(time: int, chunk: int, key_dim: int, value_dim: int) -> int:
    """Numbers in the states that one head stores, one at the end of each chunk: ⌈T / L⌉ K V."""
    _check(time=time, chunk=chunk, key_dim=key_dim, value_dim=value_dim)
    return math.ceil(time / chunk) * key_dim * value_dim


def _check(**sizes: float) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise ConfigurationError(f"{name} must be positive, got {size}")


@torch.no_grad()
def gate_transfer_map(
    input_gates: Float[Tensor, " inputs"],
    forget_gates: Float[Tensor, " forgets"],
    *,
    exponential: bool,
    time: int = 256,
    dim: int = 128,
    norm_eps: float = 1e-6,
    seed: int = 0,
) -> tuple[Float[Tensor, "inputs forgets"], Float[Tensor, "inputs forgets"]]:
    """The gain of an mLSTM head with constant gates, before and after its norm.

    q, k, v are normal; the gain is the mean over tokens of max_c |h_c|, over the same of v. The norm is
    h / √(mean h² + ε). With `exponential` the cell is mLSTMexp, else mLSTMsig without normaliser.

    Args:
        input_gates, forget_gates: pre-activations; their floating type is the type of the computation.
        exponential: which cell.
        time, dim: the length, and the width of keys and values.
        norm_eps: ε of the norm.
        seed: of q, k and v.

    Raises `ConfigurationError` for sizes that are not positive. Source: arXiv 2503.14376, section 5.
    """
    _check(time=time, dim=dim)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, time, 1, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (part.to(input_gates) for part in (q * dim**-0.5, k, v))
    many = len(forget_gates)
    queries, keys, values = (part.expand(many, -1, -1, -1) for part in (q, k, v))
    forget = F.logsigmoid(forget_gates).view(-1, 1, 1).expand(many, time, 1)
    scale = v.abs().amax(-1).mean()
    before, after = [], []
    for gate in input_gates:
        if exponential:
            hidden, _ = exponential_attention(queries, keys, values, gate.expand(many, time, 1), forget)
        else:
            hidden, _ = linear_attention(queries, keys * torch.sigmoid(gate), values, forget)
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm_eps)
        before.append(hidden.abs().amax(-1).mean((1, 2)) / scale)
        after.append(normed.abs().amax(-1).mean((1, 2)) / scale)
    return torch.stack(before), torch.stack(after)
