"""LRU, RG-LRU, minLSTM and Mamba: against their formulas in plain loops, against peers, and where they start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.mixers.lru import LRU
from ostinato.mixers.mamba import Mamba
from ostinato.mixers.minimal import MinLSTM
from ostinato.mixers.rg_lru import RGLRU


def test_lru_is_its_loop() -> None:
    layer = LRU(5, d_state=7).double()
    x = torch.randn(2, 30, 5, dtype=torch.float64)
    y, last = layer(x)
    value = torch.exp(-torch.exp(layer.log_log_radius) + 1j * torch.exp(layer.log_phase))
    inputs, outputs = torch.view_as_complex(layer.inputs), torch.view_as_complex(layer.outputs)
    h = torch.zeros(2, 7, dtype=torch.complex128)
    for t in range(30):
        h = value * h + torch.exp(layer.log_scale) * (x[:, t].to(h.dtype) @ inputs.T)
        torch.testing.assert_close(y[:, t], (h @ outputs.T).real + layer.skip * x[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.view_as_complex(last.hidden), h, rtol=0, atol=1e-12)


def test_lru_starts_on_its_ring() -> None:
    layer = LRU(4, d_state=4000, r_min=0.6, r_max=0.9, max_phase=math.pi / 10)
    radius = torch.exp(-torch.exp(layer.log_log_radius)).detach()
    assert radius.min() >= 0.6 - 1e-4 and radius.max() <= 0.9 + 1e-4
    # Uniform by area: the mean of |λ|² is the middle of the squares.
    assert radius.square().mean().item() == pytest.approx((0.36 + 0.81) / 2, abs=0.01)
    torch.testing.assert_close(torch.exp(layer.log_scale).detach(), torch.sqrt(1 - radius.square()), rtol=1e-4, atol=0)
    assert torch.exp(layer.log_phase).max() <= math.pi / 10
    with pytest.raises(ConfigurationError, match="0 <= r_min < r_max <= 1"):
        LRU(4, r_min=0.9, r_max=0.5)


def test_rg_lru_is_its_loop() -> None:
    layer = RGLRU(8, heads=2, conv_width=0, gated=False).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    y, _ = layer(x)
    u = layer.to_input(x)
    matrices = [torch.block_diag(*weight) for weight in layer.gate_weight]
    h = torch.zeros(2, 8, dtype=torch.float64)
    for t in range(20):
        r, i = (torch.sigmoid(u[:, t] @ m + layer.gate_bias[g].flatten()) for g, m in enumerate(matrices))
        a = torch.sigmoid(-layer.rate) ** (8 * r)  # e^{−softplus(λ)} = σ(−λ)
        h = a * h + torch.sqrt(1 - a**2) * (i * u[:, t])
        torch.testing.assert_close(y[:, t], layer.to_output(h), rtol=0, atol=1e-12)


def test_rg_lru_starts_between_its_decays() -> None:
    layer = RGLRU(4096, heads=256)
    decay = torch.exp(-8 * F.softplus(layer.rate)).detach()
    assert decay.min() >= 0.9 - 1e-5 and decay.max() <= 0.999 + 1e-5
    assert decay.mean().item() == pytest.approx((0.9 + 0.999) / 2, abs=0.005)


def test_rg_lru_has_a_gradient_where_its_gate_is_shut() -> None:
    layer = RGLRU(4, heads=1).double()
    layer.gate_bias.data[0] = -1e4
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_rg_lru_equals_recurrent_gemma() -> None:
    """Transformers' recurrent block. It lets the first input of a sequence in unscaled, so it is asked from step 1."""
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    configuration = pytest.importorskip("transformers.models.recurrent_gemma.configuration_recurrent_gemma")
    config = configuration.RecurrentGemmaConfig(
        hidden_size=8, lru_width=8, num_attention_heads=2, conv1d_width=4, hidden_activation="gelu"
    )
    peer = modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0).double()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = RGLRU(8, heads=2).double()
    assert ours.to_gate is not None and ours.convolution is not None
    with torch.no_grad():
        for mine, theirs in ((ours.to_input, peer.linear_x), (ours.to_gate, peer.linear_y)):
            mine.load_state_dict(theirs.state_dict())
        ours.to_output.load_state_dict(peer.linear_out.state_dict())
        ours.convolution.weight.copy_(peer.conv_1d.weight[:, 0].flip(1).T)
        ours.convolution.bias.copy_(peer.conv_1d.bias)
        ours.rate.copy_(peer.rg_lru.recurrent_param)
        ours.gate_weight.copy_(torch.stack([peer.rg_lru.recurrent_gate_weight, peer.rg_lru.input_gate_weight]))
        ours.gate_bias.copy_(torch.stack([peer.rg_lru.recurrent_gate_bias, peer.rg_lru.input_gate_bias]))
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    positions = torch.arange(1, 16).unsqueeze(0)
    with torch.no_grad():
        wanted, _ = peer(x, positions, torch.ones(2, 15), use_cache=False)
    torch.testing.assert_close(ours(x)[0], wanted, rtol=0, atol=1e-5)


