"""The mixers with a matrix memory: what one is of another, their eigenvalues, shapes, initial values and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.mixers.registry import mixer_class

D_MODEL, HEADS, BATCH, TIME = 16, 4, 2, 11
NAMES = [
    "linear_attention", "retnet", "gla", "hgrn2", "mamba2", "mlstm", "delta_net", "gated_delta_net",
    "delta_product", "gated_delta_product", "kimi_delta_attention", "rwkv7",
]  # fmt: skip
DELTA = ["delta_net", "gated_delta_net", "delta_product", "gated_delta_product", "kimi_delta_attention"]


def built(name: str, *, shake: float = 0.3, **options: Any) -> Any:
    """A mixer in float64 whose parameters are moved at random, so that no initial zero or one hides a mistake."""
    torch.manual_seed(0)
    mixer = ostinato.mixer(name, D_MODEL, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return mixer


def sequence(time: int = TIME) -> Tensor:
    return torch.randn(BATCH, time, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_exact(found: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------------------
# What one is of another, and eigenvalues.


def take_over(target: Any, source: Any) -> None:
    """Copy all parameters; both mixers must have the same ones."""
    target.load_state_dict(source.state_dict(), strict=True)


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("one", "many", "options"),
    [
        ("delta_net", "delta_product", {}),
        ("delta_net", "delta_product", {"conv": None, "output_gate": True}),
        ("gated_delta_net", "gated_delta_product", {}),
    ],
)
def test_one_householder_is_the_delta_rule(one: str, many: str, options: dict[str, Any], negative: bool) -> None:
    single = built(one, negative_eigenvalues=negative, **options)
    product = built(many, householders=1, negative_eigenvalues=negative, **options)
    take_over(product, single)
    x = sequence()
    (y, state), (z, other) = single(x), product(x)
    assert_exact(z, y)
    torch.testing.assert_close(other.memory, state.memory)


@torch.no_grad()
def test_equal_decays_in_all_channels_make_kimi_delta_attention_the_gated_delta_net() -> None:
    kimi = built("kimi_delta_attention")
    gated = built("gated_delta_net", expand_k=1.0, expand_v=1.0)
    shared = {k: v for k, v in kimi.state_dict().items() if not k.startswith(("to_gate", "to_steps", "step_bias"))}
    gated.load_state_dict(shared, strict=False)
    kimi.step_bias.copy_(gated.step_bias.repeat_interleave(4))
    kimi.to_steps[1].weight.copy_(gated.to_steps.weight[:, :4].repeat_interleave(4, dim=0))
    kimi.to_steps[0].weight.copy_(torch.eye(4, D_MODEL))
    gated.to_steps.weight[:, 4:] = 0
    x = sequence()
    torch.testing.assert_close(kimi(x)[1].memory, gated(x)[1].memory)
    assert gated(x)[1].memory.abs().max() > 1e-3


@torch.no_grad()
def transitions(mixer: Any, x: Tensor) -> Tensor:
    """A_t of every step, (batch, time, heads, key_dim, key_dim): the memory after a step without a write."""
    found = []
    mixer.project.to_values.weight.zero_()
    _, carried = mixer(x[:, :1])
    for t in range(x.shape[1]):
        columns = torch.eye(mixer.key_dim, mixer.key_dim, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)
        probe = carried._replace(memory=columns)
        _, after = mixer(x[:, t : t + 1], probe)
        found.append(after.memory)
        carried = after
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", DELTA)
def test_transitions_never_grow_and_reach_below_zero_only_when_asked(name: str, negative: bool) -> None:
    square = {"expand_k": 1.0, "expand_v": 1.0, "negative_eigenvalues": negative}
    mixer = built(name, shake=2.0, **square)
    matrices = transitions(mixer, 3 * sequence())
    assert torch.linalg.matrix_norm(matrices, ord=2).max() <= 1 + 1e-9
    assert mixer.beta(sequence()).max() <= (2 if negative else 1)
    if name in ("delta_net", "gated_delta_net"):
        lowest = torch.linalg.eigvalsh(matrices).min()
        assert (lowest < -0.5) if negative else (lowest >= -1e-9)


def set_delta(mixer: Any, keys: list[list[float]], beta: float) -> Tensor:
    """One head of width 2 whose keys are those given, and an input of one step for it."""
    with torch.no_grad():
        mixer.project.to_keys.weight.zero_()
        mixer.to_beta.weight.zero_()
        flat = torch.tensor(keys, dtype=torch.float64).flatten()
        mixer.project.to_keys.weight[:, 0] = flat * 1e6  # silu is the identity there, and the norm makes them unit
        mixer.to_beta.weight[:, 0] = beta
    return torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)


@torch.no_grad()
def test_two_reflections_are_a_rotation_by_twice_their_angle() -> None:
    mixer = ostinato.mixer("delta_product", 2, heads=1, householders=2, conv=None, negative_eigenvalues=True).double()
    angle = math.pi / 5
    x = set_delta(mixer, [[1.0, 1e-9], [math.cos(angle), math.sin(angle)]], beta=40.0)
    mixer.project.to_values.weight.zero_()
    state = mixer.initial_state(1)._replace(memory=torch.eye(2, dtype=torch.float64)[None, None])
    start = state
    _, state = mixer(x, state)
    c, s = math.cos(2 * angle), math.sin(2 * angle)
    torch.testing.assert_close(state.memory[0, 0], torch.tensor([[c, -s], [s, c]]).double(), rtol=0, atol=1e-6)
    for _ in range(4):
        _, state = mixer(x, state)
    torch.testing.assert_close(state.memory, start.memory, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_constant_input_oscillates_only_with_negative_eigenvalues() -> None:
    for negative in (False, True):
        mixer = ostinato.mixer("delta_net", 2, heads=1, conv=None, negative_eigenvalues=negative).double()
        x = set_delta(mixer, [[1.0, 1e-9]], beta=40.0)
        mixer.project.to_values.weight.zero_()
        state = mixer.initial_state(1)._replace(memory=torch.ones(1, 1, 2, 2, dtype=torch.float64))
        signs = []
        for _ in range(6):
            _, state = mixer(x, state)
            signs.append(round(state.memory[0, 0, 0, 0].item(), 6))
        assert signs == ([-1, 1, -1, 1, -1, 1] if negative else [0] * 6)


# --------------------------------------------------------------------------------------------------
# Shapes, initial values, what is declared, errors.


@pytest.mark.parametrize(
    ("name", "d_model", "key_dim", "value_dim"),
    [
        ("linear_attention", 64, 16, 16),
        ("retnet", 64, 16, 32),
        ("gla", 64, 8, 16),
        ("hgrn2", 64, 16, 16),
        ("mamba2", 64, 64, 32),
        ("mlstm", 64, 8, 16),
        ("delta_net", 64, 16, 16),
        ("gated_delta_net", 64, 12, 24),
        ("gated_delta_net", 20, 3, 7),
        ("delta_product", 64, 16, 16),
        ("gated_delta_product", 64, 12, 24),
        ("kimi_delta_attention", 64, 16, 16),
        ("rwkv7", 64, 16, 16),
    ],
)
def test_state_shapes(name: str, d_model: int, key_dim: int, value_dim: int) -> None:
    mixer = ostinato.mixer(name, d_model)
    assert mixer.initial_state(3).memory.shape == (3, 4, key_dim, value_dim)
    y, state = mixer(torch.randn(3, 2, d_model))
    assert y.shape == (3, 2, d_model)
    assert state.memory.shape == (3, 4, key_dim, value_dim)


def test_parameter_counts_are_those_of_the_papers() -> None:
    d = 64
    counts = {name: sum(p.numel() for p in ostinato.mixer(name, d).parameters()) for name in NAMES}
    assert counts["linear_attention"] == 4 * d * d + 16
    assert counts["retnet"] == 8 * d * d + 32
    assert counts["gla"] == 4 * d * d + 16 * d + 16 * d // 2 + d // 2 + 16
    assert counts["hgrn2"] == 4 * d * d + d
    inner, mixed = 2 * d, 2 * d + 2 * 64
    assert counts["mamba2"] == d * (inner + mixed + 4) + 5 * mixed + 3 * 4 + inner + inner * d
    assert counts["mlstm"] == 4 * d * d + 2 * (4 * d + 4) + d
    assert counts["delta_net"] == 4 * d * d + 4 * d + 4 * 3 * d + 16
    assert counts["gated_delta_net"] == 6 * d * d + 2 * 4 * d + 2 * 4 + 4 * 3 * d + 24
    assert counts["delta_product"] == 6 * d * d + 2 * 4 * d + 4 * 5 * d + 16
    assert counts["kimi_delta_attention"] == 4 * d * d + 4 * (16 * d) + d + 4 * d + 4 + d + 4 * 3 * d + 16


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("mamba2", 1, 16),
        ("gated_delta_net", 1e-3, 16),
        ("gated_delta_product", 1e-3, 16),
        ("kimi_delta_attention", 1, 16),
    ],
)
def test_decays_start_in_their_range_and_are_not_decayed_by_the_optimiser(name: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    mixer = ostinato.mixer(name, 512, heads=64)
    rates, steps = mixer.log_rate.exp(), F.softplus(mixer.step_bias)
    assert low * 0.999 <= rates.min() < 2 and 12 < rates.max() <= high * 1.001
    assert 1e-3 * 0.999 <= steps.min() < 4e-3 and 0.05 < steps.max() <= 0.1001
    assert {"log_rate", "step_bias"} <= mixer.no_weight_decay


def test_undecayed_parameters_exist() -> None:
    for name in NAMES:
        mixer = ostinato.mixer(name, D_MODEL)
        assert mixer.no_weight_decay <= dict(mixer.named_parameters()).keys(), name


def test_mlstm_starts_with_closed_input_gates() -> None:
    torch.manual_seed(0)
    mixer = ostinato.mixer("mlstm", 128, layers=4)
    assert mixer.to_input.weight.abs().max() == 0 and mixer.to_forget.weight.abs().max() == 0
    assert mixer.to_input.bias.tolist() == [-10.0] * 4
    assert mixer.to_forget.bias.tolist() == [3, 4, 5, 6]
    assert mixer.project.to_keys.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.05)
    assert mixer.to_output.weight.std().item() == pytest.approx(2 / (4 * math.sqrt(128)), rel=0.05)


def test_delta_product_starts_small() -> None:
    mixer = ostinato.mixer("delta_product", 128, householders=3)
    for linear in (mixer.project.to_keys, mixer.to_beta, mixer.to_output):
        bound = 2**-2.5 * math.sqrt(6 / sum(linear.weight.shape))
        assert bound * 0.95 < linear.weight.abs().max() <= bound


def test_rwkv7_starts_silent_and_as_its_authors_have_it() -> None:
    mixer = ostinato.mixer("rwkv7", 64)
    assert mixer(torch.randn(1, 5, 64))[0].abs().max() == 0
    assert mixer.to_decay.down.weight.abs().max() == 0
    up = mixer.to_rate.up.weight
    torch.testing.assert_close(up.T @ up, 0.01 * torch.eye(32))
    assert mixer.key_mix.tolist() == pytest.approx([1.02] * 64)
    assert mixer.bonus.flatten().tolist() == pytest.approx([-0.04] * 64)
    assert mixer.to_decay.up.bias[0].item() == pytest.approx(-6 + 0.5 - 2.5)
    assert mixer.to_decay.up.bias[-1].item() == pytest.approx(0.5 + 2.5)
    assert mixer.shift_mix[0, 32].item() == pytest.approx(1 - 0.5**0.2)
    last = ostinato.mixer("rwkv7", 64, layer=3, layers=4)
    assert last.shift_mix[0, 32].item() == pytest.approx(1 - 0.5**0.05)
    assert mixer.norm.eps == pytest.approx(16e-5)
    assert ostinato.mixer("rwkv7", 64, layer=0, layers=4).norm.weight[0].item() == pytest.approx(0.25**0.7)


@pytest.mark.parametrize("name", NAMES)
def test_traits_are_filled_in(name: str) -> None:
    traits = mixer_class(name).traits
    assert traits.engine in ("linear_attention", "exponential_attention", "delta_rule")
    assert traits.transition and traits.state and "arXiv" in traits.paper and traits.linear
    assert traits.channel_mixing == (traits.engine == "delta_rule")


def test_traits_follow_the_options() -> None:
    assert ostinato.mixer("mlstm", 16).traits.engine == "exponential_attention"
    sigmoid = ostinato.mixer("mlstm", 16, input_gate="sigmoid").traits
    assert (sigmoid.engine, sigmoid.input_gate) == ("linear_attention", "sigmoid")


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"divisible by heads=5; heads may be one of 1, 2, 4"):
        ostinato.mixer(name, 16, heads=5)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("linear_attention", {"feature_map": "cosine"}, "feature_map must be one of"),
        ("linear_attention", {"feature_map": "identity", "normalize": True}, "any sign"),
        ("retnet", {"heads": 16}, "even"),
        ("gla", {"expand_k": 0.1}, "width 0"),
        ("hgrn2", {"lower_bound": 1.0}, "below 1"),
        ("mamba2", {"groups": 3}, "groups=3"),
        ("mlstm", {"input_gate": "open"}, "input_gate"),
        ("mlstm", {"normalize": True}, "always normalises"),
        ("delta_net", {"qk_norm": "l3"}, "qk_norm must be one of"),
        ("delta_net", {"qk_activation": "tanh"}, "qk_activation must be one of"),
        ("delta_product", {"householders": 0}, "at least one"),
        ("kimi_delta_attention", {"gate_floor": 1.0}, "below 0"),
        ("rwkv7", {"layer": 2, "layers": 2}, "below layers"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        ostinato.mixer(name, 16, **options)
