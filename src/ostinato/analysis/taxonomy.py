"""A taxonomy of recurrences: what moves the state on, what gates it, and whether its channels meet.

The rows come from the mixers themselves. Words (`transition`, `input_gate`) are what a mixer declares in its `traits`;
what the transition depends on, and whether it mixes channels, is measured on a small instance, so that a declaration
that is not true shows.

Source: the axes of SelectivBench (arXiv 2601.12598), in the reading of the layers' own definitions.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ostinato.state
from ostinato.mixers.base import Mixer
from ostinato.mixers.parts import ShortConvolution
from ostinato.mixers.registry import mixer, mixers

COLUMNS = (
    "mixer",
    "transition",
    "depends on",
    "mixes channels",
    "input gate",
    "output gate",
    "short convolution",
    "state per layer",
    "source",
)

# Leaves of a state that hold past inputs, the stabiliser of an exponential gate, or a running normaliser: not memory.
_NOT_MEMORY = {"window", "convolution", "previous", "maximum", "log_weight"}
# Leaves of complex numbers: a last axis of (real, imaginary), which a rotation may mix.
_COMPLEX = {"hidden", "coordinates"}
# Leaves that count in units of exp(maximum), where a state has a stabiliser.
_STABILIZED = {"memory", "normalizer", "cell"}
# An output gate is a factor on what is read, computed from the layer's input. Theirs is a part of a joint projection
# or of the cell; and S5's `to_gate` sees the output itself.
_GATED_WITHIN = {"mamba", "mamba2", "m2rnn", "lstm", "slstm", "para_lstm"}
_GATED_BY_OUTPUT = {"s5"}


class Transition(NamedTuple):
    """What the Jacobian ∂S_t/∂S_{t−1} of one step is like."""

    identity: bool
    """It is the identity."""
    by_input: bool
    """It depends on the input x_t."""
    by_state: bool
    """It depends on the state: the recurrence is not linear."""
    mixes: bool
    """It is not diagonal (for complex states: as a complex matrix)."""


@torch.no_grad()
def measure_transition(layer: Mixer, *, probes: int = 24, seed: int = 0) -> Transition | None:
    """Look at some columns of ∂S_t/∂S_{t−1}, by central differences in float64, for two inputs and two states.

    Past inputs that a layer keeps (short convolutions, token shifts) do not count as state. None for a layer without a
    memory of fixed size (attention). The layer itself is left as it is: a copy is measured, with noise on all
    parameters, since initial values may hide what a layer can do (a recurrent matrix that starts as the identity).

    Args:
        layer: a small instance; its size decides the cost.
        probes: columns, random ones.
        seed: of inputs, states and columns.
    """
    layer = deepcopy(layer).double()
    random = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    start = layer.initial_state(1)
    names = [
        path
        for path, leaf in ostinato.state.leaves(start)
        if leaf.is_floating_point() and _NOT_MEMORY.isdisjoint(path.split("."))
    ]
    sizes = {path: leaf.shape[1:] for path, leaf in ostinato.state.leaves(start) if path in names}
    if any(0 in shape for shape in sizes.values()):
        return None
    total = sum(shape.numel() for shape in sizes.values())
    columns = torch.randperm(total, generator=random)[:probes]
    inputs = torch.randn(2, layer.d_model, generator=random, dtype=torch.float64)
    states = 0.5 * torch.randn(2, total, generator=random, dtype=torch.float64)
    first = _columns(layer, sizes, inputs[0], states[0], columns)
    unit = torch.zeros(len(columns), total, dtype=torch.float64)
    unit[torch.arange(len(columns)), columns] = 1
    return Transition(
        identity=_same(first, unit),
        by_input=not _same(first, _columns(layer, sizes, inputs[1], states[0], columns)),
        by_state=not _same(first, _columns(layer, sizes, inputs[0], states[1], columns)),
        mixes=not _same(first, first * _own(sizes, columns)),
    )


def _columns(
    layer: Mixer, sizes: dict[str, torch.Size], x: Tensor, memory: Tensor, columns: Tensor, step: float = 1e-4
) -> Tensor:
    """(probes, total): row i is ∂S_t/∂S_{t−1}[column i]; one batch of 2 · probes steps."""
    rows = len(columns)
    states = memory.repeat(2 * rows, 1)
    states[torch.arange(rows), columns] += step
    states[torch.arange(rows, 2 * rows), columns] -= step
    parts = dict(zip(sizes, states.split([shape.numel() for shape in sizes.values()], dim=1), strict=True))
    start = layer.initial_state(2 * rows)
    paths = iter([path for path, _ in ostinato.state.leaves(start)])

    def fill(leaf: Tensor) -> Tensor:
        path = next(paths)
        if path in parts:
            return parts[path].reshape(leaf.shape).clone()
        if not leaf.is_floating_point():
            return leaf
        return leaf.clamp(min=0)  # a normaliser of nothing, log 0, would say that the memory is empty

    _, after = layer.step(x.expand(2 * rows, -1), ostinato.state.map(fill, start))
    found = dict(ostinato.state.leaves(after))
    if "maximum" in found:
        for path in _STABILIZED & found.keys():
            scale = found["maximum"].exp()
            found[path] = found[path] * scale.reshape(*scale.shape, *[1] * (found[path].ndim - scale.ndim))
    flat = torch.cat([found[path].reshape(2 * rows, -1) for path in sizes], dim=1)
    return (flat[:rows] - flat[rows:]) / (2 * step)


def _own(sizes: dict[str, torch.Size], columns: Tensor) -> Tensor:
    """(probes, total): 1 at the channel of each column, in every leaf that has the channel."""
    # LSTM's cell and hidden vector are two leaves of the same channels; complex numbers are pairs.
    channels, offset = [], 0
    shared = len(set(sizes.values())) == 1
    for path, shape in sizes.items():
        pair = 2 if path.rpartition(".")[2] in _COMPLEX and shape[-1] == 2 else 1
        channels.append((0 if shared else offset) + torch.arange(shape.numel()) // pair)
        offset += shape.numel()
    number = torch.cat(channels)
    return (number[columns].unsqueeze(1) == number).double()


def _same(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() < 1e-6)


def taxonomy(names: Iterable[str] | None = None, *, d_model: int = 16) -> list[dict[str, str]]:
    """A row for each mixer, with the keys `COLUMNS`; for all that there are, or those of the given names.

    Raises `UnknownNameError` for a name.
    """
    return [_row(name, d_model) for name in (mixers() if names is None else names)]


def _row(name: str, d_model: int) -> dict[str, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = mixer(name, d_model)
    traits = layer.traits
    found = measure_transition(layer)
    gated = name in _GATED_WITHIN or (getattr(layer, "to_gate", None) is not None and name not in _GATED_BY_OUTPUT)
    values = (
        name,
        traits.transition,
        _dependence(found),
        _word(traits.channel_mixing if found is None else found.mixes),
        traits.input_gate,
        _word(gated),
        _word(any(isinstance(part, ShortConvolution) for part in layer.modules())),
        traits.state,
        traits.paper,
    )
    return dict(zip(COLUMNS, values, strict=True))


def _dependence(found: Transition | None) -> str:
    if found is None:
        return "nothing is forgotten"
    on = [word for word, true in (("input", found.by_input), ("state", found.by_state)) if true]
    return " and ".join(on) or "nothing"


def _word(true: Any) -> str:
    return "yes" if true else "no"
