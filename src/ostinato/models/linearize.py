"""Linearize a trained Transformer: its softmax attention becomes Liger attention, with the same weights (or LoLCATs').

Source: Liger (arXiv 2503.01496), sections 3.1 and 3.2. No parameter is added (but by controls: `added_parameters`); the
quality that is lost comes back by fine-tuning with `ostinato.layers.lora.add_lora` on the language model's own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ostinato.errors import ConfigurationError
from ostinato.models.language import LanguageModel
from ostinato.models.llama import from_llama
from ostinato.models.plan import Layer, Plan

_KEPT = ("heads", "key_value_heads", "rope", "base", "qk_norm")
_NEW = (".mixer.to_gate.weight", ".mixer.query_features", ".mixer.key_features", ".mixer.window_factor")


def linearize(
    model: Any,
    recurrence: str | None = "gla",
    window: int = 64,
    *,
    mix: float = 0.5,
    gate_normalizer: float = 16.0,
    slots: int = 16,
    gate: str = "pooled",
    features: str = "softmax",
    tokenizer: str = "bytes",
) -> LanguageModel:
    """A language model whose every attention layer is a `Liger` with that layer's weights; all else is a copy.

    Args:
        model: a `LanguageModel` with attention layers, or a Llama-shaped model of transformers (see `from_llama`).
        recurrence: "gla", "hgrn2" or "gsa"; for a control, None, attention in the window alone, or "lolcats",
            `LoLCATs` attention, whose features `ostinato.training.attention_transfer` learns.
        window, mix, gate_normalizer, slots, gate, features: as `Liger`'s.
        tokenizer: of a model of transformers; a `LanguageModel` has its own.

    The copy has the type, device and mode of the original, which is not changed; all its parameters are learned. The
    global random generator is left as it was, but for the gate "fresh", which draws from it. Raises
    `ConfigurationError` if the model has no attention, or options fit no Liger.
    """
    source = model if isinstance(model, LanguageModel) else from_llama(model, tokenizer)
    layers = source.backbone.plan.to_depth(source.backbone.depth)
    if not any(layer.name == "attention" for layer in layers):
        raise ConfigurationError(f"there is no attention to linearize in the plan {source.config['plan']!r}")
    options: dict[str, Any] = {"window": window}
    if recurrence not in (None, "lolcats"):
        options |= {"recurrence": recurrence, "mix": mix, "gate_normalizer": gate_normalizer, "gate": gate}
        options |= {} if features == "softmax" else {"features": features}
        options |= {"slots": slots} if recurrence == "gsa" else {}
    name = {None: "attention", "lolcats": "lolcats"}.get(recurrence, "liger")
    plan = Plan(tuple(_replaced(layer, name, options) for layer in layers))
    with torch.random.fork_rng(devices=[], enabled=gate != "fresh"):
        made = LanguageModel(**{**source.config, "plan": plan})
    made.to(source.embedding.weight)
    found = made.load_state_dict(source.state_dict(), strict=False)
    foreign = [key for key in found.missing_keys if not key.endswith(_NEW)] + found.unexpected_keys
    if foreign:
        raise ConfigurationError(
            f"the model is not what its configuration says: {foreign[0]} has no counterpart; merge_lora(model) makes "
            "plain layers of adapted ones"
        )
    return made.train(source.training)


def added_parameters(model: LanguageModel) -> dict[str, nn.Parameter]:
    """What a conversion has and its original has not, by name: of a fresh gate, of learned features; empty for Liger.

    They start untrained. Where the rest is adapted by LoRA, they are learned as they are.
    """
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(_NEW)}


def _replaced(layer: Layer, name: str, options: dict[str, Any]) -> Layer:
    if layer.name != "attention":
        return layer
    return Layer(name, {**{key: value for key, value in layer.options.items() if key in _KEPT}, **options})
