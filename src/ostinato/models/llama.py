"""Llama-shaped models, of the package transformers or of GGUF files, as ours: the same weights and logits, our states.

Source: Llama (arXiv 2302.13971), section 2.2; its norms, rotary pairs and gated channel mixer are ours already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostinato.errors import CheckpointError, ConfigurationError
from ostinato.models import gguf
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
_GGUF_LAYER = {
    "attn_norm": "norm",
    "attn_q": "mixer.to_query",
    "attn_k": "mixer.to_key",
    "attn_v": "mixer.to_value",
    "attn_output": "mixer.to_output",
    "ffn_norm": "channel_norm",
    "ffn_gate": "channel_mixer.to_gate",
    "ffn_up": "channel_mixer.to_value",
    "ffn_down": "channel_mixer.to_output",
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
    weights = model.state_dict()
    ours = _shaped(
        options,
        weights["model.embed_tokens.weight"],
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        depth=config.num_hidden_layers,
        tokenizer=tokenizer,
        tie_embeddings=config.tie_word_embeddings,
        hidden=config.intermediate_size,
        eps=config.rms_norm_eps,
    )
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "backbone.norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "head.weight"
    names |= _by_layer(_LAYER, "model.layers", config.num_hidden_layers)
    ours.load_state_dict({own: weights[theirs] for theirs, own in names.items()})
    return ours.eval()


def from_gguf(name: str | Path, tokenizer: str | None = None) -> LanguageModel:
    """A `LanguageModel` with the weights of a Llama-shaped GGUF file, dequantised to float32.

    Args:
        name: the file, or the name of a packaged model, "smollm2" (see `ostinato.models.gguf.find`).
        tokenizer: a name for `get_tokenizer`; None takes the file's own, by this `name` (a path is made absolute).

    Such files keep the rows of W_q and W_k in another order, for rotary pairs of neighbours (x_0, x_1), (x_2, x_3), …;
    here they are put back for pairs of halves. A head that is not in the file is the embedding's transpose. In
    evaluation mode. The global random generator is left as it was.

    Raises `CheckpointError` for what is no GGUF file, is cut off, or does not hold what it says; `ConfigurationError`
    for another architecture, scaled rotary frequencies, experts, or without the package `gguf`.
    """
    file = gguf.GGUF(gguf.find(name))
    own = str(name) if str(name) in gguf.PACKAGED else str(file.path.resolve())
    family = file.value("general.architecture")
    if family != "llama":
        raise ConfigurationError(f"{file.path} cannot be converted: its architecture is {family!r}, not 'llama'")
    heads = int(file.value("llama.attention.head_count"))
    shared = int(file.value("llama.attention.head_count_kv", heads))
    width, depth = int(file.value("llama.embedding_length")), int(file.value("llama.block_count"))
    tied = "output.weight" not in file
    names = {"token_embd.weight": "embedding.weight", "output_norm.weight": "backbone.norm.weight"}
    names |= {} if tied else {"output.weight": "head.weight"}
    names |= _by_layer(_GGUF_LAYER, "blk", depth)
    _check_gguf(file, width, heads, names)
    ours = _shaped(
        {"heads": heads, "key_value_heads": shared, "base": float(file.value("llama.rope.freq_base", 10000.0))},
        torch.empty(0),
        vocab_size=file.shape("token_embd.weight")[0],
        d_model=width,
        depth=depth,
        tokenizer=own if tokenizer is None else tokenizer,
        tie_embeddings=tied,
        hidden=int(file.value("llama.feed_forward_length")),
        # Kept in float32 in the file: 1e-5 would come out as 9.999999747e-06.
        eps=float(f"{file.value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
    )
    parameters = dict(ours.named_parameters())
    for theirs, own in names.items():
        found, wanted = file.shape(theirs), tuple(parameters[own].shape)
        if found != wanted:
            raise CheckpointError(f"{theirs} in {file.path} has shape {found}, not {wanted}")
        weight = file.tensor(theirs)
        if own.endswith(("mixer.to_query.weight", "mixer.to_key.weight")):
            weight = _halves(weight, heads if own.endswith("to_query.weight") else shared)
        with torch.no_grad():
            parameters[own].copy_(weight)
    return ours.eval()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, member) of neighbours to rows (head, member, pair) of halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _shaped(attention: dict[str, Any], like: Tensor, **options: Any) -> LanguageModel:
    """An untrained model of full attention with these options, of the type and device of `like`."""
    written = ", ".join(f"{name}={value!r}" for name, value in attention.items())
    with torch.random.fork_rng(devices=[]):
        return LanguageModel(plan=f"attention({written})", **options).to(like)


def _by_layer(names: dict[str, str], prefix: str, depth: int) -> dict[str, str]:
    """Their names of the weights of all layers, and ours."""
    return {
        f"{prefix}.{layer}.{theirs}.weight": f"backbone.blocks.{layer}.{own}.weight"
        for layer in range(depth)
        for theirs, own in names.items()
    }


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


def _check_gguf(file: gguf.GGUF, width: int, heads: int, names: dict[str, str]) -> None:
    """Raise unless a `LanguageModel` can have these weights, all of them and no other."""
    reason = None
    if heads < 1 or width % heads:
        reason = f"{heads} heads do not divide its width {width}"
    elif int(file.value("llama.attention.key_length", width // heads)) != width // heads:
        reason = f"{heads} heads of width {file.value('llama.attention.key_length')} are not its width {width}"
    elif int(file.value("llama.rope.dimension_count", width // heads)) != width // heads:
        reason = f"{file.value('llama.rope.dimension_count')} of its {width // heads} channels are rotated, not all"
    elif file.value("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file:
        reason = "its rotary frequencies are scaled"
    elif file.value("llama.expert_count", 0):
        reason = f"its channel mixers have {file.value('llama.expert_count')} experts"
    if reason is not None:
        raise ConfigurationError(f"{file.path} cannot be converted: {reason}")
    if missing := [name for name in names if name not in file]:
        raise CheckpointError(f"{file.path} lacks the tensor {missing[0]} (and {len(missing) - 1} more)")
    if foreign := [name for name in file.names if name not in names]:
        raise ConfigurationError(f"{file.path} cannot be converted: there is no place for its tensor {foreign[0]}")
