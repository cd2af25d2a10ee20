"""A captured step does what the step does; where there is no CUDA device it says so."""

from __future__ import annotations

import pytest
import torch

import ostinato.state
from ostinato.errors import BackendError, ConfigurationError, ShapeError
from ostinato.models.captured import CapturedStep
from ostinato.models.language import LanguageModel

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")


def small(plan="gated_delta_net, mlstm, mamba2"):
    return LanguageModel(d_model=32, plan=plan, depth=None).eval()


def test_it_needs_a_cuda_device():
    model = small()
    with pytest.raises(BackendError, match="this one is on cpu"):
        CapturedStep(model, model.initial_state(1))


@on_gpu
def test_it_is_the_step():
    model = small().cuda()
    start = model.read("Once upon a time")
    captured, state = CapturedStep(model, start), start
    for token in (3, 200, 7, 7):
        ids = torch.tensor([token], device="cuda")
        wanted, state = model.advance(ids, state)
        found = captured(ids)
        assert torch.allclose(found, wanted, atol=1e-5)
    for (_, ours), (_, theirs) in zip(ostinato.state.leaves(captured.state), ostinato.state.leaves(state), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    captured.state = start
    again, _ = model.advance(torch.tensor([3], device="cuda"), start)
    assert torch.allclose(captured(torch.tensor([3], device="cuda")), again, atol=1e-5)


@on_gpu
def test_a_fused_step_and_greedy_decoding():
    model = small("gated_delta_net(heads=2), mlstm").cuda()
    start, first = model.read("Once upon a time"), torch.tensor([3], device="cuda")
    captured = CapturedStep(model, start, fused=True)
    with pytest.raises(ConfigurationError, match="call this object with a token first"):
        captured.likeliest(1)
    logits, state = model.advance(first, start)
    assert torch.allclose(captured(first), logits, atol=1e-5)
    wanted = []
    for _ in range(5):
        wanted.append(logits.argmax(-1))
        logits, state = model.advance(wanted[-1], state)
    assert torch.equal(captured.likeliest(5), torch.stack(wanted, dim=1))
    for (_, ours), (_, theirs) in zip(ostinato.state.leaves(captured.state), ostinato.state.leaves(state), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    with pytest.raises(ConfigurationError, match="either compiled or fused"):
        CapturedStep(model, start, compile=True, fused=True)


@on_gpu
def test_a_growing_state_and_a_wrong_input_are_refused():
    model = small("attention").cuda()
    with pytest.raises(ConfigurationError, match="grows"):
        CapturedStep(model, model.read("Once"))
    model = small().cuda()
    with pytest.raises(ShapeError, match="inputs of shape"):
        CapturedStep(model, model.initial_state(2))(torch.tensor([1], device="cuda"))
