"""Analytic kernels against known numbers, quadrature and finite networks; the empirical kernel's three methods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ostinato.errors import ConfigurationError, DivergenceError, ShapeError
from ostinato.mixers.registry import mixer
from ostinato.theory.empirical_kernel import METHODS, empirical_ntk, linearized
from ostinato.theory.kernel_dynamics import decay_rates, kernel_dynamics, ntk_gp
from ostinato.theory.kernels import Dense, Erf, Gelu, Quadrature, Recurrent, Relu, Residual, Tanh, kernels, nngp, ntk
from ostinato.theory.wide_networks import WideNetwork, descend, draw_networks, run_networks


def perceptron(hidden: int, activation=None, bias: float = 0.1):
    activation = activation or Relu()
    return (*(layer for _ in range(hidden) for layer in (Dense(bias=bias), activation)), Dense(bias=bias))


ONE_RADIAN = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
RECURRENT = (Recurrent(Erf(), weight=1.2, inputs=0.8, bias=0.3), Dense(weight=1.1))


@pytest.mark.parametrize(("hidden", "cross", "diagonal"), [(2, 0.20322, 0.4025), (3, 0.14308, 0.2825)])
def test_values_worked_out_by_hand(hidden: int, cross: float, diagonal: float) -> None:
    theta = ntk(perceptron(hidden), ONE_RADIAN)
    assert theta[0, 1] == pytest.approx(cross, abs=5e-6)
    assert theta[0, 0] == pytest.approx(diagonal, abs=5e-7)
    assert torch.allclose(ntk(perceptron(hidden), ONE_RADIAN[:1], ONE_RADIAN[1:]), theta[:1, 1:])


class ErfByQuadrature(Quadrature):
    def __call__(self, x):
        return torch.erf(x)

    def slope(self, x):
        return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


def test_quadrature_and_closed_form_agree() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    assert torch.allclose(ntk(perceptron(2, ErfByQuadrature(60)), x), ntk(perceptron(2, Erf()), x), atol=1e-7)


def test_gelu_and_tanh_moments_against_a_fine_grid() -> None:
    points = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-points * points / 2) / math.sqrt(2 * math.pi) * (points[1] - points[0])
    one = torch.ones((), dtype=torch.float64)
    for activation in (Gelu(), Tanh()):
        points_ = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activation(points_).sum(), points_)
        covariance, slopes = activation.moments(one * 1, one, one)
        assert covariance == pytest.approx(float((activation(points) ** 2 * density).sum()), rel=1e-5)
        assert slopes == pytest.approx(float((slope**2 * density).sum()), rel=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        perceptron(2, Gelu()),
        perceptron(1, Erf(), bias=0.5),
        (Dense(bias=0.2), Residual((Relu(), Dense(weight=1.3, bias=0.1))), Residual((Tanh(), Dense())), Dense()),
        RECURRENT,
    ],
    ids=["gelu", "erf", "residual", "recurrent"],
)
def test_finite_networks_have_the_kernels(spec) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 6, 4) if isinstance(spec[0], Recurrent) else torch.randn(3, 4)
    network, draws = draw_networks(spec, 4, 400, 60, seed=2)
    found = torch.func.vmap(lambda p: empirical_ntk(network, x, parameters=p))(draws)[..., 0, 0].double()
    outputs = run_networks(network, draws, x)[..., 0].double()
    theta, error = ntk(spec, x), found.std(0) / 60**0.5
    assert ((found.mean(0) - theta).abs() < 4 * error + 0.01 * theta.abs()).all()
    sigma = nngp(spec, x)
    noise = (sigma.diag().outer(sigma.diag()) + sigma**2).sqrt() / 60**0.5
    assert ((outputs.mT @ outputs / 60 - sigma).abs() < 4 * noise).all()


def test_concentration() -> None:
    """Relative standard deviation 2.9/√n of the kernel one radian apart, two hidden layers."""
    x = ONE_RADIAN.float()
    network, draws = draw_networks(perceptron(2), 2, 400, 100, seed=0)
    found = torch.func.vmap(lambda p: empirical_ntk(network, x[:1], x[1:], parameters=p))(draws).flatten()
    assert found.mean() == pytest.approx(0.20322, rel=4 * 0.144 / 10)
    assert found.std() / found.mean() == pytest.approx(2.9 / 20, rel=0.3)


def test_one_step_of_the_recurrent_kernel_is_a_perceptron() -> None:
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    recurrent = (Recurrent(Relu(), weight=5.0, inputs=1.3, bias=0.2), Dense(weight=0.7))
    assert torch.allclose(ntk(recurrent, x), ntk((Dense(1.3, 0.2), Relu(), Dense(0.7)), x[:, 0]))


def test_positive_definite_on_the_sphere() -> None:
    x = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    assert torch.linalg.eigvalsh(ntk(perceptron(1), x))[0] > 1e-6


def test_bad_specs_and_shapes() -> None:
    with pytest.raises(ConfigurationError, match="end in Dense"):
        Residual((Dense(), Relu()))
    with pytest.raises(ConfigurationError, match="first layer"):
        ntk((Dense(), Recurrent(Erf())), ONE_RADIAN)
    with pytest.raises(ConfigurationError, match="made of"):
        ntk((Dense(), "relu"), ONE_RADIAN)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="time"):
        ntk(RECURRENT, ONE_RADIAN)
    with pytest.raises(ShapeError, match="x2"):
        ntk(perceptron(1), ONE_RADIAN, ONE_RADIAN[:, :1])
    with pytest.raises(ConfigurationError, match="readout"):
        WideNetwork((Dense(), Relu()), 2, 8)
    with pytest.raises(ConfigurationError, match="Residual of width"):
        WideNetwork((Residual((Dense(),)), Dense()), 2, 8)


def test_three_methods_agree() -> None:
    torch.manual_seed(0)
    x, x2 = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2, bias=False)).double()
    ours = WideNetwork(perceptron(2, Gelu()), 4, 6, outputs=3).double()
    steps = WideNetwork(RECURRENT, 4, 6, outputs=2).double()
    sequences, sequences2 = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    for module, one, two in ((plain, x, x2), (ours, x, x2), (steps, sequences, sequences2)):
        found = [empirical_ntk(module, one, two, method=method) for method in METHODS]
        assert found[0].shape[:2] == (3, 2) and found[0].shape[2] == found[0].shape[3]
        assert torch.allclose(found[0], found[1], rtol=1e-10) and torch.allclose(found[0], found[2], rtol=1e-10)
        whole = empirical_ntk(module, one)
        assert torch.allclose(whole, whole.permute(1, 0, 3, 2))


def test_the_kernel_of_a_mixer() -> None:
    torch.manual_seed(0)
    gru, x = mixer("gru", 4), torch.randn(2, 3, 4)
    one, other = (empirical_ntk(gru, x, method=method) for method in ("jacobian", "vjp_jvp"))
    assert one.shape == (2, 2, 12, 12) and torch.allclose(one, other, atol=1e-4)
    with pytest.raises(ConfigurationError, match="vjp_jvp"):
        empirical_ntk(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), x[:, 0], method="layers")
    with pytest.raises(ConfigurationError, match="method"):
        empirical_ntk(gru, x, method="guess")
    with pytest.raises(ConfigurationError, match="no parameters"):
        empirical_ntk(nn.Identity(), x)


def test_training_the_linearisation_is_kernel_regression() -> None:
    torch.manual_seed(0)
    module, x, y = (
        nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double(),
        torch.randn(5, 3).double(),
        torch.randn(5).double(),
    )
    other = torch.randn(2, 3).double()
    theta = empirical_ntk(module, torch.cat([x, other]))[..., 0, 0]
    line = linearized(module)
    f0, other0 = line(x)[:, 0].detach(), line(other)[:, 0].detach()
    assert torch.allclose(f0, module(x)[:, 0])
    rate, optimizer = 0.05, torch.optim.SGD(line.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * (line(x)[:, 0] - y).square().sum()).backward()
        optimizer.step()
    predicted = kernel_dynamics(theta[:5, :5], y, f0, rate, 30, discrete=True)
    assert torch.allclose(line(x)[:, 0], predicted, atol=1e-9)
    elsewhere = kernel_dynamics(theta[:5, :5], y, f0, rate, 30, discrete=True, cross=theta[5:, :5], cross_f0=other0)
    assert torch.allclose(line(other)[:, 0], elsewhere, atol=1e-6)


def test_dynamics_of_each_component() -> None:
    theta = ntk(perceptron(1), torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    y, f0 = torch.randn(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    rates, vectors = decay_rates(theta, 0.1)
    later = kernel_dynamics(theta, y, f0, 0.1, 7.0) - y
    assert torch.allclose(vectors.mT @ later, torch.exp(-7 * rates) * (vectors.mT @ -y))
    assert (rates[:-1] >= rates[1:]).all()
    assert torch.allclose(kernel_dynamics(theta, y, f0, 0.1, math.inf), y)
    exact, _ = decay_rates(theta, 0.1, discrete=True)
    assert torch.allclose(torch.exp(-exact), 1 - rates)
    with pytest.raises(ConfigurationError, match="diverges"):
        kernel_dynamics(theta, y, f0, 1000.0, 3, discrete=True)
    with pytest.raises(ShapeError, match="kernel must be"):
        kernel_dynamics(theta[:3], y, f0, 0.1, 1.0)
    with pytest.raises(ConfigurationError, match="belong together"):
        kernel_dynamics(theta, y, f0, 0.1, 1.0, cross=theta)


def test_the_trained_process_starts_at_the_nngp_and_ends_at_the_data() -> None:
    spec, generator = perceptron(2), torch.Generator().manual_seed(0)
    x, test, y = (torch.randn(4, 2, generator=generator) for _ in range(3))
    y = y[:, 0]
    start = ntk_gp(spec, x, y, test, t=0.0)
    assert torch.allclose(start.covariance, nngp(spec, test)) and start.mean.abs().max() == 0
    end = ntk_gp(spec, x, y, x)
    assert torch.allclose(end.mean, y.double(), atol=1e-5) and end.covariance.abs().max() < 1e-5
    between = ntk_gp(spec, x, y, test)
    assert torch.linalg.eigvalsh(between.covariance)[0] > -1e-9
    assert (between.covariance.diag() < kernels(spec, test).sigma.left).any()


def test_descent_follows_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    spec = perceptron(1)
    network, draws = draw_networks(spec, 3, 2000, 3, seed=1)
    seen: list[torch.Tensor] = []
    trained = descend(network, draws, x, y, rate=0.5, steps=40, watch=lambda step, outputs: seen.append(outputs))
    assert len(seen) == 41 and not torch.equal(trained["maps.0.weight"], draws["maps.0.weight"])
    for member in range(3):
        predicted = kernel_dynamics(ntk(spec, x), y.double(), seen[0][member].double(), 0.5 / 6, 40, discrete=True)
        assert (seen[-1][member] - predicted).abs().max() < 0.15
    with pytest.raises(DivergenceError, match="2/λ_max"):
        descend(network, draws, x, y, rate=1e4, steps=60)
