"""S4D, S4 and S5: against their formulas in plain loops, after training steps, at another rate, over long input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError, StateError
from ostinato.mixers.bidirectional_s4 import BidirectionalS4
from ostinato.mixers.registry import mixer
from ostinato.mixers.s4 import S4
from ostinato.mixers.s4d import S4D
from ostinato.mixers.s5 import S5
from ostinato.mixers.time_invariant import from_pairs
from ostinato.models.vector_classifier import VectorClassifier
from ostinato.ops.hippo import diagonal_plus_low_rank, discretize, hippo_matrix
from ostinato.tasks.delayed_cue import DelayedCue
from ostinato.training.parameters import parameter_groups


def s4d_kernel(layer: S4D, length: int) -> Tensor:
    """K_l = 2 Re Σ_n C_n B̄_n Ā_n^l, entry by entry, with Python's complex numbers."""
    inputs = from_pairs(layer.inputs).tolist()
    kernel = torch.zeros(length, layer.d_model, dtype=torch.float64)
    for d in range(layer.d_model):
        step = math.exp(layer.log_step[d].item())
        for n in range(layer.pairs):
            value = complex(-math.exp(layer.log_real[d, n].item()), layer.imaginary[d, n].item())
            c = complex(*layer.outputs[d, n].tolist())
            if layer.discretization == "zoh":
                a = torch.exp(torch.tensor(value * step, dtype=torch.complex128)).item()
                b = (a - 1) / value
            else:
                a, b = (1 + value * step / 2) / (1 - value * step / 2), step / (1 - value * step / 2)
            for t in range(length):
                kernel[t, d] += 2 * (c * inputs[n] * b * a**t).real
    return kernel


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialization", ["lin", "inv", "legs", "quad", "real"])
def test_s4d_is_its_kernel(initialization: str, discretization: str) -> None:
    layer = S4D(3, 8, initialization, discretization, output="none", block_length=16).double()
    x = torch.randn(2, 23, 3, dtype=torch.float64)
    y, _ = layer(x)
    kernel = s4d_kernel(layer, 23)
    wanted = torch.stack([(x[:, : t + 1].flip(1) * kernel[: t + 1]).sum(1) for t in range(23)], dim=1)
    torch.testing.assert_close(y, wanted + layer.skip * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_s4_is_the_hippo_recurrence(measure: str) -> None:
    """Against the dense real system with the HiPPO matrix itself, by the bilinear rule."""
    torch.set_default_dtype(torch.float64)
    try:
        layer = S4(2, 8, measure, output="none", block_length=16)
    finally:
        torch.set_default_dtype(torch.float32)
    if measure != "legs":
        # The parameter keeps Λ at −10⁻⁴ where the measure has 0: take that out of the comparison.
        layer.log_real.data.fill_(-80.0)
    form = diagonal_plus_low_rank(measure, 8)
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    y, _ = layer(x)
    for d in range(2):
        a, b = discretize(*hippo_matrix(measure, 8), math.exp(layer.log_step[d].item()))
        c = 2 * (from_pairs(layer.outputs)[d] @ form.basis.mH).real
        h = torch.zeros(8, dtype=torch.float64)
        for t in range(40):
            h = a @ h + b * x[0, t, d]
            torch.testing.assert_close(y[0, t, d], c @ h + layer.skip[d] * x[0, t, d], rtol=0, atol=1e-10)


def s4_by_dense_matrices(layer: S4, x: Tensor) -> Tensor:
    """The definition, from the stored parameters: A = Λ − P P* over all conjugate pairs, inverted, step by step."""
    both = [torch.cat([z, z.conj()], dim=-1) for z in map(from_pairs, (layer.low_rank, layer.inputs, layer.outputs))]
    low, inputs, outputs = both[0][0], both[1][0], both[2]
    half = torch.complex(-layer.log_real[0].exp(), layer.imaginary[0])
    matrix = torch.diag(torch.cat([half, half.conj()])) - low.mT @ low.conj()
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    features = []
    for d in range(layer.d_model):
        step = layer.log_step[d].exp()
        inverse = torch.linalg.inv(identity - step / 2 * matrix)
        a, b = inverse @ (identity + step / 2 * matrix), step * (inverse @ inputs)
        h, steps = torch.zeros(x.shape[0], len(matrix), dtype=matrix.dtype), []
        for t in range(x.shape[1]):
            h = h @ a.mT + b * x[:, t, d, None]
            steps.append((h @ outputs[d]).real + layer.skip[d] * x[:, t, d])
        features.append(torch.stack(steps, dim=1))
    return torch.stack(features, dim=-1)


@pytest.mark.parametrize("block_length", [8, 64])
@pytest.mark.parametrize("measure", ["legs", "legt", "fout", "random"])
def test_s4_and_all_its_gradients_are_those_of_the_definition(measure: str, block_length: int) -> None:
    layer = S4(3, 8, measure, output="none", block_length=block_length).double()
    x, weight = (torch.randn(2, 30, 3, dtype=torch.float64) for _ in range(2))
    found, wanted = layer(x)[0], s4_by_dense_matrices(layer, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert set(names) == {"log_real", "imaginary", "low_rank", "inputs", "outputs", "skip", "log_step"}
    gradients = [torch.autograd.grad((y * weight).sum(), parameters) for y in (found, wanted)]
    for name, mine, its in zip(names, *gradients, strict=True):
        assert its.abs().max() > 0, name
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-9 * float(its.abs().max()))


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_steps_and_convolution_agree_after_training(name: str) -> None:
    layer = mixer(name, 4, d_state=16, block_length=32).double()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    before = {key: value.clone() for key, value in layer.named_parameters()}
    for _ in range(3):
        x = torch.randn(2, 40, 4, dtype=torch.float64)
        loss = (layer(x)[0] - x.roll(3, 1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all((before[key] - value).abs().max() > 1e-4 for key, value in layer.named_parameters())
    x, state = torch.randn(2, 40, 4, dtype=torch.float64), layer.initial_state(2)
    whole, last = layer(x)
    for t in range(40):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=0, atol=1e-11)
    torch.testing.assert_close(state.coordinates, last.coordinates, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_float32_agrees_with_float64(name: str) -> None:
    layer = mixer(name, 4, output="none")
    x = torch.randn(1, 300, 4)
    single, _ = layer(x)
    double, _ = layer.double()(x.double())
    assert (single.double() - double).abs().max() < 1e-4 * double.abs().max()


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_the_block_length_does_not_matter(name: str) -> None:
    layer = mixer(name, 4, d_state=8, output="none").double()
    x, reset = torch.randn(2, 50, 4, dtype=torch.float64), torch.rand(2, 50) < 0.1
    for marks in (None, reset):
        results = []
        for length in (1, 7, 25, 50, 256):
            layer.block_length = length
            results.append(layer(x, reset=marks)[0])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_a_long_sequence_in_two_halves(name: str) -> None:
    layer = mixer(name, 2, d_state=8).double()
    x = torch.randn(1, 100_003, 2, dtype=torch.float64)
    with torch.no_grad():
        whole, end = layer(x)
        first, middle = layer(x[:, :50_001])
        second, last = layer(x[:, 50_001:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(last.coordinates, end.coordinates, rtol=0, atol=1e-9)


def test_rate_stretches_time() -> None:
    """Every other sample of a smooth signal with twice the step gives about every other output."""
    time = torch.linspace(0, 6 * math.pi, 400, dtype=torch.float64)
    x = torch.sin(time).view(1, -1, 1)
    layer = mixer("s4", 1, d_state=16, output="none", step_min=0.01, step_max=0.01).double()
    fine, _ = layer(x)
    plain, _ = layer(x[:, 1::2])
    layer.rate = 2.0
    coarse, _ = layer(x[:, 1::2])
    error, without = ((z - fine[:, 1::2]).square().mean().sqrt() for z in (coarse, plain))
    assert error < 0.05 * fine.std() and error < 0.1 * without


def s5_by_loop(layer: S5, x: Tensor) -> Tensor:
    values = torch.complex(layer.real, layer.imaginary)
    step = torch.exp(layer.log_step)
    transition = torch.exp(values * step)
    driven = ((transition - 1) / values).unsqueeze(-1) * torch.view_as_complex(layer.inputs)
    outputs = torch.view_as_complex(layer.outputs)
    h = torch.zeros(x.shape[0], layer.pairs, dtype=torch.complex128)
    out = []
    for t in range(x.shape[1]):
        h = transition * h + x[:, t].to(h.dtype) @ driven.T
        out.append(2 * (h @ outputs.T).real + layer.skip * x[:, t])
    return torch.stack(out, dim=1)


def test_s5_is_its_loop() -> None:
    layer = S5(6, 16, blocks=2, gated=False).double()
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], s5_by_loop(layer, x), rtol=0, atol=1e-12)
    gated = S5(6, 16, blocks=2).double()
    y = torch.nn.functional.gelu(s5_by_loop(gated, x))
    assert gated.to_gate is not None
    torch.testing.assert_close(gated(x)[0], y * torch.sigmoid(gated.to_gate(y)), rtol=0, atol=1e-12)


def test_s5_starts_as_blocks_of_hippo() -> None:
    layer = S5(4, 32, blocks=4)
    block = diagonal_plus_low_rank("legs", 8).eigenvalues
    found = torch.complex(layer.real, layer.imaginary).detach().view(4, 4)
    torch.testing.assert_close(found.to(torch.complex128), block.expand(4, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_the_optimiser_rule_names_parameters(name: str) -> None:
    layer = mixer(name, 16)
    own = {key for key, _ in layer.named_parameters(recurse=False)}
    assert layer.no_weight_decay <= own and set(layer.learning_rate_cap) == layer.no_weight_decay
    assert set(layer.learning_rate_cap.values()) == {1e-3}
    assert not {"outputs", "skip"} & layer.no_weight_decay


@pytest.mark.parametrize("name", ["s4", "s4d", "s5", "lru", "mamba", "rg_lru", "min_lstm"])
def test_many_seeds_train_as_one_batch(name: str) -> None:
    layers = [mixer(name, 8).double() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x, reset = torch.randn(1, 12, 8, dtype=torch.float64), torch.rand(1, 12) < 0.2

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,), {"reset": reset})[0].square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for index, layer in enumerate(layers):
        layer(x, reset=reset)[0].square().sum().backward()
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[key][index], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["s4", "s4d", "s5", "lru", "mamba"])
def test_autocast_leaves_the_system_in_float32(name: str) -> None:
    layer = mixer(name, 8)
    x = torch.randn(1, 200, 8)
    with torch.no_grad():
        wanted, exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer(x)
    assert state[0].dtype == torch.float32
    # Mamba's projections are rounded, the others' systems see x itself.
    tolerance = 0.1 if name == "mamba" else 1e-6
    torch.testing.assert_close(state[0], exact[0], rtol=0, atol=tolerance * exact[0].abs().max().item())
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=0.1 * wanted.abs().max().item())


def test_shared_systems() -> None:
    layer = S4(6, 8, "random", copies=2, output="none").double()
    system = layer.system()
    assert layer.low_rank.shape == (2, 1, 4, 2)
    torch.testing.assert_close(system.eigenvalues[0], system.eigenvalues[2])
    assert not torch.equal(system.eigenvalues[0], system.eigenvalues[1])


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigurationError, match="measure must be one of"):
        S4(4, measure="lagt")
    with pytest.raises(ConfigurationError, match="copies=3 does not divide"):
        S4(4, copies=3)
    with pytest.raises(ConfigurationError, match="d_state must be even"):
        S4D(4, d_state=5)
    with pytest.raises(ConfigurationError, match="'zoh' or 'bilinear'"):
        S4D(4, discretization="euler")
    with pytest.raises(ConfigurationError, match="output must be one of"):
        S4D(4, output="linear")
    with pytest.raises(ConfigurationError, match="must be even, got 12/4"):
        S5(4, d_state=12, blocks=4)


def test_both_directions_are_two_kernels() -> None:
    """Against sums over past and future with taps from the impulse responses of the two systems."""
    layer = BidirectionalS4(3, d_state=8, block_length=4).double()
    x, impulse = torch.randn(2, 11, 3, dtype=torch.float64), torch.zeros(1, 11, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    past, future = (system(impulse)[0][0] - system.skip * impulse[0] for system in (layer.past, layer.future))
    y = layer.past.skip * x
    for t in range(11):
        for s in range(11):
            y[:, t] += (past[t - s] if s <= t else future[s - t - 1]) * x[:, s]
    wanted = torch.nn.functional.glu(layer.to_output(torch.nn.functional.gelu(y)), dim=-1)
    torch.testing.assert_close(layer(x)[0], wanted, rtol=0, atol=1e-12)
    with pytest.raises(StateError, match="whole sequences"):
        layer(x, reset=torch.zeros(2, 11, dtype=torch.bool))


def test_s4_learns_a_delayed_cue() -> None:
    """An impulse in noise, asked for 44 to 48 steps later: with norms that leave its amplitude, in 100 steps."""
    task = DelayedCue(classes=4, length=48, window=4, test_size=128)
    model = VectorClassifier(4, 4, 16, "s4(d_state=16, step_min=0.01)", 2, norm="batch", norm_place="pre")
    optimiser = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.01))
    for step in range(100):
        batch = task.train_batch(step, 32, seed=0)
        optimiser.zero_grad()
        task.loss(model(batch.inputs)[0], batch).backward()
        optimiser.step()
    model.eval()
    tests = list(task.test_batches())
    right = sum(int((model(test.inputs)[0][:, -1].argmax(-1) == test.targets[:, -1]).sum()) for test in tests)
    assert right / 128 > 0.95
