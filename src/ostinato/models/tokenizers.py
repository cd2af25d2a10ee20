"""Tokenizers: text to token ids and back, also piece by piece as a stream needs it.

Bytes are the default and need nothing. Any Hugging Face tokenizer can be named instead ("gpt2", or a folder), or a GGUF
file for its own; `transformers`, or `gguf`, is imported only then.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

from ostinato.errors import ConfigurationError, DataError
from ostinato.models.gguf import GGUFTokenizer, is_gguf


class Decoder(Protocol):
    """Turns token ids into text one at a time, never in the middle of a character."""

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...


class Tokenizer(Protocol):
    """What a language model asks of a tokenizer."""

    name: str
    """What `get_tokenizer` makes the same tokenizer from; kept in checkpoints."""
    vocab_size: int
    start: int
    """The token that an empty prompt stands for."""
    end: int | None
    """The token at which a stream ends, if there is one."""
    divisible: bool
    """Whether a text may be cut anywhere and its pieces encoded by themselves."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids, without special tokens."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Token ids to text; what is no text becomes U+FFFD."""
        ...

    def decoder(self) -> Decoder:
        """A new incremental decoder."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: 256 tokens, any text, nothing to learn. A stream from nothing starts after a newline."""

    name = "bytes"
    vocab_size = 256
    start = ord("\n")
    end: int | None = None
    divisible = True

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text; raises `DataError` for unpaired surrogates, which have none."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise DataError(f"this text cannot be written as UTF-8: {error}") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these bytes; invalid ones become U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def decoder(self) -> ByteDecoder:
        """A new incremental decoder."""
        return ByteDecoder()


class ByteDecoder:
    """UTF-8 byte by byte: an incomplete character is held back, an invalid byte becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this byte completes."""
        return self._decoder.decode(bytes([token]))


class PretrainedTokenizer:
    """A Hugging Face tokenizer, by the name or path that `AutoTokenizer.from_pretrained` takes."""

    divisible = False

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConfigurationError(
                f"the tokenizer {name!r} needs the package transformers: pip install 'ostinato[tokenizers]', "
                "or use tokenizer='bytes'"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"there is no tokenizer {name!r}, here or on the Hugging Face hub ('bytes' needs neither): {error}"
            ) from error
        self.name = name
        self.vocab_size = len(self._tokenizer)
        self.end: int | None = self._tokenizer.eos_token_id
        begin = self._tokenizer.bos_token_id
        self.start: int = begin if begin is not None else self.end if self.end is not None else 0

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens, special ones left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decoder(self) -> PretrainedDecoder:
        """A new incremental decoder."""
        return PretrainedDecoder(self)


class PretrainedDecoder:
    """Subwords one at a time.

    A token's text may depend on the one before it (leading spaces, split characters), so a short tail of
    tokens is decoded with and without the new ones, and the difference is what the new ones say.
    """

    def __init__(self, tokenizer: PretrainedTokenizer | GGUFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while it ends inside a character."""
        self._waiting.append(token)
        before = self._tokenizer.decode(self._said)
        after = self._tokenizer.decode(self._said + self._waiting)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._said, self._waiting = self._waiting, []
        return after[len(before) :]


def get_tokenizer(name: str) -> Tokenizer:
    """ "bytes", that of a GGUF file by its path or by "smollm2", or a Hugging Face tokenizer by name or path.

    Raises `ConfigurationError` if there is no such tokenizer or a package is missing, `CheckpointError` if the GGUF
    file is not there or damaged.
    """
    if name == "bytes":
        return ByteTokenizer()
    return GGUFTokenizer(name) if is_gguf(name) else PretrainedTokenizer(name)
