"""The mixers with a matrix memory: their formulas as loops in float64, and the law with their options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.mixers.hgrn2 import lower_bounds
from ostinato.testing import check_mixer

D_MODEL, HEADS, BATCH, TIME = 16, 4, 2, 11
NAMES = [
    "linear_attention", "retnet", "gla", "hgrn2", "mamba2", "mlstm", "delta_net", "gated_delta_net",
    "delta_product", "gated_delta_product", "kimi_delta_attention", "rwkv7",
]  # fmt: skip


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


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def convolved(layer: Any, x: Tensor) -> Tensor:
    """y_t = Σ_i w_i x_{t−i} + b, zero before the start."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for lag in range(min(t + 1, layer.width)):
            y[:, t] += layer.weight[lag] * x[:, t - lag]
    return y if layer.bias is None else y + layer.bias


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def loop(step: Callable[[int, Tensor], tuple[Tensor, Tensor]], state: Tensor, time: int = TIME) -> Tensor:
    """o_t for every t, where (o_t, S_t) = step(t, S_{t−1})."""
    outputs = []
    for t in range(time):
        output, state = step(t, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1)


def outer(key: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhk,bhv->bhkv", key, value)


def read(query: Tensor, memory: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", query, memory)


def additive(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S_t = Λ_t S_{t−1} + k vᵀ, o = Sᵀ q; decay (batch, time, heads, key_dim or 1)."""

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = decay[:, t].unsqueeze(-1) * memory + outer(k[:, t], v[:, t])
        return read(q[:, t], memory), memory

    return loop(step, torch.zeros(BATCH, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64))


def assert_exact(found: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------------------
# The formulas.


@torch.no_grad()
@pytest.mark.parametrize("conv", [None, 3])
@pytest.mark.parametrize("features", ["elu", "relu", "identity", "silu"])
def test_linear_attention(features: str, conv: int | None) -> None:
    mixer, x = built("linear_attention", feature_map=features, conv=conv, expand_v=2.0), sequence()
    maps = {"elu": lambda u: F.elu(u) + 1, "relu": torch.relu, "identity": lambda u: u, "silu": F.silu}
    joined = torch.cat([mixer.project.to_queries(x), mixer.project.to_keys(x), mixer.project.to_values(x)], dim=-1)
    if conv:
        joined = F.silu(convolved(mixer.project.convolution, joined))
    q, k, v = (split(part) for part in joined.split([16, 16, 32], dim=-1))
    q, k = maps[features](q) / math.sqrt(4), maps[features](k)
    outputs = additive(q, k, v, torch.ones(BATCH, TIME, HEADS, 1, dtype=torch.float64))
    assert_exact(mixer(x)[0], mixer.to_output(rms(outputs, mixer.norm.norm.weight).flatten(-2)))


@torch.no_grad()
def test_linear_attention_normalised_is_a_weighted_mean_of_values() -> None:
    mixer, x = built("linear_attention", normalize=True, output_norm=False, eps=0.0), sequence()
    nn.init.eye_(mixer.to_output.weight)
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    scores = torch.einsum("bihk,bjhk->bhij", F.elu(q) + 1, F.elu(k) + 1).tril()
    wanted = torch.einsum("bhij,bjhv->bihv", scores / scores.sum(-1, keepdim=True), v)
    assert_exact(mixer(x)[0], wanted.flatten(-2))


@torch.no_grad()
def test_retnet() -> None:
    mixer, x = built("retnet"), sequence()
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    angle = torch.arange(TIME).double()[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64)

    def turned(u: Tensor) -> Tensor:
        pair = torch.complex(u[..., :2], u[..., 2:]) * torch.exp(1j * angle)[:, None]
        return torch.cat([pair.real, pair.imag], dim=-1)

    decay = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HEADS)]).double().expand(BATCH, TIME, HEADS)
    outputs = additive(turned(q) / math.sqrt(4), turned(k), v, decay.unsqueeze(-1))
    normed = rms(outputs, mixer.norm.norm.weight) * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(normed.flatten(-2)))


@torch.no_grad()
def test_retnet_counts_from_every_reset_and_sees_only_differences_of_positions() -> None:
    mixer, x = built("retnet"), sequence()
    reset = torch.zeros(BATCH, TIME, dtype=torch.bool)
    reset[0, 4] = True
    _, state = mixer(x, reset=reset)
    assert state.position.tolist() == [TIME - 4, TIME]
    assert state.position.dtype == torch.int64
    start = mixer.initial_state(BATCH)
    far = start._replace(position=start.position + 10_000_000)
    assert_exact(mixer(x, far)[0], mixer(x)[0])


@torch.no_grad()
def test_retnet_decays_are_not_parameters() -> None:
    mixer = ostinato.mixer("retnet", 32, heads=8).bfloat16()
    wanted = [math.log(1 - 2.0 ** (-5 - h)) for h in range(8)]
    assert mixer.log_decay().tolist() == pytest.approx(wanted, rel=1e-6)
    assert not any("decay" in name for name, _ in mixer.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("floor", [None, -0.05])
def test_gla(floor: float | None) -> None:
    mixer, x = built("gla", gate_floor=floor, gate_rank=3), sequence()
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    gate = mixer.to_decay[1].weight @ mixer.to_decay[0].weight
    decay = torch.sigmoid(x @ gate.T + mixer.to_decay[1].bias) ** (1 / 16)
    if floor is not None:
        assert (decay < math.exp(floor)).any(), "the floor should be felt"
        decay = decay.clamp(min=math.exp(floor))
    outputs = additive(q / math.sqrt(2), k, v, split(decay))
    normed = rms(outputs, mixer.norm.norm.weight) * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(normed.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "fixed", "off"])
def test_gla_with_one_decay_for_all_channels(kind: str) -> None:
    mixer, x = built("gla", decay=kind), sequence()
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    if kind == "head":
        decay = torch.sigmoid(mixer.to_decay(x)) ** (1 / 16)
    else:
        value = [1 - 2.0 ** (-5 - head) if kind == "fixed" else 1.0 for head in range(HEADS)]
        decay = torch.tensor(value, dtype=x.dtype).expand(BATCH, TIME, HEADS)
    assert decay.shape == (BATCH, TIME, HEADS)
    outputs = additive(q / math.sqrt(2), k, v, decay.unsqueeze(-1).expand(k.shape))
    normed = rms(outputs, mixer.norm.norm.weight) * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(normed.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["channel", "head", "fixed", "off"])
def test_gla_with_gates_on_values_too(kind: str) -> None:
    mixer, x = built("gla", decay=kind, gate_values=True, gate_floor=-0.05, gate_rank=3), sequence()
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    alpha = mixer.log_decay(x).exp()
    alpha = (alpha if kind == "channel" else alpha.unsqueeze(-1)).expand(k.shape)
    beta = split((torch.sigmoid(mixer.to_value_decay(x)) ** (1 / 16)).clamp(min=math.exp(-0.05)))
    assert beta.shape == v.shape and beta.min() < 0.96

    def step(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = outer(alpha[:, t], beta[:, t]) * state + outer(k[:, t], v[:, t])
        return read(q[:, t] / math.sqrt(2), state), state

    outputs = loop(step, torch.zeros(BATCH, HEADS, 2, 4, dtype=x.dtype))
    normed = rms(outputs, mixer.norm.norm.weight) * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(normed.flatten(-2)))


def test_gla_refuses_a_decay_it_does_not_know() -> None:
    with pytest.raises(ConfigurationError, match="decay must be one of channel, head, fixed, off"):
        ostinato.mixer("gla", D_MODEL, decay="sometimes")


@torch.no_grad()
@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_hgrn2(bound: float) -> None:
    mixer, x = built("hgrn2", lower_bound=bound), sequence()
    decay = bound + (1 - bound) * torch.sigmoid(mixer.to_forget(x))
    q = split(F.silu(mixer.to_queries(x))) / math.sqrt(4)
    outputs = additive(q, split(1 - decay), split(mixer.to_values(x)), split(decay))
    assert_exact(mixer(x)[0], mixer.to_output(rms(outputs.flatten(-2), mixer.norm.weight)))


def test_hgrn2_gates_stay_finite_when_they_saturate() -> None:
    mixer = ostinato.mixer("hgrn2", D_MODEL)
    with torch.no_grad():
        mixer.to_forget.weight.mul_(1000)
    x = sequence().float().requires_grad_()
    y, _ = mixer(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()  # type: ignore[arg-type]


def test_hgrn2_takes_lower_bounds_learned_across_layers() -> None:
    mixer, x = built("hgrn2"), sequence()
    logits = torch.randn(3, D_MODEL, dtype=torch.float64, requires_grad=True)
    bounds = lower_bounds(logits)
    assert bounds[0].abs().max() == 0
    assert (bounds[1:] > bounds[:-1]).all() and (bounds < 1).all()
    wanted = (logits.softmax(0).cumsum(0) - logits.softmax(0)[0])[2]
    torch.testing.assert_close(bounds[2], wanted)
    start = mixer.initial_state(BATCH)
    y, _ = mixer.mix_above(x, start, None, bounds[2])
    y.sum().backward()
    assert logits.grad is not None and logits.grad.abs().min() > 0
    assert_exact(mixer.mix_above(x, start, None, bounds[0])[0], mixer(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups: int) -> None:
    mixer, x = built("mamba2", state_dim=3, groups=groups), sequence()
    gate, mixed, raw = mixer.to_input(x).split([32, 32 + 6 * groups, HEADS], dim=-1)
    v, b, c = F.silu(convolved(mixer.convolution, mixed)).split([32, 3 * groups, 3 * groups], dim=-1)
    v, step = split(v), F.softplus(raw + mixer.step_bias)
    b, c = (split(part, groups).repeat_interleave(HEADS // groups, dim=2) for part in (b, c))
    decay = torch.exp(-mixer.log_rate.exp() * step)
    outputs = additive(c, b, step.unsqueeze(-1) * v, decay.unsqueeze(-1)) + mixer.skip[:, None] * v
    gated = split(outputs.flatten(-2) * F.silu(gate), groups)
    wanted = mixer.to_output(rms(gated, split(mixer.norm_weight, groups)).flatten(-2))
    assert_exact(mixer(x)[0], wanted)


def mlstm_loop(mixer: Any, x: Tensor, cap: float | None) -> Tensor:
    """h_t straight from the definition: no logarithms, no maximum."""
    q, k, v = (split(part(x)) for part in (mixer.project.to_queries, mixer.project.to_keys, mixer.project.to_values))
    gates = [gate(x) if cap is None else cap * torch.tanh(gate(x) / cap) for gate in (mixer.to_input, mixer.to_forget)]
    forget = torch.sigmoid(gates[1])
    write = gates[0].exp() if mixer.input_gate == "exponential" else torch.sigmoid(gates[0])
    q, ones = q / math.sqrt(q.shape[-1]), torch.ones_like(v[..., :1])
    both = additive(q, k * write.unsqueeze(-1), torch.cat([v, ones], dim=-1), forget.unsqueeze(-1))
    if mixer.input_gate == "sigmoid" and not mixer.normalize:
        return both[..., :-1]
    return both[..., :-1] / both[..., -1:].abs().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"input_gate": "exponential"},
        {"input_gate": "exponential", "soft_cap": None},
        {"input_gate": "sigmoid"},
        {"input_gate": "sigmoid", "normalize": True},
    ],
)
@pytest.mark.parametrize("bias", [0.5, 3.0])
def test_mlstm(options: dict[str, Any], bias: float) -> None:
    mixer, x = built("mlstm", input_bias=bias, eps=0.0, **options), sequence()
    hidden = mlstm_loop(mixer, x, mixer.soft_cap)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    wanted = torch.sigmoid(mixer.to_gate(x)) * normed.flatten(-2) * mixer.norm.weight
    assert_exact(mixer(x)[0], mixer.to_output(wanted))


def delta_loop(mixer: Any, x: Tensor, activation: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor],
               decay: Tensor | None, writes: int) -> Tensor:  # fmt: skip
    """The delta rule, one write after the other; decay (batch, time, heads, key_dim or 1)."""
    project = mixer.project
    joined = torch.cat([project.to_queries(x), project.to_keys(x), project.to_values(x)], dim=-1)
    if project.convolution is not None:
        joined = convolved(project.convolution, joined)
    q, k, v = joined.split(project.widths, dim=-1)
    q = norm(activation(split(q))) / math.sqrt(mixer.key_dim)
    k = norm(activation(k.unflatten(-1, (writes, HEADS, -1))))
    v = F.silu(v).unflatten(-1, (writes, HEADS, -1))
    beta = torch.sigmoid(mixer.to_beta(x)).unflatten(-1, (writes, HEADS)) * (1 + mixer.negative_eigenvalues)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        if decay is not None:
            memory = decay[:, t].unsqueeze(-1) * memory
        for j in range(writes):
            key, rate = k[:, t, j], beta[:, t, j].unsqueeze(-1)
            transition = torch.eye(mixer.key_dim).double() - outer(rate * key, key)
            memory = transition @ memory + outer(rate * key, v[:, t, j])
        return read(q[:, t], memory), memory

    return loop(step, torch.zeros(BATCH, HEADS, mixer.key_dim, mixer.value_dim, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "relu", "elu", "identity"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_delta_net(activation: str, norm: str) -> None:
    conv, gate = (None, True) if norm == "l1" else (4, False)
    mixer = built("delta_net", qk_activation=activation, qk_norm=norm, conv=conv, output_gate=gate)
    maps = {"elu": lambda u: F.elu(u) + 1, "relu": torch.relu, "identity": lambda u: u, "silu": F.silu}
    norms = {"l2": unit, "l1": lambda u: u / u.abs().sum(-1, keepdim=True).clamp(min=1e-6)}
    x = sequence()
    outputs = rms(delta_loop(mixer, x, maps[activation], norms[norm], None, 1), mixer.norm.norm.weight)
    if gate:
        outputs = outputs * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(outputs.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("name", "writes"),
    [("gated_delta_net", 1), ("delta_product", 1), ("delta_product", 3), ("gated_delta_product", 2)],
)
def test_delta_products_with_and_without_a_gate(name: str, writes: int, negative: bool) -> None:
    options = {} if name == "gated_delta_net" else {"householders": writes}
    mixer, x = built(name, negative_eigenvalues=negative, **options), sequence()
    decay = None
    if name.startswith("gated"):
        decay = torch.exp(-mixer.log_rate.exp() * F.softplus(mixer.to_steps(x) + mixer.step_bias)).unsqueeze(-1)
    outputs = rms(delta_loop(mixer, x, F.silu, unit, decay, writes), mixer.norm.norm.weight)
    if mixer.to_gate is not None:
        outputs = outputs * F.silu(split(mixer.to_gate(x)))
    assert_exact(mixer(x)[0], mixer.to_output(outputs.flatten(-2)))


@torch.no_grad()
@pytest.mark.parametrize("floor", [None, -5.0])
def test_kimi_delta_attention(floor: float | None) -> None:
    mixer, x = built("kimi_delta_attention", gate_floor=floor, expand_v=2.0), sequence()
    raw = split(x @ mixer.to_steps[0].weight.T @ mixer.to_steps[1].weight.T + mixer.step_bias)
    rate = mixer.log_rate.exp().unsqueeze(-1)
    log_decay = -rate * F.softplus(raw) if floor is None else floor * torch.sigmoid(rate * raw)
    outputs = rms(delta_loop(mixer, x, F.silu, unit, log_decay.exp(), 1), mixer.norm.norm.weight)
    gate = x @ mixer.to_gate[0].weight.T @ mixer.to_gate[1].weight.T + mixer.to_gate[1].bias
    wanted = mixer.to_output((outputs * torch.sigmoid(split(gate))).flatten(-2))
    assert_exact(mixer(x)[0], wanted)
    if floor is not None:
        assert mixer.log_decay(1000 * x).min() >= floor


def rwkv7_loop(mixer: Any, x: Tensor, first_values: Tensor | None) -> Tensor:
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    xr, xw, xk, xv, xa, xg = (x + mu * (before - x) for mu in mixer.shift_mix)

    def low_rank(layer: Any, u: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = activation(u @ layer.down.weight.T) @ layer.up.weight.T
        return hidden if layer.up.bias is None else hidden + layer.up.bias

    r, k, v = mixer.to_receptance(xr), mixer.to_keys(xk), mixer.to_values(xv)
    if first_values is not None:
        v = v + (first_values - v) * torch.sigmoid(low_rank(mixer.to_residual, xv, lambda u: u))
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(mixer.to_decay, xw, torch.tanh)))
    a = torch.sigmoid(low_rank(mixer.to_rate, xa, lambda u: u))
    gate = low_rank(mixer.to_gate, xg, torch.sigmoid)
    kappa = split(k * mixer.key_scale)
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    k = k * (1 + (a - 1) * mixer.key_mix)
    r, k, v, w, a = (split(part) for part in (r, k, v, w, a))
    assert w.min() > 0.545

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        erased = outer(kappa[:, t] * a[:, t], read(kappa[:, t], memory))
        memory = w[:, t].unsqueeze(-1) * memory - erased + outer(k[:, t], v[:, t])
        return read(r[:, t], memory), memory

    outputs = loop(step, torch.zeros(BATCH, HEADS, 4, 4, dtype=torch.float64))
    flat = outputs.reshape(BATCH * TIME, D_MODEL)
    normed = F.group_norm(flat, HEADS, mixer.norm.weight, mixer.norm.bias, eps=4e-5).view(BATCH, TIME, D_MODEL)
    bonus = ((r * k * mixer.bonus).sum(-1, keepdim=True) * v).flatten(-2)
    return mixer.to_output((normed + bonus) * gate)


@torch.no_grad()
def test_rwkv7() -> None:
    mixer, x = built("rwkv7"), sequence()
    assert_exact(mixer(x)[0], rwkv7_loop(mixer, x, None))


@torch.no_grad()
def test_rwkv7_in_deeper_layers_moves_its_values_towards_the_first_layers() -> None:
    first, x = built("rwkv7", layers=2), sequence()
    second = built("rwkv7", layer=1, layers=2, value_residual=True)
    y, state, values = first.mix_values(x, first.initial_state(BATCH), None, None)
    assert_exact(y, first(x)[0])
    assert values.shape == x.shape
    z, _, passed_on = second.mix_values(y, second.initial_state(BATCH), None, values)
    assert passed_on is values
    assert_exact(z, rwkv7_loop(second, y, values))
    with pytest.raises(ConfigurationError, match="first_values"):
        second(x)
    with pytest.raises(ConfigurationError, match="first_values"):
        first.mix_values(x, state, None, values)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_memory_in_float32(name: str) -> None:
    torch.manual_seed(0)
    mixer, x = ostinato.mixer(name, D_MODEL), sequence().float().requires_grad_()
    nn.init.normal_(mixer.to_output.weight)
    wanted, _ = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = mixer(x[:, :5])
        rest, state = mixer(x[:, 5:], state)
    assert state[0].dtype == torch.float32
    found = torch.cat([first, rest], dim=1).float()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    found.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear_attention", {"normalize": True, "conv": 3}),
        ("gla", {"conv": 4, "gate_floor": -0.05}),
        ("gla", {"decay": "head"}),
        ("gla", {"decay": "fixed", "conv": 4}),
        ("gla", {"gate_values": True, "conv": 4, "gate_floor": -0.05}),
        ("gla", {"gate_values": True, "decay": "off"}),
        ("hgrn2", {"lower_bound": 0.5}),
        ("mamba2", {"groups": 2}),
        ("mlstm", {"input_gate": "sigmoid"}),
        ("mlstm", {"input_gate": "sigmoid", "normalize": True, "input_bias": 1.0}),
        ("mlstm", {"input_bias": 1.0, "soft_cap": None}),
        ("delta_net", {"conv": None, "output_gate": True, "negative_eigenvalues": True}),
        ("delta_product", {"householders": 3, "negative_eigenvalues": True}),
        ("kimi_delta_attention", {"gate_floor": -5.0, "conv": None}),
    ],
)
def test_the_law_holds_with_options(name: str, options: dict[str, Any]) -> None:
    """The walk over the registry tries the defaults; these are the other paths through the same files."""
    mixer = built(name, shake=0.1, **options)
    report = check_mixer(mixer, name=name, length=9, routes=("free",), compile=False)
    assert report.ok
