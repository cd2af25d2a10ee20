"""How many heads a linear state space model is worth: its lag operators, and the positional heads that equal it.

    s_i = A s_{i−1} + B x_i, y_i = C s_i + D x_i   is   y_i = Σ_{j ≤ i} K_{i−j} x_j,  K_τ = C A^τ B (K_0 = C B + D)

If the lag operators span k dimensions, H heads with scores c_{i−j,h} (signed, not normalised) and value maps V_h equal
the model exactly if and only if H ≥ k; with fewer, the best mean squared error under white inputs is Σ_{h>H} σ_h² of
the matrix with rows √(n−τ) vec K_τ.

Source: Ghodsi, How Many Heads Make an SSM? (arXiv 2512.15115), the equivalence; the error of fewer heads is derived.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError


def random_system(
    states: int, d: int, p: int, *, seed: int = 0, radius: float | None = None
) -> tuple[Float[Tensor, "states states"], Float[Tensor, "states d"], Float[Tensor, "p states"]]:
    """A, B, C of a random stable system, float64.

    Eigenvalues of A are real ± or complex pairs with modulus U[0.3, 0.97]; with `radius` the first is that number, and
    the others' moduli are U[0.3, 0.9] of it. B, C ∼ N(0, 1)/√states.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    transition = torch.zeros(states, states, dtype=torch.float64)
    place = 0
    while place < states:
        modulus = uniform(0.3, 0.97) if radius is None else radius * uniform(0.3, 0.9)
        if radius is not None and place == 0:
            transition[0, 0] = radius
            place = 1
        elif place + 1 < states and uniform(0, 1) < 0.5:
            angle = torch.tensor(uniform(0.1, 3.0), dtype=torch.float64)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
            transition[place : place + 2, place : place + 2] = modulus * turn
            place += 2
        else:
            transition[place, place] = modulus if uniform(0, 1) < 0.5 else -modulus
            place += 1
    inputs = torch.randn(states, d, generator=generator, dtype=torch.float64) / states**0.5
    outputs = torch.randn(p, states, generator=generator, dtype=torch.float64) / states**0.5
    return transition, inputs, outputs


def lag_operators(
    a: Float[Tensor, "states states"],
    b: Float[Tensor, "states d"],
    c: Float[Tensor, "p states"],
    d: Float[Tensor, "p d"] | None,
    n: int,
) -> Float[Tensor, "n p d"]:
    """K_τ = C A^τ B for τ = 0 … n−1, with D added to K_0. Raises `ShapeError` for matrices that do not fit or n < 1."""
    if n < 1 or a.shape != (len(b), len(b)) or c.shape[-1] != len(b):
        raise ShapeError(f"A, B, C of shapes {tuple(a.shape)}, {tuple(b.shape)}, {tuple(c.shape)} for n={n} do not fit")
    driven, operators = b, []
    for _ in range(n):
        operators.append(c @ driven)
        driven = a @ driven
    if d is not None:
        operators[0] = operators[0] + d
    return torch.stack(operators)


def operator_of_lags(lags: Float[Tensor, "n p d"]) -> Float[Tensor, "n n p d"]:
    """W_ij = K_{i−j} for j ≤ i, else 0."""
    distance = _distances(len(lags), lags.device)
    return torch.where((distance >= 0)[:, :, None, None], lags[distance.clamp(min=0)], 0)


