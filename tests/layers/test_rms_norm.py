"""`layers.rms_norm`: torch's module and its weights, the type under autocast, and the sum in front of it."""

from __future__ import annotations

import torch
from torch import nn

from ostinato.layers.rms_norm import RMSNorm


def test_it_is_torchs_module():
    ours, theirs = RMSNorm(6, eps=1e-3), nn.RMSNorm(6, eps=1e-3)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 3, 6, dtype=dtype)
        assert torch.equal(ours.to(dtype)(x), theirs.to(dtype)(x))
    x, branch = torch.randn(2, 6).double(), torch.randn(2, 6).double()
    total, normed = ours.behind_sum(x, branch)
    assert torch.equal(total, x + branch) and torch.equal(normed, ours(total))


def test_under_autocast_it_is_rounded_once_to_the_type_of_the_products_behind_it():
    norm, x = RMSNorm(6, eps=1e-3), torch.randn(2, 6)
    wanted = norm(x).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(norm(x), wanted)
        total, normed = norm.behind_sum(x, torch.zeros(2, 6).bfloat16())
        assert total.dtype == torch.float32 and torch.equal(total, x)
        assert torch.equal(normed, wanted)
        assert norm.double()(x.double()).dtype == torch.float64
        compiled = torch.compile(norm.float(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
