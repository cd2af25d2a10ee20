"""Ostinato: every recurrence behind one interface, trained in parallel, streamed in constant memory.

    model = ostinato.LanguageModel(d_model=256, plan="gated_delta_net*3, attention(window=128)", depth=4)
    ostinato.fit(model, ostinato.task("text", files=["book.txt"]), steps=1000)
    state = model.read("Call me Ishmael.")
    for piece in model.stream(" Some years ago", state=state):
        print(piece, end="")

Names are imported when first used: `import ostinato` costs nothing, not even PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ostinato._version import __version__

if TYPE_CHECKING:
    from ostinato import errors as errors
    from ostinato import ops as ops
    from ostinato import state as state
    from ostinato.mixers.base import Mixer as Mixer
    from ostinato.mixers.base import Traits as Traits
    from ostinato.mixers.registry import mixer as mixer
    from ostinato.mixers.registry import register as register
    from ostinato.mixers.registry import unregister as unregister
    from ostinato.models.backbone import Backbone as Backbone
    from ostinato.models.language import LanguageModel as LanguageModel
    from ostinato.ops.routes import backend as backend
    from ostinato.tasks.registry import task as task
    from ostinato.training.fit import fit as fit

_HOME = {
    "Backbone": "models.backbone",
    "LanguageModel": "models.language",
    "Mixer": "mixers.base",
    "Traits": "mixers.base",
    "backend": "ops.routes",
    "fit": "training.fit",
    "mixer": "mixers.registry",
    "register": "mixers.registry",
    "task": "tasks.registry",
    "unregister": "mixers.registry",
}
_MODULES = ("errors", "ops", "state", "testing")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"ostinato.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"ostinato.{name}")
    else:
        raise AttributeError(f"module 'ostinato' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