def linear_system(a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The layer x (batch, n, d) -> (batch, n, p) of a system, by its recurrence."""

    def layer(x: Float[Tensor, "batch n d"]) -> Float[Tensor, "batch n p"]:
        state = x.new_zeros(len(x), len(a))
        outputs = []
        for t in range(x.shape[1]):
            state = state @ a.mT + x[:, t] @ b.mT
            outputs.append(state @ c.mT)
        y = torch.stack(outputs, dim=1)
        return y if d is None else y + x @ d.mT

    return layer


def heads_from_lags(
    lags: Float[Tensor, "n p d"], heads: int | None = None
) -> tuple[Float[Tensor, "n heads"], Float[Tensor, "heads p d"]]:
    """Scores c and value maps V with K_τ ≈ Σ_h c_{τ,h} V_h: exact from the rank on, the best under white inputs below.

    By the singular value decomposition of the rows √(n−τ) vec K_τ (lag τ occurs n−τ times). Without `heads`, as many as
    the rank. Raises `ConfigurationError` for fewer than one head, or more than min(n, p·d).
    """
    n, p, d = lags.shape
    often = torch.arange(n, 0, -1, dtype=lags.dtype, device=lags.device).sqrt().unsqueeze(1)
    u, s, v = torch.linalg.svd(often * lags.flatten(1), full_matrices=False)
    if heads is None:
        heads = max(1, int((s > 1e-10 * s[0]).sum()))
    if not 1 <= heads <= len(s):
        raise ConfigurationError(f"there are 1 … {len(s)} heads for n={n} and maps {p}×{d}, got {heads}")
    return u[:, :heads] * s[:heads] / often, v[:heads].unflatten(1, (p, d))


def heads_from_ssm(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, n: int, heads: int | None = None
) -> tuple[Float[Tensor, "n heads"], Float[Tensor, "heads p d"]]:
    """`heads_from_lags` of the system's lag operators. Source: arXiv 2512.15115, the equivalence theorem."""
    return heads_from_lags(lag_operators(a, b, c, d, n), heads)


def head_count_bound(
    a: Tensor, b: Tensor, c: Tensor, n: int, d: Tensor | None = None
) -> Float[Tensor, " heads_and_one"]:
    """The least relative mean squared error of H = 0, 1, … heads with positional scores, under white inputs.

    Σ_{h>H} σ_h² / Σ σ_h² of the weighted lag matrix. Free scores for every pair (i, j) do no better: for given V each
    pair's best is the projection of K_{i−j}, which depends on i − j alone.
    """
    return error_curve(lag_operators(a, b, c, d, n))


def error_curve(lags: Float[Tensor, "n p d"]) -> Float[Tensor, " heads_and_one"]:
    """`head_count_bound` of lag operators."""
    n = len(lags)
    often = torch.arange(n, 0, -1, dtype=lags.dtype, device=lags.device).sqrt().unsqueeze(1)
    energy = torch.linalg.svdvals(often * lags.flatten(1)).square()
    tail = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)]) / tail[0]


class PositionalMultiHead(nn.Module):
    """y_i = Σ_h Σ_{j ≤ i} c_{i−j,h} V_h x_j, or with scores α_{ij,h} for every pair: attention by positions only.

    Args:
        scores: c (n, heads), or α (n, n, heads) of which j ≤ i counts.
        values: V (heads, p, d).

    Raises:
        ShapeError: they do not fit each other, or a sequence is longer than n.
    """

    def __init__(self, scores: Tensor, values: Float[Tensor, "heads p d"]) -> None:
        super().__init__()
        if scores.ndim not in (2, 3) or values.ndim != 3 or scores.shape[-1] != len(values):
            raise ShapeError(f"scores {tuple(scores.shape)} and values {tuple(values.shape)} do not fit")
        self.scores, self.values = nn.Parameter(scores.clone()), nn.Parameter(values.clone())

    def operator(self) -> Float[Tensor, "n n p d"]:
        """W_ij = Σ_h α_{ij,h} V_h, zero above the diagonal."""
        distance = _distances(len(self.scores), self.scores.device)
        table = self.scores[distance.clamp(min=0)] if self.scores.ndim == 2 else self.scores
        table = torch.where((distance >= 0).unsqueeze(-1), table, 0)
        return (table @ self.values.flatten(1)).unflatten(-1, self.values.shape[1:])

    def forward(self, x: Float[Tensor, "batch time d"]) -> Float[Tensor, "batch time p"]:
        """The outputs."""
        time = x.shape[1]
        if time > len(self.scores):
            raise ShapeError(f"the scores reach {len(self.scores)} steps, the sequence has {time}")
        return torch.einsum("ijpd,bjd->bip", self.operator()[:time, :time], x)


