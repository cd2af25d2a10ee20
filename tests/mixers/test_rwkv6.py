"""RWKV-6: its formula as a loop in float64, and the law with parameters moved away from their start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.testing import check_mixer

D_MODEL, HEADS = 16, 4


def built() -> ostinato.Mixer:
    torch.manual_seed(0)
    mixer = ostinato.mixer("rwkv6", D_MODEL, heads=HEADS, mix_rank=3, decay_rank=5).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@torch.no_grad()
def test_the_formula() -> None:
    mixer = built()
    x = torch.randn(2, 11, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def split(part: Tensor) -> Tensor:
        return part.reshape(2, HEADS, D_MODEL // HEADS)

    memory = x.new_zeros(2, HEADS, D_MODEL // HEADS, D_MODEL // HEADS)
    before, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        delta = before - x[:, t]
        low = torch.tanh((x[:, t] + delta * mixer.common_mix) @ mixer.mix_down.weight.T).reshape(2, 5, 3)
        seen = [x[:, t] + delta * (mixer.shift_mix[i] + low[:, i] @ mixer.mix_up[i]) for i in range(5)]
        decay = split(torch.exp(-torch.exp(mixer.decay_bias + mixer.decay_up(torch.tanh(mixer.decay_down(seen[1]))))))
        r, k, v = (
            split(part) for part in (mixer.to_receptance(seen[0]), mixer.to_keys(seen[2]), mixer.to_values(seen[3]))
        )
        written = torch.einsum("bhk,bhv->bhkv", k, v)
        read = torch.einsum("bhkv,bhk->bhv", memory + mixer.bonus.unsqueeze(-1) * written, r)
        memory = decay.unsqueeze(-1) * memory + written
        normed = F.group_norm(read.flatten(1), HEADS, eps=mixer.norm.eps)
        normed = normed * mixer.norm.weight.flatten() + mixer.norm.bias.flatten()
        outputs.append(mixer.to_output(normed * F.silu(mixer.to_gate(seen[4]))))
        before = x[:, t]
    found, state = mixer(x)
    torch.testing.assert_close(found, torch.stack(outputs, 1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.memory, memory, rtol=1e-10, atol=1e-12)


def test_the_law_holds_away_from_the_start() -> None:
    assert check_mixer(built(), name="rwkv6", length=9, routes=("free",), compile=False).ok
