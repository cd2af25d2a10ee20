"""Teacher forcing: the kinds, the gradients, the rules for α, the theorem, and training that resumes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, DataError, ShapeError
from ostinato.models.dynamics import (
    DynamicsModel,
    linearity_penalty,
    memory_penalty,
    readout_penalty,
    self_coupling_penalty,
)
from ostinato.ops.cells.piecewise_linear import ALRNN, PLRNN, DendriticPLRNN, PiecewiseLinear, ShallowPLRNN
from ostinato.training.dynamics import DynamicsTrainer, packed, unpacked
from ostinato.training.teacher_forcing import (
    TeacherForcing,
    chain_growth,
    estimate_alpha,
    forced_gradients,
    forced_loss,
    log_euclidean_mean,
    product_bound,
    spectral_norm,
)


def build(cell: PiecewiseLinear, latent: int, observation: str = "identity", external: int = 0) -> DynamicsModel:
    model = DynamicsModel(cell, latent, 3, seeds=(0, 1), observation=observation, external=external).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


MODELS = {
    "shallow": (ShallowPLRNN(6), 3, "identity", 0),
    "shallow, affine": (ShallowPLRNN(6, clipped=False), 4, "affine", 0),
    "al-rnn, free latents": (ALRNN((1, 2)), 5, "identity", 0),
    "al-rnn, learned slopes": (ALRNN(2, learned_slopes=True), 5, "identity", 0),
    "plrnn, external input": (PLRNN(), 5, "identity", 2),
    "dendritic, affine, external input": (DendriticPLRNN(2, clipped=True), 3, "affine", 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_gradient_is_that_of_the_definition(name: str) -> None:
    model = build(*MODELS[name])
    windows = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    signals = torch.randn(2, 8, 3, 2, dtype=torch.float64) if MODELS[name][3] else None
    strengths = TeacherForcing.join(TeacherForcing.generalized(0.3), TeacherForcing.sparse(3)).strengths(7)
    loss = forced_loss(model, windows, strengths, signals)
    wanted = torch.autograd.grad(loss.sum(), list(model.parameters()))
    torch.testing.assert_close(forced_gradients(model, windows, strengths, signals), loss.detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert max(float(gradient.abs().max()) for gradient in wanted) > 1e-3


def test_forcing_follows_its_formula() -> None:
    """z̃ = (1 − α) z + α ẑ, scored before the mixture: two steps by hand."""
    model = build(ShallowPLRNN(6), 3)
    x = torch.randn(2, 3, 1, 3, dtype=torch.float64)
    first = model.step(x[:, 0])
    second = model.step(0.7 * first + 0.3 * x[:, 1])
    by_hand = ((first - x[:, 1]).square().mean((1, 2)) + (second - x[:, 2]).square().mean((1, 2))) / 2
    torch.testing.assert_close(forced_loss(model, x, torch.full((2, 2), 0.3)), by_hand)


def test_only_what_data_decide_is_mixed() -> None:
    model = build(ALRNN(2), 5)
    x = torch.randn(2, 3, 1, 3, dtype=torch.float64)
    state = model.step(model.first(x[:, 0]))
    mixed = torch.cat([x[:, 1], state[..., 3:]], -1)
    error = (state[..., :3] - x[:, 1]).square().mean((1, 2)) + (model.step(mixed)[..., :3] - x[:, 2]).square().mean(
        (1, 2)
    )
    torch.testing.assert_close(forced_loss(model, x, torch.ones(2, 2)), error / 2)


def test_the_kinds() -> None:
    forcing = TeacherForcing.join(
        TeacherForcing.none(),
        TeacherForcing.full(),
        TeacherForcing.sparse(2),
        TeacherForcing.generalized(0.25),
        TeacherForcing.adaptive(every=7),
    )
    wanted = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0.25] * 4, [1] * 4]
    torch.testing.assert_close(forcing.strengths(4), torch.tensor(wanted, dtype=torch.float64))
    assert forcing.every == 7 and forcing.runs == 5


def test_under_full_forcing_the_last_errors_gradient_ignores_the_past() -> None:
    model = build(ShallowPLRNN(6), 3)
    with torch.no_grad():
        model.inner.mul_(4)
    series = torch.randn(2, 31, 1, 3, dtype=torch.float64)

    def of_last(time: int, alpha: float) -> float:
        window = series[:, -time - 1 :]
        loss = time * forced_loss(model, window, torch.full((2, time), alpha))
        if time > 1:
            loss = loss - (time - 1) * forced_loss(model, window[:, :-1], torch.full((2, time - 1), alpha))
        gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
        return float(sum(gradient.square().sum() for gradient in gradients)) ** 0.5

    assert of_last(30, 1.0) == pytest.approx(of_last(2, 1.0), rel=1e-9)
    assert of_last(30, 0.0) != pytest.approx(of_last(2, 0.0), rel=0.1)


def test_products_stay_below_one_at_alpha_star() -> None:
    jacobians = torch.randn(60, 3, 3, dtype=torch.float64)
    star = 1 - 1 / float(spectral_norm(jacobians).max())
    assert chain_growth(jacobians, star).max() <= 1e-12
    assert chain_growth(jacobians).max() > 5
    exact = torch.linalg.matrix_norm(torch.linalg.multi_dot(list(jacobians[:5].flip(0))), 2).log()
    torch.testing.assert_close(chain_growth(jacobians)[4], exact)


def test_rules_for_alpha() -> None:
    model = build(ShallowPLRNN(6), 3)
    with torch.no_grad():
        model.outer.mul_(4)
    data = torch.randn(2, 4, 9, 3, dtype=torch.float64)
    jacobians = model.jacobian(data.flatten(1, 2)).unflatten(1, (4, 9))
    norms = torch.linalg.matrix_norm(jacobians, 2)
    wanted = {
        "maximum": norms.flatten(1).amax(1),
        "product": norms.log().mean(2).exp().amax(1),
        "mean": torch.linalg.matrix_norm(jacobians.mean((1, 2)), 2),
        "bound": model.cell.norm_bound(model.weights()),
    }
    for rule, norm in wanted.items():
        torch.testing.assert_close(estimate_alpha(model, data, rule), (1 - 1 / norm).clamp_min(0).detach())
        assert estimate_alpha(model, data, rule, [1])[0] == estimate_alpha(model, data, rule)[1]
    assert (wanted["product"] <= wanted["maximum"]).all() and (wanted["maximum"] <= wanted["bound"]).all()
    # powers of one matrix have its logarithm's mean
    base = torch.tensor([[1.2, 0.3], [0.1, 0.7]], dtype=torch.float64)
    both = torch.stack([base, base @ base @ base]).view(1, 1, 2, 2, 2)
    expected = torch.linalg.matrix_norm(base @ base, 2)
    torch.testing.assert_close(log_euclidean_mean(both)[0], expected)
    torch.testing.assert_close(product_bound(both)[0], (spectral_norm(base) * spectral_norm(both[0, 0, 1])).sqrt())


def test_adaptive_alpha_sinks_slowly_and_jumps_up() -> None:
    model, data = build(ShallowPLRNN(6), 3), torch.randn(2, 4, 9, 3, dtype=torch.float64)
    forcing = TeacherForcing.adaptive("bound", 2, gamma=0.9, every=5)
    estimate = estimate_alpha(model, data, "bound")
    assert not forcing.update(model, data, 3)
    assert forcing.update(model, data, 5)
    torch.testing.assert_close(forcing.alpha, 0.9 + 0.1 * estimate)
    forcing.alpha = torch.zeros(2, dtype=torch.float64)
    forcing.update(model, data, 10)
    torch.testing.assert_close(forcing.alpha, estimate)


def train(model: DynamicsModel, series: Tensor, updates: int, **options: object) -> DynamicsTrainer:
    settings: dict = {"window": 5, "batch": 4, "updates": 40, "noise": 0.01} | options
    rule = "product" if model.infers_all else "bound"
    forcing = TeacherForcing.join(TeacherForcing.generalized(0.5), TeacherForcing.adaptive(rule))
    trainer = DynamicsTrainer(model, series, forcing, **settings)
    trainer.run(updates)
    return trainer


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_training_lowers_the_loss_and_resumes_to_the_same_numbers(optimizer: str) -> None:
    angle = torch.arange(300) * 0.3
    series = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin()], 1)
    options = {"optimizer": optimizer, "learning_rate": (2e-2, 2e-3)}
    fixed = torch.stack([series[at : at + 6] for at in range(0, 200, 10)], 1).expand(2, -1, -1, -1)
    model = DynamicsModel(ShallowPLRNN(8), 3, 3, seeds=(0, 1))
    before = forced_loss(model, fixed, torch.ones(2, 5)).detach()
    straight = train(model, series, 20, **options)
    straight.keep_best(torch.tensor([1.0, 2.0]))
    kept = json.loads(json.dumps(straight.snapshot()))
    straight.run(20)
    resumed = train(DynamicsModel(ShallowPLRNN(8), 3, 3, seeds=(0, 1)), series, 0, **options)
    resumed.restore(kept)
    resumed.run(100)
    assert resumed.step == 40 and (forced_loss(model, fixed, torch.ones(2, 5)) < before).all()
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    assert resumed.forcing.alpha.tolist() == straight.forcing.alpha.tolist()
    resumed.keep_best(torch.tensor([0.5, float("nan")]))
    now = resumed.model.state_dict()["outer"]
    torch.testing.assert_close(resumed.best["outer"][0], now[0])
    torch.testing.assert_close(resumed.best["outer"][1], unpacked(kept["weights"]["outer"])[1])


def test_a_run_does_not_see_the_others() -> None:
    series = torch.randn(100, 3)
    both = train(DynamicsModel(ShallowPLRNN(8), 3, 3, seeds=(3, 4)), series, 5, noise=0.0)
    swapped = DynamicsTrainer(
        DynamicsModel(ShallowPLRNN(8), 3, 3, seeds=(4,)),
        series,
        TeacherForcing.adaptive(),
        window=5,
        batch=4,
        updates=40,
    )
    swapped.run(5)
    torch.testing.assert_close(both.model.inner[1], swapped.model.inner[0])


def test_a_run_without_a_finite_gradient_waits() -> None:
    model = DynamicsModel(ShallowPLRNN(8), 3, 3, seeds=(0, 1))
    with torch.no_grad():
        model.outer[0] = 1e30
    held = model.outer.detach().clone()
    trainer = train(model, torch.randn(100, 3), 3)
    assert trainer.skipped.tolist() == [3, 0]
    torch.testing.assert_close(model.outer[0], held[0])
    assert not torch.equal(model.outer[1], held[1])


def test_penalties() -> None:
    model = build(ShallowPLRNN(6), 3)
    by_hand = sum(w.square().flatten(1).sum(1) for w in (1 - model.diagonal, *model.weights()[1:]))
    torch.testing.assert_close(memory_penalty(model), by_hand)
    affine = build(ShallowPLRNN(6), 3, "affine")
    condition = torch.linalg.cond(affine.readout)
    torch.testing.assert_close(readout_penalty(affine), (1 - condition).square(), rtol=1e-5, atol=1e-5)
    coupled = build(ALRNN(2, learned_slopes=True), 5)
    diagonal = coupled.diagonal[:, 0] + torch.stack([torch.diag(each) for each in coupled.matrix])
    torch.testing.assert_close(self_coupling_penalty(coupled), torch.relu(diagonal - 0.05).norm(dim=1))
    torch.testing.assert_close(linearity_penalty(coupled), (1 - coupled.slopes).abs().sum((1, 2)))


def test_a_penalty_reaches_the_weights() -> None:
    series = torch.zeros(100, 3)
    model = DynamicsModel(ALRNN(2, learned_slopes=True), 5, 3, seeds=(0, 1))
    train(model, series, 20, penalty=lambda each: 10 * linearity_penalty(each), noise=0.0)
    assert (model.slopes[..., 3:] > 0.02).all()


def test_tensors_as_json() -> None:
    tensor = torch.randn(2, 3)
    torch.testing.assert_close(unpacked(json.loads(json.dumps(packed(tensor)))), tensor, rtol=0, atol=0)


def test_refusals() -> None:
    model, data = build(ALRNN(2), 5), torch.randn(2, 4, 9, 3, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="2 of the 5 latents are free"):
        estimate_alpha(model, data, "product")
    with pytest.raises(ConfigurationError, match="no rule 'largest'"):
        estimate_alpha(model, data, "largest")
    with pytest.raises(ConfigurationError, match=r"in \[0, 1\]"):
        TeacherForcing.generalized(1.5)
    with pytest.raises(ConfigurationError, match="share gamma"):
        TeacherForcing.join(TeacherForcing.adaptive(every=2), TeacherForcing.adaptive(every=3))
    with pytest.raises(ShapeError, match="strengths"):
        forced_loss(model, data, torch.ones(2, 4))
    with pytest.raises(ShapeError, match="windows"):
        forced_gradients(model, data[..., :2], torch.ones(2, 3))
    with pytest.raises(DataError, match="too few"):
        train(model, torch.randn(4, 3), 0)
    with pytest.raises(ConfigurationError, match="external"):
        DynamicsModel(PLRNN(), 3, 3).driven(torch.zeros(1, 1, 1, 2))
    with pytest.raises(ConfigurationError, match="observation"):
        DynamicsModel(PLRNN(), 3, 3, observation="linear")
    with pytest.raises(ConfigurationError, match="latent ≥ observed"):
        DynamicsModel(PLRNN(), 2, 3)
