"""What a linear recurrence can follow, by the eigenvalues of its transitions: statements that can be computed.

    S_t = A(x_t) S_{t−1} + B(x_t)

With real eigenvalues in [0, 1] a constant input brings the state to rest, so parity cannot be followed; with real
ones in [−1, 1] it comes to alternate between two values, so counting modulo 3 cannot (`state_change`, with lag 1 and
2). With −1 one channel follows parity (`diagonal_parity`, `delta_parity`); with two reflections a step, counting
modulo any m (`count_modulo`); with enough of them, the words of any finite group (`follow_words`). Two layers of single
reflections add modulo m as well (`add_modulo`).

The constructions run on the package's engines. From the zero state a transition does nothing: each sequence begins
with a start token, which makes the first write.

Sources: Grazzi et al. 2024 (arXiv 2411.12537), sections 4 and 5; Siems et al. 2025 (arXiv 2502.10297), section 4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.theory.householder import product

# --------------------------------------------------------------------------------------------------
# Constant input.


def diagonal_states(
    transition: Float[Tensor, "layers width"],
    inputs: Float[Tensor, "layers width"],
    time: int,
    initial: Float[Tensor, "layers width"] | None = None,
) -> Float[Tensor, "layers time width"]:
    """The states of h_t = a ⊙ h_{t−1} + b, the same a and b at every step; in the type of `inputs`."""
    a, b = (tensor.unsqueeze(1).expand(-1, time, -1) for tensor in (transition, inputs))
    return diagonal_scan(a, b, initial)[0]


def delta_states(
    keys: Float[Tensor, "layers writes key_dim"],
    values: Float[Tensor, "layers writes value_dim"],
    betas: Float[Tensor, "layers writes"],
    time: int,
    initial: Float[Tensor, "layers key_dim value_dim"] | None = None,
) -> Float[Tensor, "layers time key_dim value_dim"]:
    """The states of the delta rule with the same n writes at every step; in the type of `keys`."""
    return _delta_states(
        keys.repeat(1, time, 1), values.repeat(1, time, 1), betas.repeat(1, time), writes=keys.shape[1], initial=initial
    )


def state_change(states: Float[Tensor, "layers time ..."], lag: int = 1) -> Float[Tensor, "layers times"]:
    """max |S_{t+lag} − S_t| for every t; goes to 0 when the state comes to rest (lag 1) or to alternate (lag 2)."""
    return (states[:, lag:] - states[:, :-lag]).flatten(2).abs().amax(-1)


def _delta_states(
    keys: Tensor, values: Tensor, betas: Tensor, *, writes: int, initial: Tensor | None = None
) -> Float[Tensor, "batch time key_dim value_dim"]:
    """Every state, read off a delta-rule layer by one head for each row: the head's query is a unit vector."""
    batch, steps, key_dim = keys.shape
    queries = torch.eye(key_dim, dtype=keys.dtype).expand(batch, steps // writes, -1, -1)

    def copies(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(2).expand(batch, steps, key_dim, *tensor.shape[2:])

    state = None if initial is None else initial.unsqueeze(1).expand(-1, key_dim, -1, -1)
    return delta_rule(queries, copies(keys), copies(values), copies(betas), None, state)[0]


# --------------------------------------------------------------------------------------------------
# Constructions. Each takes whole sequences without the start token, and answers at every position.


def diagonal_parity(bits: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Parity of each prefix by one channel: a(1) = −1, a(0) = 1, the start token writes 1; the answer is the sign."""
    transition = _after_start(1.0 - 2.0 * bits, 0.0).unsqueeze(-1)
    inputs = torch.zeros_like(transition)
    inputs[:, 0] = 1
    states, _ = diagonal_scan(transition, inputs)
    return (states[:, 1:, 0] < 0).long()


def delta_parity(bits: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Parity of each prefix by DeltaNet: one key, β(1) = 2, β(0) = 0; the start token writes 1 with β = 1."""
    betas = _after_start(2.0 * bits, 1.0)
    keys = torch.ones_like(betas).unsqueeze(-1)
    values = torch.zeros_like(keys)
    values[:, 0] = 1
    states = _delta_states(keys, values, betas, writes=1)
    return (states[:, 1:, 0, 0] < 0).long()


def count_modulo(bits: Int[Tensor, "batch time"], modulus: int) -> Int[Tensor, "batch time"]:
    """The ones of each prefix modulo m by one layer with two writes: at a one, two reflections π/m apart.

    They turn the plane by 2π/m, with the eigenvalues e^{±2πi/m}; at a zero β = 0. Raises `ConfigurationError` for a
    modulus below 2.
    """
    _check_modulus(modulus)
    angle = math.pi / modulus
    keys = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    betas = (2.0 * bits.double()).unsqueeze(-1).expand(-1, -1, 2)
    states = _transformed(keys.expand(*bits.shape, 2, 2), betas, start)
    return _nearest_turn(states, modulus)


def add_modulo(numbers: Int[Tensor, "batch time"], modulus: int) -> Int[Tensor, "batch time"]:
    """The sum of each prefix modulo m by two layers with one write: reflections alone, the dihedral trick.

    Layer 1 holds p_t = (−1)^t. In layer 2 the key stands at the angle π p_t x_t / m − π/2, so that the state's angle
    goes θ ← 2π p_t x_t / m − θ, and p_t θ_t is the sum times 2π/m. Raises `ConfigurationError` for a modulus below 2.
    """
    _check_modulus(modulus)
    batch, time = numbers.shape
    keys = torch.ones(batch, 1 + time, 1, dtype=torch.float64)
    values = torch.zeros_like(keys)
    values[:, 0] = 1
    betas = torch.full((batch, 1 + time), 2.0, dtype=torch.float64)
    betas[:, 0] = 1
    sign = _delta_states(keys, values, betas, writes=1)[:, 1:, 0, 0]

    angle = math.pi * sign * numbers / modulus - math.pi / 2
    keys = torch.stack([angle.cos(), angle.sin()], dim=-1).unsqueeze(2)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    states = _transformed(keys, torch.full_like(angle, 2.0).unsqueeze(-1), start)
    return _nearest_turn(torch.stack([states[..., 0], sign * states[..., 1]], dim=-1), modulus)


def follow_words(
    keys: Float[Tensor, "order writes n"], betas: Float[Tensor, "order writes"], words: Int[Tensor, "batch time"]
) -> Int[Tensor, "batch time"]:
    """x_1 ∘ … ∘ x_t at every t by one layer, from reflections that represent a finite group on R^n.

    Args:
        keys, betas: for each element x the factors of its matrix ρ(x) (see `theory.householder`), β = 2, or 0 where
            an element needs fewer than `writes`.
        words: elements.

    The transition at x is ρ(x)⁻¹, its factors in reverse order, so that the state is ρ(x_1 ∘ … ∘ x_t)⁻¹ s; the start
    s is written by the start token, and chosen so that no two elements carry it to the same place. Computed in the
    type of `keys`.

    Raises `ConfigurationError` for other betas than 0 and 2, or a representation that two elements share.
    """
    if not bool(((betas == 0) | (betas == 2)).all()):
        raise ConfigurationError("words are followed by reflections: every beta is 2, or 0 for a factor left out")
    keys, betas = keys.flip(-2), betas.flip(-1)
    inverses = product(keys, betas)
    start = _free_vector(inverses)
    states = _transformed(keys[words], betas[words], start)
    return (states @ (inverses @ start).mT).argmax(-1)


def _transformed(
    keys: Float[Tensor, "batch time writes n"], betas: Float[Tensor, "batch time writes"], start: Float[Tensor, " n"]
) -> Float[Tensor, "batch time n"]:
    """A_t … A_1 s for every t: the start token writes the unit vector s, every other token multiplies."""
    batch, time, writes, n = keys.shape
    first_key = start.expand(batch, 1, writes, n)
    first_beta = torch.zeros(batch, 1, writes, dtype=keys.dtype)
    first_beta[..., 0] = 1
    keys, betas = torch.cat([first_key, keys], dim=1), torch.cat([first_beta, betas], dim=1)
    values = torch.zeros(batch, (1 + time) * writes, 1, dtype=keys.dtype)
    values[:, 0] = 1
    return _delta_states(keys.flatten(1, 2), values, betas.flatten(1, 2), writes=writes)[:, 1:, :, 0]


def _free_vector(matrices: Float[Tensor, "order n n"]) -> Float[Tensor, " n"]:
    """A unit vector that the matrices carry to places as far apart as the best of some random ones."""
    n = matrices.shape[-1]
    tried = torch.randn(256, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrices.dtype)
    tried = torch.nn.functional.normalize(tried, dim=-1)
    places = torch.einsum("gij,sj->sgi", matrices, tried)
    apart = torch.cdist(places, places)
    apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
    nearest = apart.amin((1, 2))
    if float(nearest.max()) < 1e-3:
        raise ConfigurationError("two elements have the same matrix: the representation does not tell them apart")
    return tried[int(nearest.argmax())]


def _nearest_turn(states: Float[Tensor, "batch time 2"], modulus: int) -> Int[Tensor, "batch time"]:
    turns = torch.atan2(states[..., 1], states[..., 0]) * (modulus / (2 * math.pi))
    return turns.round().long() % modulus


def _after_start(values: Tensor, start: float) -> Tensor:
    """float64, with the start token's value before them."""
    return torch.nn.functional.pad(values.double(), (1, 0), value=start)


def _check_modulus(modulus: int) -> None:
    if modulus < 2:
        raise ConfigurationError(f"a modulus is at least 2, got {modulus}")