def fit_heads(
    lags: Float[Tensor, "n p d"],
    heads: int,
    *,
    free: bool = False,
    sequences: int = 512,
    sweeps: int = 40,
    seed: int = 0,
) -> tuple[PositionalMultiHead, float]:
    """Train heads from random values to the system's outputs on white-noise sequences, by alternating least squares.

    The squared error on the sequences is quadratic in the scores for given values, and in the values for given scores;
    each sweep minimises both in turn. (Quasi-Newton steps on all at once stall: small singular values of the lags make
    the problem ill-conditioned.)

    Args:
        lags: of the system.
        heads: H.
        free: a score for every pair and head, in place of one for every distance and head.
        sequences: standard normal, of length n.
        sweeps: how many.
        seed: of the sequences and of the start.

    Returns:
        The heads, and their relative mean squared error under white inputs (exact, not on the sequences).

    In the type of the lags; use float64.
    """
    n, p, d = lags.shape
    generator = torch.Generator().manual_seed(seed)
    target = operator_of_lags(lags)
    x = torch.randn(sequences, n * d, generator=generator, dtype=lags.dtype)
    # The error depends on the sequences by their second moments alone.
    moments = (x.mT @ x / sequences).view(n, d, n, d)
    goal = torch.einsum("ikpe,jdke->ijpd", target, moments)
    values = torch.randn(heads, p, d, generator=generator, dtype=lags.dtype)
    scores = lags.new_zeros(n, n, heads) if free else lags.new_zeros(n, heads)
    distance = _distances(n, lags.device)
    for _ in range(sweeps):
        gram = torch.einsum("hpd,jdke,gpe->jhkg", values, moments, values)
        wanted = torch.einsum("ijpd,hpd->ijh", goal, values)
        scores = _free_scores(gram, wanted) if free else _positional_scores(gram, wanted)
        table = scores if free else torch.where((distance >= 0).unsqueeze(-1), scores[distance.clamp(min=0)], 0)
        mixed = torch.einsum("ijh,jdke->ihdke", table, moments)
        gram = torch.einsum("ihdke,ikg->hdge", mixed, table).reshape(heads * d, heads * d)
        wanted = torch.einsum("ihdke,ikpe->hdp", mixed, target).reshape(heads * d, p)
        values = _solve(gram, wanted).view(heads, d, p).transpose(1, 2)
    model = PositionalMultiHead(scores, values)
    with torch.no_grad():
        return model, float((model.operator() - target).square().sum() / target.square().sum())


def _free_scores(gram: Float[Tensor, "n h n h"], wanted: Float[Tensor, "n n h"]) -> Float[Tensor, "n n h"]:
    n, _, heads = wanted.shape
    scores = torch.zeros_like(wanted)
    for i in range(n):
        size = (i + 1) * heads
        system = gram[: i + 1, :, : i + 1].reshape(size, size)
        scores[i, : i + 1] = _solve(system, wanted[i, : i + 1].reshape(size, 1)).view(i + 1, heads)
    return scores


def _positional_scores(gram: Float[Tensor, "n h n h"], wanted: Float[Tensor, "n n h"]) -> Float[Tensor, "n h"]:
    n, _, heads = wanted.shape
    system, right = torch.zeros_like(gram), wanted.new_zeros(n, heads)
    for i in range(n):
        # Position j is at distance i − j: the block up to i, backwards.
        system[: i + 1, :, : i + 1] += gram[: i + 1, :, : i + 1].flip(0, 2)
        right[: i + 1] += wanted[i, : i + 1].flip(0)
    return _solve(system.reshape(n * heads, n * heads), right.reshape(-1, 1)).view(n, heads)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """With a little added to the diagonal: more heads than the rank leave the system singular."""
    added = 1e-13 * system.diagonal().mean()
    return torch.linalg.solve(system + added * torch.eye(len(system), dtype=system.dtype, device=system.device), right)


def _distances(n: int, device: torch.device) -> Tensor:
    index = torch.arange(n, device=device)
    return index.unsqueeze(1) - index
