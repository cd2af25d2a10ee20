"""Piecewise-linear cells: affine in each region, exactly; the family's formulas; runs side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.cells import autodiff_jacobian
from ostinato.ops.cells.piecewise_linear import (
    ALRNN,
    PLRNN,
    DendriticPLRNN,
    Latent,
    PiecewiseLinear,
    ShallowPLRNN,
    draw_diagonal,
)
from ostinato.ops.newton_scan import newton_scan
from ostinato.ops.recurrent_scan import recurrent_scan

CELLS = {
    "plrnn": PLRNN(),
    "mean-centred": PLRNN(mean_centred=True),
    "dendritic": DendriticPLRNN(branches=3),
    "dendritic, clipped": DendriticPLRNN(branches=3, clipped=True),
    "shallow": ShallowPLRNN(hidden=7, clipped=False),
    "shallow, clipped": ShallowPLRNN(hidden=7),
    "al-rnn": ALRNN(switching=2),
    "al-rnn, learned slopes": ALRNN(switching=3, learned_slopes=True),
}
LATENT = 4


def weights_of(cell: PiecewiseLinear, run: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(run)
    drawn = cell.draw(LATENT, run, generator)
    for name, value in drawn.items():
        if name not in cell.constants():
            value += 0.4 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return tuple(drawn[name] for name in cell.names)


@pytest.mark.parametrize("name", CELLS)
def test_the_step_is_the_affine_map_of_its_region(name: str) -> None:
    cell = CELLS[name]
    weights, states = weights_of(cell), torch.randn(50, LATENT, dtype=torch.float64)
    jacobians, offsets = cell.affine(weights, cell.regions(weights, states))
    torch.testing.assert_close((jacobians @ states[..., None])[..., 0] + offsets, cell.advance(weights, states))
    _, found = autodiff_jacobian(cell, weights, Latent(states), torch.zeros_like(states))
    torch.testing.assert_close(jacobians, found)
    adjoint = torch.randn_like(states)
    pulled = cell.pull_back(weights, cell.linearise(weights, states), adjoint)
    torch.testing.assert_close(pulled, (jacobians.mT @ adjoint[..., None])[..., 0])
    assert torch.linalg.matrix_norm(jacobians, 2).max() <= cell.norm_bound(weights) + 1e-9


@pytest.mark.parametrize("name", CELLS)
def test_runs_side_by_side_are_each_run_alone(name: str) -> None:
    cell = CELLS[name]
    alone = [weights_of(cell, run) for run in range(3)]
    together = tuple(
        torch.stack([weights[i] if key in cell.matrices else weights[i].unsqueeze(0) for weights in alone])
        for i, key in enumerate(cell.names)
    )
    states = torch.randn(3, 5, LATENT, dtype=torch.float64)
    regions = cell.regions(together, states)
    jacobians, offsets = cell.affine(together, regions)
    for run, weights in enumerate(alone):
        torch.testing.assert_close(cell.advance(together, states)[run], cell.advance(weights, states[run]))
        one = cell.affine(weights, cell.regions(weights, states[run]))
        torch.testing.assert_close(jacobians[run], one[0])
        torch.testing.assert_close(offsets[run], one[1])
        torch.testing.assert_close(cell.norm_bound(together)[run], cell.norm_bound(weights))


@pytest.mark.parametrize("name", CELLS)
def test_the_engines_run_them(name: str) -> None:
    cell = CELLS[name]
    weights, inputs = weights_of(cell), 0.3 * torch.randn(2, 12, LATENT, dtype=torch.float64)
    outputs, state = recurrent_scan(cell, weights, inputs)
    latent = torch.zeros(2, LATENT, dtype=torch.float64)
    for t in range(12):
        latent = cell.advance(weights, latent) + inputs[:, t]
        torch.testing.assert_close(outputs[:, t], latent)
    torch.testing.assert_close(state.latent, latent)
    # Newton finds the orbit of a piecewise-linear map exactly, once it has the regions
    solved, _ = newton_scan(cell, weights, inputs, iterations=13)
    torch.testing.assert_close(solved, outputs)


def test_formulas() -> None:
    z = torch.tensor([1.0, -2.0, 0.5, -0.25], dtype=torch.float64)
    relu = torch.relu(z)
    a, w, h, s = weights_of(ALRNN(2))
    bent = torch.cat([z[:2], relu[2:]])
    torch.testing.assert_close(ALRNN(2).advance((a, w, h, s), z), a * z + w @ bent + h)
    hollow = w - torch.diag(torch.diag(w))
    torch.testing.assert_close(PLRNN().advance((a, w, h), z), a * z + hollow @ relu + h)
    centred = torch.relu(z - z.mean())
    torch.testing.assert_close(PLRNN(True).advance((a, w, h), z), a * z + hollow @ centred + h)
    a, w1, w2, h1, h2 = weights_of(ShallowPLRNN(7))
    plain = a * z + w1 @ torch.relu(w2 @ z + h2) + h1
    torch.testing.assert_close(ShallowPLRNN(7, clipped=False).advance((a, w1, w2, h1, h2), z), plain)
    clipped = plain - w1 @ torch.relu(w2 @ z)
    torch.testing.assert_close(ShallowPLRNN(7).advance((a, w1, w2, h1, h2), z), clipped)
    a, w, h, alpha, at = weights_of(DendriticPLRNN(3, clipped=True))
    total = sum(alpha[b] * (torch.relu(z - at[b]) - relu) for b in range(3))
    torch.testing.assert_close(DendriticPLRNN(3, True).advance((a, w, h, alpha, at), z), a * z + w @ total + h)


def test_a_clipped_model_is_bounded_and_an_unclipped_one_need_not_be() -> None:
    weights = [10 * weight for weight in weights_of(ShallowPLRNN(7))]
    weights[0] = torch.full((LATENT,), 0.9, dtype=torch.float64)
    orbits = {}
    for clipped in (True, False):
        state = torch.ones(LATENT, dtype=torch.float64)
        for _ in range(300):
            state = ShallowPLRNN(7, clipped=clipped).advance(tuple(weights), state)
        orbits[clipped] = float(state.abs().max())
    # |z| ≤ (‖h1‖ + ‖W1‖ ‖h2‖)/(1 − 0.9)
    bound = float((weights[3].norm() + torch.linalg.matrix_norm(weights[1], 2) * weights[4].norm()) / 0.1)
    assert orbits[True] <= bound
    assert not orbits[False] <= 10 * bound


def test_an_al_rnn_has_at_most_two_to_the_p_regions() -> None:
    cell = ALRNN(2)
    weights = weights_of(cell)
    regions = cell.regions(weights, torch.randn(500, LATENT, dtype=torch.float64))
    assert regions[:, :2].all()
    assert len(torch.unique(regions, dim=0)) == 4


def test_initial_values() -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = draw_diagonal(6, generator)
    assert ((diagonal > 0) & (diagonal < 1)).all()
    assert ALRNN((0, 4)).draw(LATENT, 0, generator)["slopes"].tolist() == [1, 1, 1, 1]
    assert ALRNN((0, 4)).draw(LATENT, 1, generator)["slopes"].tolist() == [0, 0, 0, 0]
    assert ShallowPLRNN(7, clipped=False).draw(LATENT, 0, generator)["hidden_bias"].abs().max() == 0
    with pytest.raises(ConfigurationError, match="none is given for run 2"):
        ALRNN((1, 2)).draw(LATENT, 2, generator)
    with pytest.raises(ConfigurationError, match="9 switching units among 4"):
        ALRNN(9).draw(LATENT, 0, generator)


def test_wrong_shapes_are_said() -> None:
    cell = PLRNN()
    with pytest.raises(ShapeError, match="4 wide"):
        recurrent_scan(cell, weights_of(cell), torch.randn(1, 3, 5, dtype=torch.float64))
    with pytest.raises(ShapeError, match="diagonal, matrix, bias"):
        cell.check(weights_of(cell)[:2], torch.randn(1, 4))
