"""Linearizing: Llama's logits are ours, all but attention is kept, the window alone is attention in a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.layers.lora import add_lora
from ostinato.mixers.liger import Liger
from ostinato.models.language import LanguageModel
from ostinato.models.linearize import added_parameters, linearize
from ostinato.models.llama import from_llama

transformers = pytest.importorskip("transformers")


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-4,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**base, **options})).double().eval()


def ours(
    plan: str = "attention(base=500.0, key_value_heads=2, qk_norm=True), min_gru", **options: Any
) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(d_model=16, plan=plan, depth=2, **options).double().eval()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest logit; Transformers computes norms and angles in float32 in any case."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


TOKENS = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_logits_of_llama(tied: bool) -> None:
    theirs = llama(tie_word_embeddings=tied, rope_parameters={"rope_theta": 777.0, "rope_type": "default"})
    model = from_llama(theirs)
    assert apart(model(TOKENS)[0], theirs(TOKENS).logits) < 1e-5
    assert model.num_parameters() == theirs.num_parameters()
    assert model.backbone.mixers[0].base == 777.0 and not model.training


@torch.no_grad()
def test_the_logits_of_mistral_with_its_window() -> None:
    torch.manual_seed(0)
    config = {**llama().config.to_dict(), "sliding_window": 5, "model_type": "mistral"}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).double().eval()
    assert apart(from_llama(theirs)(TOKENS)[0], theirs(TOKENS).logits) < 1e-5
    # The control of a window alone, made of a model that sees everything, is the model with the window.
    full = transformers.LlamaForCausalLM(llama().config).double()
    full.load_state_dict(theirs.state_dict())
    assert apart(linearize(full.eval(), None, window=5)(TOKENS)[0], theirs(TOKENS).logits) < 1e-5


@torch.no_grad()
def test_a_wide_window_alone_is_the_model() -> None:
    theirs = llama()
    assert apart(linearize(theirs, None, window=21)(TOKENS)[0], theirs(TOKENS).logits) < 1e-5
    assert apart(linearize(theirs, None, window=20)(TOKENS)[0], theirs(TOKENS).logits) > 1e-3


@pytest.mark.parametrize("recurrence", ["gla", "hgrn2", "gsa"])
@torch.no_grad()
def test_all_but_attention_is_kept(recurrence: str) -> None:
    theirs = llama()
    source, made = from_llama(theirs), linearize(theirs, recurrence, window=8)
    before, after = source.state_dict(), made.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert made.num_parameters() == theirs.num_parameters()
    assert all(isinstance(mixer, Liger) and mixer.window == 8 for mixer in made.backbone.mixers)
    made.embedding.weight.zero_()
    assert source.embedding.weight.abs().sum() > 0
    # With its attention put back, the converted model is the model.
    made = linearize(theirs, recurrence)
    for block, old in zip(made.backbone.blocks, source.backbone.blocks, strict=True):
        block.mixer = old.mixer
    assert apart(made(TOKENS)[0], theirs(TOKENS).logits) < 1e-5


@torch.no_grad()
def test_our_own_models_step_by_step_and_from_files(tmp_path: Any) -> None:
    source = ours(hidden=24, eps=1e-3).train()
    made = linearize(source, "gsa", window=4, slots=3)
    assert [type(mixer).__name__ for mixer in made.backbone.mixers] == ["Liger", "MinGRU"] and made.training
    assert made.backbone.mixers[0].base == 500.0 and made.config["eps"] == made.backbone.norm.eps == 1e-3
    together, _ = made(TOKENS)
    state, alone = made.initial_state(2), []
    for token in TOKENS.T:
        logits, state = made.step(token, state)
        alone.append(logits)
    torch.testing.assert_close(torch.stack(alone, 1), together)
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path)(TOKENS)[0], together)


def test_the_random_generator_is_left_alone_and_a_fresh_gate_is_the_only_new_parameter() -> None:
    source = ours()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    linearize(source)
    assert torch.equal(torch.rand(1), expected)
    fresh = linearize(source, gate="fresh")
    assert fresh.state_dict().keys() - source.state_dict().keys() == {"backbone.blocks.0.mixer.to_gate.weight"}
    assert list(added_parameters(fresh)) == ["backbone.blocks.0.mixer.to_gate.weight"]


def test_what_a_conversion_adds() -> None:
    source = ours()
    assert not added_parameters(linearize(source)) and not added_parameters(source)
    mixer = "backbone.blocks.0.mixer"
    features = {f"{mixer}.query_features", f"{mixer}.key_features"}
    learned = linearize(source, features="learned")
    assert set(added_parameters(learned)) == features and "features='learned'" in str(learned.backbone.plan)
    assert set(added_parameters(linearize(source, "lolcats"))) == features | {f"{mixer}.window_factor"}
    add_lora(learned)
    assert set(added_parameters(learned)) == features  # an adapter is no part of the conversion
    with pytest.raises(ConfigurationError, match="hgrn2 has no feature map"):
        linearize(source, "hgrn2", features="learned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "have biases"),
        ({"hidden_act": "gelu"}, "'gelu', not silu"),
        ({"head_dim": 16}, "4 heads of width 16 are not its d_model 32"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, r"scaled \('linear'\)"),
    ],
)
def test_what_cannot_be_converted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        linearize(llama(**options))


def test_errors() -> None:
    with pytest.raises(ConfigurationError, match="no attention to linearize in the plan 'min_gru"):
        linearize(ours("min_gru"))
    adapted = ours()
    add_lora(adapted)
    with pytest.raises(ConfigurationError, match="merge_lora"):
        linearize(adapted)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=300))
    with pytest.raises(ConfigurationError, match="its family is 'gpt2', not one of llama, mistral"):
        linearize(gpt)
