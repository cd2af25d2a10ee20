"""What `train`, `generate` and `compare` share: the folders of runs, and options written as NAME=VALUE."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ostinato.errors import CheckpointError, ConfigurationError


def model_folder(run: Path) -> Path:
    """The folder with the newest model of a run, or the folder itself if it is that of a saved model.

    Raises `CheckpointError` for a folder that holds neither.
    """
    from ostinato.training.checkpoints import last_checkpoint

    if not run.exists():
        raise CheckpointError(f"there is no folder {run}; `ostinato train FILE --out {run}` makes one")
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        return checkpoint / "model"
    if (run / "config.json").is_file():
        return run
    raise CheckpointError(f"{run} holds no model of Ostinato: neither checkpoints nor a config.json")


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """["group=A5", "length=64"] as a dictionary; values are Python literals, or else text."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigurationError(f"an option is written NAME=VALUE, got {pair!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        options[name.strip()] = value
    return options


def split_names(text: str) -> list[str]:
    """ "a, b(heads=2, x=1), c" as a list; commas inside brackets do not separate."""
    names, depth, current = [], 0, ""
    for symbol in text:
        depth += (symbol in "([") - (symbol in ")]")
        if symbol == "," and depth == 0:
            names.append(current.strip())
            current = ""
        else:
            current += symbol
    names.append(current.strip())
    return [name for name in names if name]
