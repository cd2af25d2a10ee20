"""Llama-shaped models of the package transformers as ours: the same weights, the same logits, our states.

Source: Llama (arXiv 2302.13971), section 2.2; its norms, rotary pairs and gated channel mixer are ours already.
"""

from __future__ import annotations

from typing import Any

import torch

from ostinato.errors import ConfigurationError
from ostinato.models.language import LanguageModel

KINDS = ("llama", "mistral")
_LAYER = {
    "input_layernorm": "norm",
    "self_attn.q_proj": "mixer.to_query",
    "self_attn.k_proj": "mixer.to_key",
    "self_attn.v_proj": "mixer.to_value",
    "self_attn.o_proj": "mixer.to_output",
    "post_attention_layernorm": "channel_norm",
    "mlp.gate_proj": "channel_mixer.to_gate",
    "mlp.up_proj": "channel_mixer.to_value",
    "mlp.down_proj": "channel_mixer.to_output",
}


def from_llama(model: Any, tokenizer: str = "bytes") -> LanguageModel:
    """A `LanguageModel` with a copy of the weights of `LlamaForCausalLM` or `MistralForCausalLM`.

    Args:
        model: from transformers; grouped queries, a sliding window and a tied head are kept.
        tokenizer: the name or path of the tokenizer it was trained with.

    The copy has the type and device of the original, and is in evaluation mode. The global random generator is left
    as it was. Raises `ConfigurationError` for what a `LanguageModel` is not: biases, scaled rotary frequencies, heads
    whose widths do not add up to the model's, another activation, another family.
    """
    config = model.config
    _check(config)
    options: dict[str, Any] = {"heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads}
    options["base"] = float(_rotary(config)["rope_theta"])
    if getattr(config, "sliding_window", None) is not None:
        options["window"] = config.sliding_window
    written = ", ".join(f"{name}={value!r}" for name, value in options.items())
    weights = model.state_dict()
    with torch.random.fork_rng(devices=[]):
        ours = LanguageModel(
            config.vocab_size,
            config.hidden_size,
            f"attention({written})",
            config.num_hidden_layers,
            tokenizer=tokenizer,
            tie_embeddings=config.tie_word_embeddings,
            hidden=config.intermediate_size,
            eps=config.rms_norm_eps,
        )
    embedding = weights["model.embed_tokens.weight"]
    ours.to(embedding)
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "backbone.norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "head.weight"
    for layer in range(config.num_hidden_layers):
        for theirs, own in _LAYER.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"backbone.blocks.{layer}.{own}.weight"
    ours.load_state_dict({own: weights[theirs] for theirs, own in names.items()})
    return ours.eval()


def _rotary(config: Any) -> dict[str, Any]:
    """The rotary parameters, which older versions of transformers keep in two places."""
    found = getattr(config, "rope_parameters", None)
    if found is None:
        found = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": config.rope_theta}
    return found


def _check(config: Any) -> None:
    """Raise `ConfigurationError` unless a model of this configuration is a `LanguageModel`."""
    kind = getattr(config, "model_type", None)
    width = getattr(config, "head_dim", None)
    reason = None
    if kind not in KINDS:
        reason = f"its family is {kind!r}, not one of {', '.join(KINDS)}"
    elif width is not None and width * config.num_attention_heads != config.hidden_size:
        reason = f"{config.num_attention_heads} heads of width {width} are not its d_model {config.hidden_size}"
    elif config.hidden_act not in ("silu", "swish"):
        reason = f"its channel mixer has the activation {config.hidden_act!r}, not silu"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        reason = "its projections have biases"
    elif (scaling := _rotary(config).get("rope_type", "default")) != "default":
        reason = f"its rotary frequencies are scaled ({scaling!r})"
    if reason is not None:
        raise ConfigurationError(f"this model cannot be converted: {reason}")
