"""Ostinato: every recurrence behind one interface, trained in parallel, streamed in constant memory."""

from ostinato import state
from ostinato._version import __version__
from ostinato.mixers.base import Mixer
from ostinato.mixers.registry import mixer, mixers, register
from ostinato.ops.routes import backend

__all__ = ["Mixer", "__version__", "backend", "mixer", "mixers", "register", "state"]
