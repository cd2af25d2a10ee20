"""`ostinato linearize`: a run and a Llama folder become models that generate; what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ostinato.cli.app import app
from ostinato.models.language import LanguageModel

TEXT = "".join(f"The {i} brown foxes jump over {i * i % 97} lazy dogs and sing.\n" for i in range(120))


def ostinato(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["linearize", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    LanguageModel(d_model=16, plan="attention(heads=2), min_gru", depth=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_converted(model: Path, tmp_path: Path) -> None:
    ostinato(model, "--out", tmp_path / "made", "--recurrence", "gsa", "--slots", 3, "--window", 8)
    made, source = LanguageModel.from_pretrained(tmp_path / "made"), LanguageModel.from_pretrained(model)
    assert str(made.backbone.plan).startswith("liger(heads=2, window=8, recurrence='gsa'")
    assert made.num_parameters() == source.num_parameters()
    assert len(list(made.stream("The", max_tokens=4, seed=0).tokens)) <= 4


def test_it_is_adapted_to_a_text_and_merged(model: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    result = ostinato(
        *(model, "--out", tmp_path / "made", "--text", book, "--steps", 3, "--batch", 2, "--length", 16, "--rank", 2),
        *("--device", "cpu"),
    )
    assert all(word in result.output for word in ("before", "converted", "after 3 steps of LoRA"))
    made, source = LanguageModel.from_pretrained(tmp_path / "made"), LanguageModel.from_pretrained(model)
    before, after = source.state_dict(), made.state_dict()
    changed = {name for name in before if not bool((before[name] == after[name]).all())}
    assert changed == {f"backbone.blocks.0.mixer.{part}.weight" for part in ("to_query", "to_key", "to_value")}


def test_lolcats_learns_its_features_first(model: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    result = ostinato(
        *(model, "--out", tmp_path / "made", "--text", book, "--steps", 4, "--batch", 2, "--length", 16, "--rank", 2),
        *("--device", "cpu", "--recurrence", "lolcats", "--window", 4),
    )
    assert "attention transfer" in result.output and "after 2 steps" in result.output
    made = LanguageModel.from_pretrained(tmp_path / "made")
    features = made.state_dict()["backbone.blocks.0.mixer.key_features"]
    assert not (features == features.new_ones(8).diag()).all()


@pytest.mark.parametrize(("rank", "learned"), [(2, "of LoRA"), (0, "of every weight")])
def test_controls_learn_what_they_add(model: Path, tmp_path: Path, rank: int, learned: str) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    result = ostinato(
        *(model, "--out", tmp_path / "made", "--text", book, "--steps", 3, "--batch", 2, "--length", 16),
        *("--rank", rank, "--device", "cpu", "--features", "learned", "--gate", "fresh", "--window", 4),
    )
    assert f"after 3 steps {learned}" in result.output
    after = LanguageModel.from_pretrained(tmp_path / "made").state_dict()
    before = LanguageModel.from_pretrained(model).state_dict()
    assert not torch.equal(after["backbone.blocks.0.mixer.key_features"], torch.eye(8).expand(2, 8, 8))
    assert after["backbone.blocks.0.mixer.to_gate.weight"].shape == (16, 16)
    embedded = "embedding.weight"
    assert torch.equal(after[embedded], before[embedded]) == (rank > 0)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    words = tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>")
    fast.save_pretrained(tmp_path / "llama")
    ostinato(tmp_path / "llama", "--out", tmp_path / "made", "--recurrence", "none", "--window", 4)
    made = LanguageModel.from_pretrained(tmp_path / "made")
    assert "attention(heads=2, key_value_heads=2, base=10000.0, window=4)" in str(made.backbone.plan)
    assert made.vocab_size == 40 and made.tokenizer.vocab_size == 3


def test_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(9))
    result = ostinato(tmp_path / "broken.gguf", "--out", tmp_path / "made", code=2)
    assert "damaged or cut off" in result.output.replace("\n", " ")
    assert "there is no file" in ostinato("none.gguf", "--out", tmp_path / "made", code=2).output


def test_what_it_refuses(model: Path, tmp_path: Path) -> None:
    assert "need a text" in ostinato(model, "--steps", 3, "--out", tmp_path / "made", code=2).output
    assert "is not empty" in ostinato(model, "--out", model, code=2).output
    assert "one of gla, hgrn2, gsa" in ostinato(
        model, "--recurrence", "lstm", "--out", tmp_path / "made", code=2
    ).output.replace("\n", " ")
    assert "must not be negative" in ostinato(model, "--rank", -1, "--out", tmp_path / "made", code=2).output
    assert "one of softmax, learned" in ostinato(
        model, "--features", "exp", "--out", tmp_path / "made", code=2
    ).output.replace("\n", " ")
    assert not (tmp_path / "made").exists()
