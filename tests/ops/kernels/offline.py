"""Compiling kernels for a card that is not there (an H100): for processes of their own, which tests start."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ostinato.ops.kernels.triton as package
from ostinato.ops.kernels.triton import launch

events: list[tuple[str, str]] = []
"""What was loaded and launched, by name."""


class Utils:
    """What Triton asks a card."""

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        events.append(("loaded", name))
        return 1, 0, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver:
    """A card that launches nothing."""

    utils = Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: events.append(("launched", metadata.name))


def start() -> None:
    """From here on, tensors of the processor are taken for some of an H100."""
    driver.set_active(Driver())
    list(_modules())  # They choose, as they are imported, between a card and the interpreter.
    launch.INTERPRETED = True
    launch.card = lambda _: launch.Card(132, 232448, (9, 0))


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{info.name}")


def compiled() -> Iterator[tuple[str, Any]]:
    """The kernels that were compiled so far, by name."""
    for module in _modules():
        for name, function in vars(module).items():
            if isinstance(function, JITFunction) and function.__module__ == module.__name__:
                for cached, *_ in function.device_caches.values():
                    for kernel in cached.values():
                        yield name, kernel
