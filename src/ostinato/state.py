"""States: pytrees of tensors that you own.

The state of a mixer or a model is a nest of NamedTuples, tuples, lists and dicts whose leaves are tensors
with the batch as their first axis (or None). The functions here work on any of them:

    state = model.read("Once upon a time")
    branches = ostinato.state.select(state, [0, 0, 0])      # fork it three ways
    ostinato.state.save(state, "once.safetensors")
    ostinato.state.num_bytes(state)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostinato.errors import CheckpointError, StateError

State = Any
"""A pytree of tensors, batch first."""


def map(function: Callable[..., Any], state: State, *others: State) -> State:
    """Apply `function` to every tensor of a state (and the matching ones of `others`); the shape stays.

    Raises `StateError` where the trees differ, or hold something that no state holds.
    """
    if state is None:
        if any(other is not None for other in others):
            raise StateError("these states do not fit together: one has nothing where another has something")
        return None
    if isinstance(state, Tensor):
        if not all(isinstance(other, Tensor) for other in others):
            raise StateError("these states do not fit together: one has a tensor where another has none")
        return function(state, *others)
    if isinstance(state, dict):
        for other in others:
            if not isinstance(other, dict) or other.keys() != state.keys():
                raise StateError(f"these states do not fit together: one has the parts {', '.join(state)}")
        return {key: map(function, value, *(other[key] for other in others)) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        for other in others:
            if not isinstance(other, (tuple, list)) or len(other) != len(state):
                raise StateError(f"these states do not fit together: one is a {type(state).__name__} of {len(state)}")
        parts = [map(function, *branch) for branch in zip(state, *others, strict=True)]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise StateError(f"a state holds tensors in tuples, lists and dicts, not {type(state).__name__}")


def leaves(state: State) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its path, e.g. ("0.memory", …)."""
    yield from _leaves(state, "")


def _leaves(state: State, path: str) -> Iterator[tuple[str, Tensor]]:
    if state is None:
        return
    if isinstance(state, Tensor):
        yield path, state
        return
    if isinstance(state, dict):
        items: Any = state.items()
    elif hasattr(state, "_fields"):
        items = zip(state._fields, state, strict=True)
    elif isinstance(state, (tuple, list)):
        items = enumerate(state)
    else:
        raise StateError(f"a state holds tensors in tuples, lists and dicts, not {type(state).__name__}")
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def detach(state: State) -> State:
    """The same values, cut from the graph: what truncated back-propagation carries over."""
    return map(Tensor.detach, state)


def clone(state: State) -> State:
    """An independent copy."""
    return map(Tensor.clone, state)


def compact(state: State) -> State:
    """The same values, holding no more memory than they take.

    The last step of a sequence is often a view, which keeps the whole sequence alive: what is kept for long must be
    a copy. Leaves that are no views are left as they are.
    """

    def own(leaf: Tensor) -> Tensor:
        try:
            held = leaf.untyped_storage().nbytes()
        except NotImplementedError:  # inside a torch.func transform, where there is no memory to speak of
            return leaf
        return leaf.clone() if held > leaf.numel() * leaf.element_size() else leaf

    return map(own, state)


def to(state: State, *args: Any, **kwargs: Any) -> State:
    """`Tensor.to` on every leaf: move a state to a device."""
    return map(lambda leaf: leaf.to(*args, **kwargs), state)


def select(state: State, indices: int | Sequence[int] | Tensor) -> State:
    """Rows of the batch, in any order and number: `select(state, [0, 0, 0])` forks row 0 three ways."""
    if isinstance(indices, int):
        indices = [indices]
    size = batch_size(state)
    index = torch.as_tensor(indices)
    if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
        raise StateError(f"rows are chosen by whole numbers, got {index.tolist()}")
    index = index.long()
    if index.numel() and (int(index.max()) >= size or int(index.min()) < -size):
        raise StateError(f"cannot select rows {index.tolist()} of a state with batch size {size}")
    return map(lambda leaf: leaf.index_select(0, (index % size).to(leaf.device)), state)


def concatenate(states: Sequence[State]) -> State:
    """Join states of the same kind along the batch."""
    if not states:
        raise StateError("concatenate needs at least one state")
    try:
        return map(lambda *parts: torch.cat(parts, dim=0), *states)
    except RuntimeError as error:
        raise StateError(f"these states do not fit together: {error}") from error


def batch_size(state: State) -> int:
    """The size of the first axis; raises `StateError` when leaves disagree."""
    if scalars := [path for path, leaf in leaves(state) if leaf.ndim == 0]:
        raise StateError(f"a state's tensors have the batch as their first axis; {', '.join(scalars)} has no axis")
    sizes = {path: leaf.shape[0] for path, leaf in leaves(state)}
    if not sizes:
        raise StateError("this state holds no tensor, so it has no batch size")
    if len(set(sizes.values())) > 1:
        raise StateError(f"the parts of this state have different batch sizes: {sizes}")
    return next(iter(sizes.values()))


def num_bytes(state: State) -> int:
    """What the state holds, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(state))


def save(state: State, path: str | Path) -> None:
    """Write a state to one safetensors file, atomically: an old file survives a failure.

    Raises `StateError` when two parts have the same path, and `OSError` when the disk does not take it.
    """
    from ostinato.files import write_tensors

    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves(state):
        if name in tensors:
            raise StateError(f"two parts of this state have the same path {name!r}; rename a key that holds a dot")
        tensors[name] = leaf
    write_tensors(path, tensors, {"kind": "state"})


def load(path: str | Path, like: State) -> State:
    """Read a state back into the structure of `like`, e.g. `model.initial_state(1)`.

    The batch size is the file's. Raises `CheckpointError` for a file that is no state or is damaged, and
    `StateError` for the state of something else.
    """
    from ostinato.files import read_tensors

    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != "state":
        raise CheckpointError(f"{path} holds {metadata.get('kind', 'something foreign')}, not a state")
    wanted = dict(leaves(like))
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))
        raise StateError(f"{path} is the state of another model: it differs in {', '.join(odd[:5])}")
    names = iter(wanted)

    def take(leaf: Tensor) -> Tensor:
        found = tensors[next(names)]
        if found.ndim != leaf.ndim:
            raise StateError(f"{path} is the state of another model: a tensor has shape {tuple(found.shape)}")
        return found.to(leaf.device)

    return map(take, like)
