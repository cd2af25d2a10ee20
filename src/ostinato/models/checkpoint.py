"""Checkpoints of models: a folder with `config.json` and `model.safetensors`.

The weights' file carries the configuration too. Each file is replaced atomically, the weights first, and the
configuration in the weights' file is the one that counts: whenever the process dies, the folder holds
either the old model or the new one, whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ostinato.errors import CheckpointError, OstinatoError, UnknownNameError
from ostinato.files import FORMAT_VERSION, check_version, read_json, read_tensors, write_json, write_tensors

KIND = "language model"
CONFIG, WEIGHTS = "config.json", "model.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def save(folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a model's configuration and weights to a folder, which is made if it is not there.

    Raises `OSError` when the disk is full or not writable; the folder's old checkpoint is then still whole.
    """
    folder = Path(folder)
    text = json.dumps(dict(config))
    write_tensors(folder / WEIGHTS, weights, {"kind": KIND, "config": text})
    write_json(folder / CONFIG, {"format": "ostinato", "version": FORMAT_VERSION, "kind": KIND, **config})


def load(folder: str | Path, build: Callable[..., Model]) -> Model:
    """Build a model from a folder's configuration, `build(**config)`, and put the folder's weights into it.

    The global random generator is left as it was. Raises `CheckpointError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    note = read_json(folder / CONFIG)
    if not isinstance(note, dict):
        raise CheckpointError(f"{folder / CONFIG} was not written by Ostinato: it holds a {type(note).__name__}")
    check_version(folder / CONFIG, note.get("format"), note.get("version"))
    weights, metadata = read_tensors(folder / WEIGHTS)
    if metadata.get("kind") != KIND or "config" not in metadata:
        raise CheckpointError(f"{folder / WEIGHTS} holds {metadata.get('kind', 'something else')}, not a {KIND}")
    model = _build(folder, build, metadata["config"])
    _fill(folder, model, weights)
    return model


def _build(folder: Path, build: Callable[..., Model], text: str) -> Model:
    try:
        config = json.loads(text)
        with torch.random.fork_rng(devices=[]):
            return build(**config)
    except UnknownNameError as error:
        raise CheckpointError(
            f"{folder} is a model with a part that is not known here: {error}; if it is a mixer of your own, "
            "call ostinato.register(name, class) before loading"
        ) from error
    except (json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"the configuration of {folder} is damaged: {error}") from error
    except OstinatoError as error:
        raise CheckpointError(f"the model in {folder} cannot be built: {error}") from error


def _fill(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or foreign or wrong:
        complaints = [f"{name} is missing" for name in missing] + [f"{name} is not known" for name in foreign] + wrong
        more = f" and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise CheckpointError(f"the weights in {folder} do not fit its model: {'; '.join(complaints[:5])}{more}")
    # assign: the parameters take the type that they were saved in. clone: a file's tensors may lie anywhere in
    # memory, and matrix products round differently where they are not aligned.
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
