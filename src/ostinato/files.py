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

from torch import Tensor

from ostinato.errors import CheckpointError

FORMAT_VERSION = 1
"""Raised when a change makes older versions of the package unable to read what this one writes."""


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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to one safetensors file, atomically, with our format version in its metadata."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    notes = {"format": "ostinato", "version": str(FORMAT_VERSION), **metadata}
    write_atomically(path, lambda temporary: save_file(content, temporary, metadata=notes))


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
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error


def check_version(path: str | Path, format: Any, version: Any) -> None:
    """Raise `CheckpointError` unless the file says that it is ours and not newer than this package."""
    if format != "ostinato":
        raise CheckpointError(f"{path} was not written by Ostinato (its format says {format!r})")
    if not str(version).isdigit():
        raise CheckpointError(f"{path} has no readable format version (it says {version!r})")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this package reads up to {FORMAT_VERSION}: update ostinato"
        )
