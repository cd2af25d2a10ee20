from __future__ import annotations

import gzip
import lzma
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ostinato.errors import ConfigurationError, DataError, UnknownNameError
from ostinato.tasks.baselines import gzip_bits_per_byte, xz_bits_per_byte
from ostinato.tasks.text import Text, read_corpus


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(33, 123, 1000).tolist()))
    return path


def test_the_last_tenth_is_held_out(book: Path) -> None:
    task = Text(files=(str(book),), window=16)
    assert task.train_bytes + task.test_bytes == book.read_bytes()
    assert len(task.test_bytes) == 100


def test_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b.txt", "a.txt")]
    for path in paths:
        path.write_text(path.name * 20)
    task = Text(files=tuple(map(str, paths)), window=8)
    assert task.train_bytes + task.test_bytes == b"b.txt" * 20 + b"a.txt" * 20


def test_rows_read_on_in_a_circle(book: Path) -> None:
    task = Text(files=(str(book),), window=64)
    text = task.train_bytes
    starts, ends = [], []
    read: list[list[int]] = [[], [], []]
    for step, batch in enumerate(islice(task.train_batches(3, seed=5), 16)):
        for row in range(3):
            for t in range(64):
                token, target = int(batch.inputs[row, t]), int(batch.targets[row, t])
                again = batch.reset is not None and bool(batch.reset[row, t])
                if step == t == 0:
                    starts.append(row)
                if again:
                    read[row].append(-1)
                read[row].append(token)
                if not batch.mask[row, t]:
                    ends.append((row, len(read[row])))
                else:
                    following = task.train_batch((step * 64 + t + 1) // 64, 3, 5)
                    assert target == int(following.inputs[row, (t + 1) % 64])
    for row in range(3):
        # One circle of 900 is closed once in 1024 steps: the marker stands where the text begins.
        assert read[row].count(-1) == 1
        at = read[row].index(-1)
        assert bytes(read[row][at + 1 :]) == text[: len(read[row]) - at - 1]
        assert bytes(read[row][:at]) == text[len(text) - at :]
    assert len(ends) == 3


def test_rows_start_far_apart(book: Path) -> None:
    task = Text(files=(str(book),), window=8)
    text = task.train_bytes + task.train_bytes
    batch = task.train_batch(0, 4, seed=1)
    found = [text.index(bytes(row)) for row in batch.inputs.tolist()]
    gaps = np.diff(sorted(found))
    assert (gaps >= 100).all()


def test_random_windows(book: Path) -> None:
    task = Text(files=(str(book),), window=32, carry=False)
    assert not task.carries_state and Text(files=(str(book),), window=32).carries_state
    batch = task.train_batch(4, 8, seed=0)
    assert batch.reset is None and batch.mask.all()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert bytes([*inputs, targets[-1]]) in task.train_bytes and inputs[1:] == targets[:-1]


@pytest.mark.parametrize(("rows", "window"), [(1, 7), (3, 16), (16, 128), (7, 15), (100, 4), (1000, 4), (51, 1)])
def test_every_held_out_byte_is_predicted_once(book: Path, rows: int, window: int) -> None:
    task = Text(files=(str(book),), window=window, test_rows=rows)
    stripes: list[bytes] = []
    questions: list[bytes] = []
    for index, batch in enumerate(task.test_batches()):
        for row in range(batch.inputs.shape[0]):
            if index == 0:
                stripes.append(b"")
                questions.append(b"")
            stripes[row] += bytes(batch.targets[row][batch.mask[row]].tolist())
            questions[row] += bytes(batch.inputs[row][batch.mask[row]].tolist())
    assert b"".join(stripes) == task.test_bytes
    assert b"".join(questions) == (task.train_bytes[-1:] + task.test_bytes)[:-1]


def test_pieces_of_the_held_out_text(book: Path) -> None:
    task = Text(files=(str(book),), window=16, held_out=0.3)
    held = list(task.test_bytes)
    batches = list(task.pieces(40, 7, rows=4))
    inputs = torch.cat([batch.inputs for batch in batches])
    assert max(len(batch.inputs) for batch in batches) == 4 and bool(batches[-1].mask.all())
    starts = range(0, len(held) - 40, 7)
    assert inputs.tolist() == [held[start : start + 40] for start in starts]
    assert torch.cat([batch.targets for batch in batches]).tolist() == [held[i + 1 : i + 41] for i in starts]
    with pytest.raises(DataError, match="ask for less"):
        next(task.pieces(len(held), 1))
    with pytest.raises(ConfigurationError, match="positive"):
        next(task.pieces(8, 0))


def test_bits_per_byte_of_guessing_is_eight(book: Path) -> None:
    task = Text(files=(str(book),), window=16)
    tallies = [task.score(torch.zeros(*b.inputs.shape, 256), b)["bits_per_byte"] for b in task.test_batches()]
    assert sum(total for total, _ in tallies) == pytest.approx(8 * 100, rel=1e-5)
    assert sum(count for _, count in tallies) == 100


class Pairs:
    """Two characters a token."""

    vocab_size = 128 * 128
    name = "pairs"

    def encode(self, text: str) -> list[int]:
        return [ord(a) * 128 + ord(b) for a, b in zip(text[::2], text[1::2], strict=False)]


def test_bits_per_byte_with_a_tokenizer(book: Path) -> None:
    task = Text(files=(str(book),), window=16, tokenizer=Pairs())
    tallies = []
    for batch in task.test_batches():
        tallies.append(task.score(torch.zeros(*batch.inputs.shape, 128 * 128), batch)["bits_per_byte"])
    # Guessing one of 2^14 tokens for two bytes is seven bits a byte.
    assert sum(t for t, _ in tallies) / sum(c for _, c in tallies) == pytest.approx(7, rel=1e-5)
    assert sum(c for _, c in tallies) == pytest.approx(100)
    assert task.vocab_size == 16384 and task.train_batch(0, 2, 0).inputs.max() > 255


def test_baselines_are_measured_on_the_held_out_text() -> None:
    task = Text(corpus="pydoc", max_bytes=60000)
    found = task.baselines()
    assert list(found) == ["byte frequencies", "3-gram", "gzip", "xz"]
    assert 4 < found["byte frequencies"] < 5.5
    assert 1.5 < found["3-gram"] < 3.5 and 1.5 < found["gzip"] < 4 and 1.5 < found["xz"] < 4


def test_compressors_by_their_definition() -> None:
    context, text = read_corpus("pydoc")[:20000], read_corpus("pydoc")[20000:25000]
    both, alone = (len(gzip.compress(data, 9, mtime=0)) for data in (context + text, context))
    assert gzip_bits_per_byte(context, text) == 8 * (both - alone) / 5000
    preset = 9 | lzma.PRESET_EXTREME
    both, alone = (len(lzma.compress(data, preset=preset)) for data in (context + text, context))
    assert xz_bits_per_byte(context, text) == 8 * (both - alone) / 5000


def test_pydoc_is_english() -> None:
    text = read_corpus("pydoc")
    assert len(text) > 300_000 and b" the " in text and text.decode("utf-8")


def test_fingerprint_follows_the_content(tmp_path: Path, book: Path) -> None:
    moved = tmp_path / "moved.txt"
    moved.write_bytes(book.read_bytes())
    changed = tmp_path / "changed.txt"
    changed.write_bytes(book.read_bytes()[:-1] + b"!")
    one, two, three = (Text(files=(str(path),), window=8).fingerprint() for path in (book, moved, changed))
    assert one == two != three
    assert Text(files=(str(book),), window=9).fingerprint() != one


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*missing\.txt"):
        Text(files=(str(tmp_path / "missing.txt"),))
    with pytest.raises(DataError, match="cannot read"):
        Text(files=(str(tmp_path),))


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="is empty"):
        Text(files=(str(tmp_path / "empty"),))


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"ab\0cd" * 99, "NUL byte at offset 2"), (b"abc\xff" * 99, "not UTF-8 text.*offset 3")]
)
def test_binary_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint + ".*binary=True"):
        Text(files=(str(path),), window=8)
    task = Text(files=(str(path),), window=8, binary=True)
    assert task.train_bytes + task.test_bytes == content
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        Text(files=(str(path),), binary=True, tokenizer=Pairs())


def test_shorter_than_one_window(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * 40)
    with pytest.raises(DataError, match=r"less than one\s+window of 36"):
        Text(files=(str(path),), window=36)
    task = Text(files=(str(path),), window=35)
    assert task.train_batch(0, 2, 0).inputs.shape == (2, 35)


def test_unknown_corpus() -> None:
    with pytest.raises(UnknownNameError, match="'pydoc'"):
        Text(corpus="pydocs")


@pytest.mark.parametrize("options", [{"window": 0}, {"held_out": 1.0}, {"test_rows": 0}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        Text(**options)


def test_text_cut_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "accents.txt"
    path.write_text("é" * 501, encoding="utf-8")

    class Characters(Pairs):
        vocab_size = 1000

        def encode(self, text: str) -> list[int]:
            return [ord(character) for character in text]

    task = Text(files=(str(path),), window=8, tokenizer=Characters(), held_out=0.0995)
    assert math.isclose(len(task.train_bytes) + len(task.test_bytes), 1002)
    assert set(task.train_batch(0, 2, 0).inputs.flatten().tolist()) == {ord("é")}
