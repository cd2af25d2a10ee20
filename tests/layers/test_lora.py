"""LoRA: its formula, merging, what is learned, and files that hold the adapters alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ostinato.errors import CheckpointError, ConfigurationError
from ostinato.files import write_tensors
from ostinato.layers.lora import (
    LoRALinear,
    adapter_weights,
    adapters,
    add_lora,
    load_adapters,
    merge_lora,
    save_adapters,
)
from ostinato.models.language import LanguageModel


def trained(layer: LoRALinear) -> LoRALinear:
    nn.init.normal_(layer.lora_b)
    return layer


def small() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(d_model=16, plan="attention", depth=2)


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias: bool) -> None:
    linear, x = nn.Linear(6, 5, bias=bias).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    layer = trained(LoRALinear(linear, rank=2, alpha=6.0))
    correction = x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), linear(x) + 3.0 * correction)
    assert layer.lora_a.shape == (2, 6) and layer.lora_b.shape == (5, 2) and layer.weight is linear.weight


def test_nothing_changes_at_first_and_the_default_scale_is_one() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(4, 6)
    layer = LoRALinear(linear)
    assert torch.equal(layer(x), linear(x)) and layer.scale == 1.0
    assert layer.lora_a.abs().sum() > 0


def test_merge_and_unmerge() -> None:
    layer, x = trained(LoRALinear(nn.Linear(6, 5).double(), rank=2)), torch.randn(4, 6, dtype=torch.float64)
    before, weight = layer(x), layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    layer.merge()
    layer.merge()
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), before)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.plain()(x), before)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.plain()(x), before)


def test_only_the_adapters_learn() -> None:
    model = small()
    names = add_lora(model, rank=2)
    assert len(names) == 6 and names[0] == "backbone.blocks.0.mixer.to_query"
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        learned == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")} == set(adapter_weights(model))
    )
    frozen = {name: value.clone() for name, value in model.state_dict().items() if name not in learned}
    tokens = torch.randint(256, (2, 9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = model(tokens)[0]
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(tokens)[0], before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())


def test_a_merged_model_is_plain_again() -> None:
    model, tokens = small(), torch.randint(256, (2, 9))
    names = set(model.state_dict())
    add_lora(model)
    for _, layer in adapters(model):
        trained(layer)
    before = model(tokens)[0]
    merge_lora(model)
    torch.testing.assert_close(model(tokens)[0], before, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


def test_files_hold_the_adapters_alone(tmp_path: Path) -> None:
    model, other, tokens = small(), small(), torch.randint(256, (2, 9))
    add_lora(model, rank=3)
    add_lora(other, rank=3)
    for _, layer in adapters(model):
        trained(layer)
    save_adapters(model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 12_000  # 6 · 3 · 32 numbers; the model has 9000
    for _, layer in adapters(other):
        trained(layer).merge()
    load_adapters(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(tokens)[0], model(tokens)[0], atol=1e-4, rtol=1e-4)


def test_errors(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(ConfigurationError, match="no adapters to save"):
        save_adapters(model, tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError, match="named nowhere; there are to_gate"):
        add_lora(model, ["nowhere"])
    with pytest.raises(ConfigurationError, match="at least 1, got 0"):
        add_lora(model, rank=0)
    add_lora(model, "to_query")
    with pytest.raises(ConfigurationError, match="has an adapter already"):
        add_lora(model)
    save_adapters(model, tmp_path / "a.safetensors")
    other = small()
    add_lora(other, "to_query", rank=2)
    with pytest.raises(CheckpointError, match=r"has shape \(8, 16\) there and \(2, 16\) here"):
        load_adapters(other, tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {"kind": "state"})
    with pytest.raises(CheckpointError, match="holds state, not adapters"):
        load_adapters(model, tmp_path / "b.safetensors")
