"""Tokenizers: bytes, and a Hugging Face tokenizer made on the spot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ostinato import LanguageModel
from ostinato.errors import ConfigurationError, DataError
from ostinato.models.tokenizers import get_tokenizer

TEXT = "Grüße aus dem → Norden, 🎵 and the rest of the words of the world.\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level BPE tokenizer in a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the words of the world and the rest"] * 4, trainer)
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>").save_pretrained(folder)
    return folder


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_and_back(text: str) -> None:
    tokenizer = get_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    decoder = tokenizer.decoder()
    pieces = [decoder.feed(token) for token in tokens]
    assert "".join(pieces) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_what_is_no_text() -> None:
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode("a\udcff")


def test_a_pretrained_tokenizer_and_back(trained: str) -> None:
    tokenizer = get_tokenizer(trained)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.name == trained and tokenizer.vocab_size > 256
    assert len(tokens) < len(TEXT.encode()) and tokenizer.end == tokenizer.start == 0
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.decode([*tokens, 0]) == TEXT


def test_a_pretrained_tokenizer_streams_whole_characters(trained: str) -> None:
    tokenizer = get_tokenizer(trained)
    decoder = tokenizer.decoder()
    pieces = [decoder.feed(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # The note takes several tokens.


def test_a_language_model_over_a_pretrained_tokenizer(trained: str, tmp_path: Path) -> None:
    model = LanguageModel(d_model=16, plan="min_gru", depth=1, tokenizer=trained).eval()
    assert model.vocab_size == model.tokenizer.vocab_size > 256
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    texts = [m.stream("the words", seed=3, max_tokens=20).read() for m in (model, again)]
    assert texts[0] == texts[1] != ""
    torch.testing.assert_close(model.read(TEXT), again.read(TEXT))


def test_no_such_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        get_tokenizer(str(tmp_path / "nowhere"))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'ostinato\[tokenizers\]'"):
        get_tokenizer("gpt2")


def test_transformers_is_not_imported_for_bytes() -> None:
    code = (
        "import sys; from ostinato import LanguageModel; LanguageModel(d_model=8, plan='min_gru', depth=1).read('a');"
        "assert not {'transformers', 'accelerate', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