def test_min_lstm_is_its_loop() -> None:
    layer = MinLSTM(5, expand=2.0).double()
    x = torch.randn(2, 20, 5, dtype=torch.float64)
    y, _ = layer(x)
    h = torch.zeros(2, 10, dtype=torch.float64)
    for t in range(20):
        f, i = torch.sigmoid(layer.to_forget(x[:, t])), torch.sigmoid(layer.to_input(x[:, t]))
        h = f / (f + i) * h + i / (f + i) * layer.to_candidate(x[:, t])
        torch.testing.assert_close(y[:, t], layer.to_output(h), rtol=0, atol=1e-12)


def test_min_lstm_with_both_gates_shut() -> None:
    """f = i = σ(−1000), which is 0 in any type: f′ = ½ all the same."""
    layer = MinLSTM(3)
    for gate in (layer.to_forget, layer.to_input):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, -1000.0)
    x = torch.randn(1, 1, 3)
    _, state = layer(x)
    torch.testing.assert_close(state.hidden, 0.5 * layer.to_candidate(x)[:, 0])


def mamba_by_loop(layer: Mamba, x: Tensor) -> Tensor:
    u, gate = layer.to_input(x).chunk(2, dim=-1)
    u = F.silu(layer.convolution(u, layer.convolution.initial_state(x.shape[0]))[0])
    step, inputs, outputs = layer.to_selection(u).split([layer.step_rank, layer.d_state, layer.d_state], dim=-1)
    step = F.softplus(layer.to_step(step))
    rates = -torch.exp(layer.log_rate)
    h = torch.zeros(x.shape[0], layer.inner, layer.d_state, dtype=x.dtype)
    out = []
    for t in range(x.shape[1]):
        a = torch.exp(step[:, t, :, None] * rates)
        if layer.negative_eigenvalues:
            a = 2 * a - 1
        h = a * h + (step[:, t] * u[:, t]).unsqueeze(-1) * inputs[:, t, None, :]
        out.append((h * outputs[:, t, None, :]).sum(-1) + layer.skip * u[:, t])
    return layer.to_output(torch.stack(out, dim=1) * F.silu(gate))


@pytest.mark.parametrize("negative", [False, True])
def test_mamba_is_its_loop(negative: bool) -> None:
    layer = Mamba(6, d_state=4, negative_eigenvalues=negative).double()
    x = torch.randn(2, 25, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], mamba_by_loop(layer, x), rtol=0, atol=1e-12)


def test_mamba_equals_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    configuration = pytest.importorskip("transformers.models.mamba.configuration_mamba")
    config = configuration.MambaConfig(hidden_size=16, state_size=8, num_hidden_layers=1)
    peer = modeling.MambaMixer(config, layer_idx=0).eval()
    torch.nn.init.normal_(peer.D)
    torch.nn.init.normal_(peer.A_log)
    ours = Mamba(16, d_state=8)
    assert ours.convolution.bias is not None
    with torch.no_grad():
        ours.to_input.weight.copy_(peer.in_proj.weight)
        ours.convolution.weight.copy_(peer.conv1d.weight[:, 0].flip(1).T)
        ours.convolution.bias.copy_(peer.conv1d.bias)
        ours.to_selection.weight.copy_(peer.x_proj.weight)
        ours.to_step.load_state_dict(peer.dt_proj.state_dict())
        ours.log_rate.copy_(peer.A_log)
        ours.skip.copy_(peer.D)
        ours.to_output.weight.copy_(peer.out_proj.weight)
        x = torch.randn(2, 33, 16)
        torch.testing.assert_close(ours(x)[0], peer(x), rtol=1e-5, atol=1e-6)


def test_mamba_starts_as_the_paper_says() -> None:
    layer = Mamba(32)
    assert layer.step_rank == 2 and layer.inner == 64
    torch.testing.assert_close(torch.exp(layer.log_rate[5]).detach(), torch.arange(1.0, 17.0))
    step = F.softplus(layer.to_step.bias).detach()
    assert step.min() >= 1e-3 * (1 - 1e-4) and step.max() <= 1e-1 * (1 + 1e-4)
    assert {"log_rate", "skip"} == layer.no_weight_decay


def test_only_negative_eigenvalues_keep_oscillating() -> None:
    """On constant input a layer with eigenvalues in [0, 1] settles; one with an eigenvalue near −1 does not."""
    for negative in (False, True):
        layer = Mamba(8, d_state=2, negative_eigenvalues=negative).double()
        torch.nn.init.constant_(layer.to_step.bias, 25.0)  # exp(ΔA) ≈ 0, so 2·exp(ΔA) − 1 ≈ −1
        states, state = [], layer.initial_state(1)
        for _ in range(60):
            _, state = layer.step(torch.ones(1, 8, dtype=torch.float64), state)
            states.append(state.hidden)
        change = (states[-1] - states[-2]).abs().max()
        assert (change > 1e-2) if negative else (change < 1e-6)
