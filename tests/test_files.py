"""Files: whole or not at all, and a clear word about what is not ours."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ostinato import files
from ostinato.errors import CheckpointError


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"name": "Ouvertüre", "steps": [1, 2.5, None]}
    files.write_json(tmp_path / "new" / "a.json", content)
    assert files.read_json(tmp_path / "new" / "a.json") == content
    assert "Ouvertüre" in (tmp_path / "new" / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"{half", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"", "not valid")],
)
def test_what_is_not_json_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        files.read_json(tmp_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        files.read_tensors(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128]
)
def test_tensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(3, 4).mul(10).to(dtype)
    tensors = {"plain": value, "turned": value.T, "none": value[:0], "part": value[1]}
    files.write_tensors(tmp_path / "t", tensors, {"kind": "test"})
    found, metadata = files.read_tensors(tmp_path / "t")
    assert metadata == {"format": "ostinato", "version": str(files.FORMAT_VERSION), "kind": "test"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor)


def test_gradients_are_not_written(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "t", {"w": torch.ones(2, requires_grad=True)}, {})
    assert not files.read_tensors(tmp_path / "t")[0]["w"].requires_grad


@pytest.mark.parametrize("size", [0, 4, 8, 100, 1000])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "t"
    files.write_tensors(path, {"w": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        files.read_tensors(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        files.read_tensors(tmp_path / "pickle")
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not written by Ostinato"):
        files.read_tensors(tmp_path / "other")


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(files, "FORMAT_VERSION", 7)
        files.write_tensors(tmp_path / "t", {"w": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"version 7, this package reads up to 1: update ostinato"):
        files.read_tensors(tmp_path / "t")


@pytest.mark.parametrize("version", [None, "", "1.0", "²", "-1", True])
def test_a_version_that_cannot_be_read_is_said(version: object) -> None:
    with pytest.raises(CheckpointError, match="no readable format version"):
        files.check_version("a file", "ostinato", version)
    files.check_version("a file", "ostinato", "1")
    files.check_version("a file", "ostinato", 1)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    files.write_tensors(path, {"w": torch.ones(2)}, {})
    files.write_json(tmp_path / "a.json", {"old": True})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(path, {"w": torch.zeros(2)}, {})
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "a.json", {"old": False})
    assert torch.equal(files.read_tensors(path)[0]["w"], torch.ones(2))
    assert files.read_json(tmp_path / "a.json") == {"old": True}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "t"]


def test_a_disk_that_fills_while_writing_is_an_os_error(tmp_path: Path) -> None:
    # The limit on a file's size stands in for the disk's; it holds for the whole process, hence one of its own.
    pytest.importorskip("resource")
    script = """
import resource, sys, torch
from ostinato import files
files.write_tensors(sys.argv[1], {"w": torch.ones(2)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write_tensors(sys.argv[1], {"w": torch.ones(100_000)}, {})
except OSError as error:
    print("refused:", error)
print(files.read_tensors(sys.argv[1])[0]["w"].tolist())
"""
    path = tmp_path / "t"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert f"refused: {path} could not be written" in done.stdout
    assert done.stdout.endswith("[1.0, 1.0]\n") and os.listdir(tmp_path) == ["t"]


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "a", broken)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"not json": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_json(tmp_path / "ours", json.loads("{}"))
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
