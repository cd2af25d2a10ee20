"""The nonlinear layers: torch's own LSTM and GRU, pararnn's cells, M²RNN by its equations, and the options."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.mixers.registry import mixer

NAMES = ["elman", "lstm", "gru", "slstm", "para_gru", "para_lstm", "m2rnn"]


def copy_torch(ours, theirs: nn.RNNBase) -> None:
    """Give a head-wise layer with one head the weights of torch's, and the identity for its output."""
    with torch.no_grad():
        ours.to_gates.weight.copy_(theirs.weight_ih_l0)
        ours.to_gates.bias.copy_(theirs.bias_ih_l0)
        ours.recurrent.copy_(theirs.weight_hh_l0.view_as(ours.recurrent))
        bias = theirs.bias_hh_l0
        if isinstance(theirs, nn.GRU):
            split = 2 * ours.hidden_dim
            ours.to_gates.bias[:split] += bias[:split]
            ours.recurrent_bias.copy_(bias[split:].view_as(ours.recurrent_bias))
        else:
            ours.to_gates.bias += bias
        ours.to_output.weight.copy_(torch.eye(ours.hidden_dim))


@pytest.mark.parametrize("name", ["elman", "lstm", "gru"])
def test_one_head_is_torch(name):
    ours = mixer(name, 8, heads=1).double()
    theirs = {"elman": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name](8, 8, batch_first=True).double()
    copy_torch(ours, theirs)
    x = torch.randn(3, 11, 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(1, 3, 8, dtype=torch.float64)
    cell = torch.randn(1, 3, 8, dtype=torch.float64)
    wanted, last = theirs(x, (hidden, cell) if name == "lstm" else hidden)
    state = ours.initial_state(3)
    start = (hidden, cell) if name == "lstm" else (hidden,)
    found, end = ours(x, type(state)(*(leaf.transpose(0, 1) for leaf in start)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(end, last if name == "lstm" else (last,), strict=True):
        torch.testing.assert_close(a.squeeze(1), b.squeeze(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)))


@pytest.mark.parametrize("name", ["elman", "lstm", "gru", "slstm"])
def test_heads_do_not_meet_in_the_recurrence(name):
    layer = mixer(name, 8, heads=2).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    state = layer.initial_state(1)
    kicked = type(state)(*(leaf.clone() for leaf in state))
    kicked.hidden[:, 0] += 1
    with torch.no_grad():
        layer.to_output.weight.copy_(torch.eye(8))
        difference = (layer(x, kicked)[0] - layer(x, state)[0]).abs().amax((0, 1))
    assert (difference[:4] > 0).all() and (difference[4:] == 0).all()


@pytest.mark.parametrize("name", ["elman", "lstm", "gru", "slstm"])
def test_block_diagonal_is_dense_with_zeros(name):
    blocks, dense = mixer(name, 6, heads=3).double(), mixer(name, 6, heads=1).double()
    with torch.no_grad():
        for gate in range(blocks.gates):
            dense.recurrent[gate, 0].copy_(torch.block_diag(*blocks.recurrent[gate]))
        dense.to_gates.load_state_dict(blocks.to_gates.state_dict())
        dense.to_output.load_state_dict(blocks.to_output.state_dict())
        if name == "gru":
            blocks.recurrent_bias.normal_()
            dense.recurrent_bias.copy_(blocks.recurrent_bias.view(1, 6))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(blocks(x)[0], dense(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["para_gru", "para_lstm"])
def test_pararnn_is_the_same(name):
    # It imports triton, which is not everywhere.
    pararnn = pytest.importorskip("pararnn", exc_type=ImportError)
    ours = mixer(name, 8).double()
    theirs = (pararnn.ParaGRU if name == "para_gru" else pararnn.ParaLSTM)(8, 8).double()
    with torch.no_grad():
        theirs.W_x.load_state_dict(ours.to_gates.state_dict())
        for row, gate in enumerate("zrn" if name == "para_gru" else "fzo"):
            getattr(theirs, f"a_{gate}").copy_(ours.recurrent[row])
        if name == "para_lstm":
            theirs.c_f.copy_(ours.peephole[0])
            theirs.c_o.copy_(ours.peephole[1])
        ours.to_output.weight.copy_(torch.eye(8))
    x = torch.randn(2, 33, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = pararnn.sequential_apply(theirs, x)
    wanted = wanted[..., 1, :] if name == "para_lstm" else wanted
    torch.testing.assert_close(ours(x)[0].detach(), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["para_gru", "para_lstm"])
def test_recurrent_weights_are_bounded(name):
    layer = mixer(name, 8).double()
    assert float(layer.recurrent.detach().std()) < 1
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        for weight in (layer.recurrent, getattr(layer, "peephole", layer.recurrent)):
            weight.mul_(100)
        wild = layer(x)[0]
        for weight in (layer.recurrent, getattr(layer, "peephole", layer.recurrent)):
            weight.clamp_(-0.5, 0.5)
        torch.testing.assert_close(layer(x)[0], wild)


@pytest.mark.parametrize("name", ["para_gru", "para_lstm"])
def test_three_iterations_and_both_routes(name):
    layer, fixed = mixer(name, 16).double(), mixer(name, 16, iterations=3).double()
    fixed.load_state_dict(layer.state_dict())
    x = torch.randn(2, 200, 16, dtype=torch.float64)
    exact = layer(x)[0]
    torch.testing.assert_close(fixed(x)[0], exact, rtol=1e-3, atol=1e-4)
    with ostinato.backend("reference"):
        torch.testing.assert_close(layer(x)[0], exact, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(fixed(x)[0], exact, rtol=1e-10, atol=1e-11)


def test_newton_trains_as_the_loop_does():
    """Claim: the same seed gives the same loss curve (parity of bits)."""
    bits = torch.randint(0, 2, (16, 20))
    labels = bits.cumsum(1) % 2
    curves = []
    for route in ("parallel", "reference"):
        torch.manual_seed(0)
        embed, layer, head = nn.Embedding(2, 8), mixer("para_gru", 8), nn.Linear(8, 2)
        parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        curve = []
        with ostinato.backend(newton_scan=route):
            for _ in range(8):
                loss = F.cross_entropy(head(layer(embed(bits))[0]).flatten(0, 1), labels.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    assert curves[0][-1] < curves[0][0]


def m2rnn_by_hand(layer, x: Tensor) -> Tensor:
    """Card 39, equations 1 to 6, with loops over time, heads and taps."""
    heads, key, value = layer.heads, layer.key_dim, layer.value_dim
    outputs = []
    for row in x:
        projected = row @ layer.to_all.weight.T
        sizes = [layer.query_heads * key, layer.key_heads * key, heads * value, heads, heads * value]
        q, k, v, f, g = projected.split(sizes, dim=-1)
        qkv = torch.cat([q, k, v], dim=-1)
        taps = layer.convolution.weight
        convolved = torch.stack([sum(taps[i] * qkv[t - i] for i in range(4) if t >= i) for t in range(len(row))])
        q, k, v = F.silu(convolved).split(sizes[:3], dim=-1)
        memory = [torch.zeros(key, value, dtype=x.dtype) for _ in range(heads)]
        for t in range(len(row)):
            read = []
            for n in range(heads):
                nq, nk = n * layer.query_heads // heads, n * layer.key_heads // heads
                q_n, k_n = q[t, nq * key : (nq + 1) * key], k[t, nk * key : (nk + 1) * key]
                v_n = v[t, n * value : (n + 1) * value]
                gate = (1 + math.e ** (f[t, n] + layer.forget_bias[n])) ** -layer.log_rate[n].exp()
                z = torch.tanh(memory[n] @ layer.transition[n] + torch.outer(k_n, v_n))
                memory[n] = gate * memory[n] + (1 - gate) * z
                read.append(memory[n].T @ q_n + layer.residual[n] * v_n)
            u = torch.cat(read) * F.silu(g[t])
            u = u * torch.rsqrt(u.square().mean() + 1e-5) * layer.norm.norm.weight
            outputs.append(layer.to_output.weight @ u)
    return torch.stack(outputs).view(*x.shape[:2], -1)


@pytest.mark.parametrize(("query_heads", "key_heads"), [(1, 1), (2, 4)])
def test_m2rnn_is_its_equations(query_heads, key_heads):
    options = {"key_dim": 3, "value_dim": 2, "query_heads": query_heads, "key_heads": key_heads}
    layer = mixer("m2rnn", 8, heads=4, **options).double()
    with torch.no_grad():
        layer.transition.add_(0.3 * torch.randn_like(layer.transition))
        layer.residual.normal_()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], m2rnn_by_hand(layer, x), rtol=1e-10, atol=1e-11)


def test_m2rnn_starts_as_the_paper_says():
    layer = mixer("m2rnn", 64)
    assert (layer.heads, layer.key_dim, layer.value_dim) == (4, 64, 16)
    assert torch.equal(layer.transition, torch.eye(16).expand(4, 16, 16))
    assert (layer.residual == 1).all()
    assert (layer.log_rate.exp() <= 16).all()
    step = F.softplus(layer.forget_bias)
    assert (step >= 0.99e-4).all() and (step <= 0.101).all()
    assert {"log_rate", "forget_bias", "residual"} <= layer.no_weight_decay
    x = torch.randn(1, 30, 64)
    state = layer(x)[1]
    assert state.memory.shape == (1, 4, 64, 16) and state.memory.abs().max() <= 1


def test_m2rnn_gradient_clip_agrees_until_it_binds():
    free, loose, tight = (mixer("m2rnn", 16, gradient_clip=clip).double() for clip in (None, 1e6, 1e-6))
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    grads = []
    for layer in (free, loose, tight):
        layer.load_state_dict(free.state_dict())
        grads.append(torch.autograd.grad(layer(x)[0].square().sum(), layer.transition)[0])
    torch.testing.assert_close(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    layer = mixer(name, 16)
    x = torch.randn(2, 20, 16)
    wanted = layer(x)[0].detach()
    found, state = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32
    torch.testing.assert_close(found.detach().float(), wanted, rtol=0.1, atol=0.1)


def test_biases_start_where_they_say():
    lstm, slstm = mixer("lstm", 8, forget_bias=2.0), mixer("slstm", 8)
    assert (lstm.to_gates.bias[8:16] == 2).all()
    torch.testing.assert_close(slstm.to_gates.bias[8:16].detach(), torch.linspace(1, 3, 8))
    assert (mixer("para_gru", 8).to_gates.bias == 0).all()


@pytest.mark.parametrize("name", ["elman", "lstm", "gru", "slstm"])
def test_heads_must_divide(name):
    with pytest.raises(ConfigurationError, match="not divisible by heads=3"):
        mixer(name, 16, heads=3)
    assert mixer(name, 16, heads=2, expand=2).hidden_dim == 32


def test_m2rnn_heads_must_divide():
    with pytest.raises(ConfigurationError, match="query_heads=3"):
        mixer("m2rnn", 64, query_heads=3)
