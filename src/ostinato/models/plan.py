"""Plans: which mixers a network is made of, as a plain string.

    gated_delta_net*3, attention(window=64, heads=2)

is three layers of the first mixer and one of the second, repeated to the depth asked. The grammar:

    plan    = layer ("," layer)*
    layer   = name [ "(" [ option ("," option)* ] ")" ] [ "*" count ]
    option  = name "=" value
    value   = number | True | False | None | "text" | 'text' | bare_word

A bare word is text, so that quotes need no escaping on a command line: `mlstm(gate=sigmoid)`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NoReturn

from ostinato.errors import ConfigurationError, PlanError
from ostinato.mixers.base import Mixer
from ostinato.mixers.registry import mixer, mixer_class

_NAME = re.compile(r"[A-Za-z_]\w*")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?(?![\w.])")
_COUNT = re.compile(r"\d+(?![\w.])")
_QUOTED = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"")
_SPACE = re.compile(r"\s*")
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Layer:
    """One layer of a plan: a mixer's name and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, d_model: int) -> Mixer:
        """The mixer; raises what its constructor raises, and `ConfigurationError` for an unknown option."""
        return mixer(self.name, d_model, **self.options)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Plan:
    """A sequence of layers; `str` writes it so that `parse_plan` reads the same plan back."""

    layers: tuple[Layer, ...]

    def to_depth(self, depth: int | None) -> tuple[Layer, ...]:
        """The layers repeated, and cut, to `depth`; None takes them once.

        Raises `ConfigurationError` for a depth below 1.
        """
        if depth is None:
            return self.layers
        if depth < 1:
            raise ConfigurationError(f"a network needs at least one layer, got depth {depth}")
        return tuple(self.layers[index % len(self.layers)] for index in range(depth))

    def __str__(self) -> str:
        runs = [(layer, len(list(run))) for layer, run in groupby(self.layers)]
        return ", ".join(f"{layer}*{count}" if count > 1 else str(layer) for layer, count in runs)


def parse_plan(text: str | Plan) -> Plan:
    """Read a plan string (a `Plan` passes through).

    Raises:
        PlanError: the string does not parse; the message shows it with a caret under the place.
        UnknownNameError: there is no such mixer; the message names the nearest.
    """
    if isinstance(text, Plan):
        return text
    plan = _Parser(text).plan()
    for layer in plan.layers:
        mixer_class(layer.name)
    return plan


class _Parser:
    """Recursive descent over the grammar above; `place` is the index of the next character."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise PlanError(f"a plan is a string such as 'min_gru*2, attention', got {type(text).__name__}")
        self.text, self.place = text, 0

    def plan(self) -> Plan:
        layers: list[Layer] = []
        while True:
            layer, count = self.layer()
            layers.extend([layer] * count)
            if self.at_end():
                return Plan(tuple(layers))
            self.expect(",", "a comma and the next layer, '*' and a count, or the end")

    def layer(self) -> tuple[Layer, int]:
        name = self.take(_NAME, "the name of a mixer")
        options: dict[str, Any] = {}
        if self.accept("("):
            while not self.accept(")"):
                before = self.place
                key = self.take(_NAME, "the name of an option, or ')'")
                if key in options:
                    self.fail(f"the option {key!r} is given twice", before, found=False)
                self.expect("=", f"'=' after the option {key!r}")
                options[key] = self.value()
                if not self.accept(","):
                    self.expect(")", "',' and another option, or ')'")
                    break
        count = 1
        if self.accept("*"):
            before = self.place
            count = int(self.take(_COUNT, "a count"))
            if count < 1:
                self.fail("a count must be at least 1", before, found=False)
        return Layer(name, options), count

    def value(self) -> Any:
        for pattern in (_QUOTED, _NUMBER):
            if pattern.match(self.text, self.skip()):
                return ast.literal_eval(self.take(pattern, "a value"))
        word = self.take(_NAME, "a value: a number, True, False, None, or text")
        return _CONSTANTS.get(word, word)

    def skip(self) -> int:
        space = _SPACE.match(self.text, self.place)
        self.place = space.end() if space else self.place
        return self.place

    def at_end(self) -> bool:
        return self.skip() == len(self.text)

    def accept(self, symbol: str) -> bool:
        found = self.text.startswith(symbol, self.skip())
        self.place += len(symbol) if found else 0
        return found

    def expect(self, symbol: str, what: str) -> None:
        if not self.accept(symbol):
            self.fail(f"expected {what}", self.place)

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.skip())
        if found is None:
            self.fail(f"expected {what}", self.place)
        self.place = found.end()
        return found.group()

    def fail(self, what: str, place: int, *, found: bool = True) -> NoReturn:
        """Raise, with the line in question and a caret under the place."""
        place += len(self.text[place:]) - len(self.text[place:].lstrip())
        start = self.text.rfind("\n", 0, place) + 1
        line = self.text[start:].split("\n", 1)[0].replace("\t", " ")
        if found:
            what += f", but found {self.text[place]!r}" if place < len(self.text) else ", but found the end"
        raise PlanError(f"this plan does not parse: {what}\n  {line}\n  {' ' * (place - start)}^")
