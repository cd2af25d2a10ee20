"""Checkpoints of a run: whole folders that appear at once, with nothing pickled in them.

    run/checkpoints/
      last.json                 names the newest
      step-00000200/
        checkpoint.json         step, task, settings, sizes and digests of the other files
        model/                  what `save_pretrained` wrote (config.json, model.safetensors)
        optimizer.safetensors   the optimiser's tensors, by parameter name
        random.safetensors      the generators' states
        state.safetensors       the states carried between windows, if any

A folder is written under another name, flushed and renamed, then `last.json` is replaced, then old ones go. A
process killed at any moment, or a full disk, leaves the one before whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import CheckpointError
from ostinato.files import FORMAT_VERSION, check_version, read_json, read_tensors, write_json, write_tensors

_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    directory: Path, step: int, notes: dict[str, Any], write: Callable[[Path], None], keep: int
) -> Path:
    """Make the folder of a step from what `write` puts into it, and let the `keep` newest stay.

    Raises `CheckpointError` when it cannot be written (a full disk, say); what was there before is untouched.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".step-{step:08d}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # What a run that was killed in the middle of a save left behind: a folder, or the file beside them.
        for left_over in (*directory.glob(".step-*.part"), *directory.glob(".last.json.*.part")):
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                left_over.unlink(missing_ok=True)
        temporary.mkdir()
        write(temporary)
        files = {str(path.relative_to(temporary)): _digest(path) for path in temporary.rglob("*") if path.is_file()}
        header = {"format": "ostinato", "version": FORMAT_VERSION, "kind": "training checkpoint", "step": step}
        write_json(temporary / "checkpoint.json", {**header, **notes, "files": files})
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(directory)
        write_json(directory / "last.json", {**header, "directory": final.name})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = last_checkpoint(directory.parent)
        kept = f"the checkpoint before, {before}, is whole" if before else "there is no checkpoint before it"
        raise CheckpointError(f"could not save {final}: {error}; {kept}") from error
    for old in sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None; its folder `model` is one for `from_pretrained`."""
    folder = Path(directory) / "checkpoints"
    if (folder / "last.json").is_file():
        content = read_json(folder / "last.json")
        name = content.get("directory") if isinstance(content, dict) else None
        if isinstance(name, str) and _NAME.fullmatch(name) and (folder / name).is_dir():
            return folder / name
    found = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.is_dir() else []
    return found[-1] if found else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The notes of a checkpoint, after every file in it has been checked against its digest.

    Raises `CheckpointError`: not a checkpoint, damaged, incomplete, or of a newer version.
    """
    notes = read_json(path / "checkpoint.json")
    if not isinstance(notes, dict) or notes.get("kind") != "training checkpoint":
        raise CheckpointError(f"{path} is not a checkpoint of a run")
    check_version(path / "checkpoint.json", notes.get("format"), notes.get("version"))
    if not isinstance(notes.get("files"), dict) or not isinstance(notes.get("step"), int):
        raise CheckpointError(f"{path / 'checkpoint.json'} is damaged: it names no files or no step")
    for name, digest in notes["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if _digest(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged: it is not what was saved")
    return notes


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(directory: Path) -> None:
    """Flush a folder's entries to the disk, where the system has such a thing."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# What goes into the folder.


def write_model(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """The model's own `save_pretrained`, or its weights alone."""
    save: Any = getattr(model, "save_pretrained", None)
    if save is not None:
        save(folder)
        return
    seen: set[int] = set()
    content = {}
    for name, tensor in weights.items():
        # Tied weights share memory, which safetensors refuses: the second is written as a copy.
        content[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    write_tensors(folder / "model.safetensors", content, {"kind": "weights"})


def read_model(folder: Path, model: nn.Module) -> None:
    """Put saved weights into a model; raises `CheckpointError` when they are another model's."""
    weights, _ = read_tensors(folder / "model.safetensors")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds the weights of another model: {error}") from error


def write_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's tensors as "parameter name/key"; its groups must carry "names"."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    write_tensors(path, tensors, {"kind": "optimizer"})


def read_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `write_optimizer` wrote; learning rates are the caller's."""
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != "optimizer":
        raise CheckpointError(f"{path} does not hold an optimiser")
    content = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state: dict[int, dict[str, Tensor]] = {}
    for path_in_file, tensor in tensors.items():
        name, _, key = path_in_file.rpartition("/")
        if name not in names:
            raise CheckpointError(f"{path} is of another model: this one has no parameter {name!r}")
        state.setdefault(names.index(name), {})[key] = tensor
    optimizer.load_state_dict({**content, "state": state})


def write_random(path: Path) -> None:
    """The states of torch's generators."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"kind": "random"})


def read_random(path: Path) -> None:
    """Put the generators back."""
    tensors, _ = read_tensors(path)
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def read_state(path: Path, model: nn.Module) -> Any:
    """The carried state, in the structure of this model's."""
    initial_state: Any = getattr(model, "initial_state", None)
    if initial_state is not None:
        like = initial_state(1)
    else:
        with torch.no_grad():
            _, like = model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), None)
    return ostinato.state.load(path, like)
