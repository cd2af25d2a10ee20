"""Writing and reading files so that nothing is lost and nothing is executed.

Tensors are safetensors, the rest is JSON; both are written to a temporary file beside the target, flushed to
the disk and renamed over it. Whoever reads sees the old file or the new one, never half of one: also when
the disk is full or the process is killed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostinato.errors import CheckpointError

FORMAT_VERSION = 1
"""Raised when a change makes older versions of the package unable to read what this one writes."""


COMPLEX = "complex"
"""The note in a tensor file's metadata that lists the tensors which are pairs of reals."""


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the same folder, then rename that file to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: str | Path) -> Any:
    """Read JSON; raises `CheckpointError` (not found, not JSON) with the path."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, not a file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to one safetensors file, atomically, with our format version in its metadata.

    Complex tensors are written as pairs of reals (the format knows no complex128), and their names noted.
    Tensors that share memory are written each for itself. Raises `OSError` when the disk does not take them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    complex_names = [name for name, tensor in tensors.items() if tensor.is_complex()]
    content, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg()
        plain = (torch.view_as_real(plain) if plain.is_complex() else plain).cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        content[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    notes = {"format": "ostinato", "version": str(FORMAT_VERSION), **metadata}
    if complex_names:
        notes[COMPLEX] = json.dumps(complex_names)

    def write(temporary: Path) -> None:
        try:
            save_file(content, temporary, metadata=notes)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    write_atomically(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of `write_tensors`.

    Raises `CheckpointError` when it is missing, cut short, not safetensors, not ours, or newer than we are.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            check_version(path, metadata.get("format"), metadata.get("version"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    for name in json.loads(metadata.pop(COMPLEX, "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    return tensors, metadata


def check_version(path: str | Path, format: Any, version: Any) -> None:
    """Raise `CheckpointError` unless the file says that it is ours and not newer than this package."""
    if format != "ostinato":
        raise CheckpointError(f"{path} was not written by Ostinato (its format says {format!r})")
    if not str(version).isdecimal():
        raise CheckpointError(f"{path} has no readable format version (it says {version!r})")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this package reads up to {FORMAT_VERSION}: update ostinato"
        )
