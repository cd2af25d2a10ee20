"""The fused step is the step: outputs and states, of what it knows and of what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ostinato
import ostinato.state
from ostinato.models import fused_step as module
from ostinato.models.backbone import Backbone
from ostinato.models.fused_step import fused_step
from ostinato.models.language import LanguageModel
from ostinato.ops.kernels.triton.launch import _INSTALLED, INTERPRETED
from ostinato.ops.routes import ENGINES

PLANS = [
    "gated_delta_net(heads=2)",
    "gated_delta_net(heads=2, expand_k=1, expand_v=1, conv=None, output_gate=False)",
    "delta_net(heads=3, negative_eigenvalues=True)",
    "delta_product(heads=2, householders=2), gated_delta_product(heads=2, householders=3)",
    "gla(heads=2), kimi_delta_attention(heads=2), retnet(heads=2), gated_slot_attention(heads=2, slots=4)",
    "delta_net(qk_activation='elu', qk_norm='l1'), mamba2, attention(window=3)",
]


def small(plan, **options):
    return LanguageModel(d_model=24, plan=plan, depth=None if "), " in plan else 2, **options).eval()


def assert_same_steps(model, step, start, bound):
    """Three tokens by `step` and by the model's own, in outputs and states."""
    theirs = start
    ours = ostinato.state.clone(start)
    for tokens in ([3, 100], [5, 7], [255, 0]):
        ids = torch.tensor(tokens, device=model.device)
        with torch.no_grad():
            wanted, theirs = model.step(ids, theirs)
        found, ours = step(ids, ours)
        pairs = [(wanted, found)]
        names = ostinato.state.leaves(theirs), ostinato.state.leaves(ours)
        pairs += [(a, b) for (_, a), (_, b) in zip(*names, strict=True)]
        for a, b in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a.double() - b.double()).norm() <= bound * a.double().norm()


def started(model):
    state = model.initial_state(2)
    with torch.no_grad():
        return model(torch.randint(256, (2, 5), device=model.device), state)[1]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("channel_mixer", ["swiglu", None])
def test_it_is_the_step(plan, channel_mixer):
    model = small(plan, channel_mixer=channel_mixer, tie_embeddings=channel_mixer is None).double()
    assert_same_steps(model, fused_step(model), started(model), 1e-12)
    with ostinato.backend("reference"):
        assert_same_steps(model, fused_step(model), started(model), 1e-12)


@pytest.mark.skipif(not (_INSTALLED and (INTERPRETED or torch.cuda.is_available())), reason="needs Triton")
@pytest.mark.parametrize(
    ("plan", "dtype"), [(PLANS[0], torch.float32), (PLANS[0], torch.bfloat16), (PLANS[3], torch.float32)]
)
def test_it_is_the_step_by_kernels(plan, dtype, monkeypatch):
    if INTERPRETED:  # where every program takes its time
        from ostinato.ops.kernels.triton import step_parts

        monkeypatch.setattr(step_parts, "PROGRAMS", 4)
    model = small(plan).to("cpu" if INTERPRETED else "cuda", dtype)
    step = fused_step(model)

    def by_kernels(ids, state):
        with ostinato.backend(linear_step="triton", projections_step="triton", delta_step="triton"):
            return step(ids, state)

    assert_same_steps(model, by_kernels, started(model), 1e-5 if dtype == torch.float32 else 3e-2)


def test_a_backbone_and_a_mixer():
    backbone = Backbone(24, "gated_delta_net(heads=2)", 2).double().eval()
    x, state = torch.randn(2, 24).double(), backbone.initial_state(2)
    with torch.no_grad():
        wanted, _ = backbone.step(x, state)
    assert torch.allclose(fused_step(backbone)(x, ostinato.state.clone(state))[0], wanted, atol=1e-12)
    mixer = ostinato.mixer("mamba2", 16)
    assert fused_step(mixer) == mixer.step


def test_the_state_is_changed_in_place_where_the_layer_is_known():
    model = small(PLANS[0])
    state = started(model)
    _, after = fused_step(model)(torch.tensor([1, 2]), state)
    for before, leaving in zip(state.layers, after.layers, strict=True):
        assert before.memory is leaving.memory and before.window is leaving.window


def launches(monkeypatch, model):
    """The engines of steps that one fused step calls."""
    called = []
    for name in ("linear_step", "projections_step", "delta_step"):
        engine = ENGINES[name]
        monkeypatch.setattr(
            engine, "choose", lambda *a, _e=engine, **k: (called.append(_e.name), type(_e).choose(_e, *a, **k))[1]
        )
    fused_step(model)(torch.tensor([1, 2]), started(model))
    return called


def test_five_launches_a_layer_and_one_for_the_head(monkeypatch):
    layer = ["projections_step", "delta_step", *["linear_step"] * 3]
    assert launches(monkeypatch, small(PLANS[0])) == [*layer, *layer, "linear_step"]


def test_what_is_read_of_another_matrix_memory_goes_out_in_one_launch(monkeypatch):
    assert launches(monkeypatch, small("gla(heads=2)")) == ["linear_step"] * 7
    assert launches(monkeypatch, small("mamba2", channel_mixer=None)) == ["linear_step"]


@pytest.mark.parametrize("change", ["bias", "hook", "adapted", "scan", "mixer hook"])
def test_what_is_not_a_plain_layer_computes_as_ever(change, monkeypatch):
    model = small(PLANS[0]).double()
    seen = []
    for block in model.backbone.blocks:
        mixer = block.mixer
        if change == "bias":
            mixer.to_output = nn.Linear(24 * 3 // 2, 24, dtype=torch.double)
        if change == "hook":
            mixer.to_gate.register_forward_hook(lambda *_: seen.append(1))
        if change == "adapted":
            mixer.project.to_keys = nn.Sequential(mixer.project.to_keys, nn.Tanh())
        if change == "scan":
            mixer.scan = lambda *a, _scan=mixer.scan, **k: (2 * _scan(*a, **k)[0], _scan(*a, **k)[1])
        if change == "mixer hook":
            mixer.register_forward_hook(lambda *_: seen.append(1))
    assert not any(module._known_delta(block) for block in model.backbone.blocks)
    start = started(model)
    seen.clear()
    step = fused_step(model)
    step(torch.tensor([1, 2]), ostinato.state.clone(start))
    assert len(seen) == (2 if "hook" in change else 0)
    assert_same_steps(model, step, start, 1e-12)
