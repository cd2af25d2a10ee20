"""Compiled kernels, one package per backend: `kernels/triton/`, `kernels/native/`, …

A backend's package registers its routes with the engines when it is imported, so that an engine never names
it. It must import in milliseconds: what it registers are functions that import the compiler and the
kernels when they are first called, and `refuses` functions that say what they cannot do.
"""

from importlib import import_module
from pkgutil import iter_modules


def load() -> None:
    """Import every backend that is there."""
    for package in iter_modules(__path__):
        import_module(f"{__name__}.{package.name}")
