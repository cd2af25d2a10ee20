"""The tasks by name. Adding one is one line in `_BUILT_IN`."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.tasks.base import Task

# name -> "module:class", imported when first asked for.
_BUILT_IN = {
    "context_recall": "mad:ContextRecall",
    "copying": "copying:Copying",
    "counter_language": "counters:CounterLanguage",
    "cycle_navigation": "languages:CycleNavigation",
    "delayed_cue": "delayed_cue:DelayedCue",
    "digits": "digits:Digits",
    "dyck": "dyck:Dyck",
    "even_pairs": "languages:EvenPairs",
    "fuzzy_recall": "mad:FuzzyRecall",
    "in_context_copying": "in_context_copying:InContextCopying",
    "induction": "recall:Induction",
    "lookup": "in_context_copying:Lookup",
    "modular_arithmetic": "arithmetic:ModularArithmetic",
    "modular_arithmetic_brackets": "arithmetic:ModularArithmeticBrackets",
    "modular_counting": "arithmetic:ModularCounting",
    "masked_text": "masked_text:MaskedText",
    "memorization": "mad:Memorization",
    "mqar": "recall:MultiQueryRecall",
    "multi_hop": "multi_hop:MultiHop",
    "needle": "needle:Needle",
    "parity": "arithmetic:Parity",
    "passkey": "passkey:Passkey",
    "recall_stream": "recall_stream:RecallStream",
    "regbench": "regbench:RegBench",
    "regular_language": "regular:RegularLanguage",
    "selectivbench": "selectivity:SelectivBench",
    "selective_copying": "copying:SelectiveCopying",
    "set_disjointness": "set_disjointness:SetDisjointness",
    "shuffle_dyck": "dyck:ShuffleDyck",
    "text": "text:Text",
    "word_problem": "groups:WordProblem",
}


def tasks() -> list[str]:
    """The names of all tasks, in alphabetical order."""
    return sorted(_BUILT_IN)


def task_class(name: str) -> type[Task]:
    """The class of a name; raises `UnknownNameError`, which names the nearest."""
    if name not in _BUILT_IN:
        raise UnknownNameError("task", name, tasks())
    module, _, attribute = _BUILT_IN[name].partition(":")
    return getattr(import_module(f"ostinato.tasks.{module}"), attribute)


def task(name: str, **options: Any) -> Task:
    """Build a task by name: `task("text", files=["book.txt"])`, `task("word_problem", group="A5")`.

    Raises `UnknownNameError` for the name, `ConfigurationError` for an option that the task lacks or a value out
    of its range, `DataError` for files that cannot be used.
    """
    cls = task_class(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for option in options:
        if option not in known:
            raise ConfigurationError(f"{name} has no option {option!r}; it has {', '.join(known)}")
    return cls(**options)
