"""States: mapping, selecting, joining, counting, and the way to disk and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ostinato import state
from ostinato.errors import CheckpointError, StateError


class Cell(NamedTuple):
    """A state as mixers have them."""

    hidden: Tensor
    extra: Any


@pytest.fixture
def nest() -> dict[str, Any]:
    """Everything that a state may hold."""
    return {
        "layers": [Cell(torch.randn(3, 4), (torch.arange(3), None)), Cell(torch.randn(3, 2, 2).double(), {})],
        "mask": torch.tensor([True, False, True]),
        "phase": torch.randn(3, 2, dtype=torch.complex128),
    }


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(state.leaves(one), state.leaves(other), strict=True))
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_leaves_have_paths(nest: dict[str, Any]) -> None:
    paths = [path for path, _ in state.leaves(nest)]
    assert paths == ["layers.0.hidden", "layers.0.extra.0", "layers.1.hidden", "mask", "phase"]
    assert next(iter(state.leaves(torch.ones(1))))[0] == ""
    assert list(state.leaves(None)) == []
    with pytest.raises(StateError, match="not int"):
        list(state.leaves({"a": 3}))


def test_map_keeps_the_structure(nest: dict[str, Any]) -> None:
    twice = state.map(lambda leaf: torch.cat([leaf, leaf]), nest)
    assert isinstance(twice["layers"], list) and isinstance(twice["layers"][0], Cell)
    assert isinstance(twice["layers"][0].extra, tuple) and twice["layers"][0].extra[1] is None
    assert twice["phase"].shape == (6, 2)
    assert state.map(torch.add, (torch.ones(1),), (torch.ones(1),))[0].item() == 2
    with pytest.raises(StateError, match="not str"):
        state.map(torch.neg, ["text"])


@pytest.mark.parametrize(
    "other", [{"b": torch.ones(1)}, {"a": None}, {"a": (torch.ones(1),)}, (torch.ones(1),), None, torch.ones(1)]
)
def test_map_refuses_trees_that_differ(other: Any) -> None:
    with pytest.raises(StateError, match="do not fit together"):
        state.map(torch.add, {"a": torch.ones(1)}, other)
    with pytest.raises(StateError, match="do not fit together"):
        state.map(torch.add, other, {"a": torch.ones(1)})


def test_detach_clone_and_to() -> None:
    hidden = torch.ones(2, requires_grad=True) * 2
    cell = Cell(hidden, None)
    assert not state.detach(cell).hidden.requires_grad
    copied = state.clone(cell)
    assert copied.hidden.requires_grad and copied.hidden.data_ptr() != hidden.data_ptr()
    assert state.to(cell, torch.float64).hidden.dtype == torch.float64


def test_select_forks_and_reorders(nest: dict[str, Any]) -> None:
    fork = state.select(nest, [2, 2, -3, 0])
    assert state.batch_size(fork) == 4
    assert torch.equal(fork["phase"], nest["phase"][[2, 2, 0, 0]])
    assert state.batch_size(state.select(nest, 1)) == 1
    assert state.batch_size(state.select(nest, torch.tensor([0, 1]))) == 2
    assert state.batch_size(state.select(nest, [])) == 0


@pytest.mark.parametrize("rows", [[3], [-4], [0.5], [True], torch.ones(3)])
def test_select_refuses_rows_that_are_not_there(nest: dict[str, Any], rows: Any) -> None:
    with pytest.raises(StateError, match=r"cannot select rows|whole numbers"):
        state.select(nest, rows)


def test_select_passes_gradients() -> None:
    hidden = torch.ones(2, 3, requires_grad=True)
    state.select(Cell(hidden, None), [1, 1]).hidden.sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[0, 0, 0], [2, 2, 2]]


def test_concatenate_undoes_select(nest: dict[str, Any]) -> None:
    assert same(state.concatenate([state.select(nest, row) for row in range(3)]), nest)
    with pytest.raises(StateError, match="at least one"):
        state.concatenate([])
    with pytest.raises(StateError, match="do not fit"):
        state.concatenate([Cell(torch.ones(1, 2), None), Cell(torch.ones(1, 3), None)])
    with pytest.raises(StateError, match="do not fit"):
        state.concatenate([Cell(torch.ones(1), None), Cell(torch.ones(1), torch.ones(1))])


def test_batch_size_must_agree() -> None:
    with pytest.raises(StateError, match="different batch sizes"):
        state.batch_size((torch.ones(1), torch.ones(2)))
    with pytest.raises(StateError, match="no tensor"):
        state.batch_size((None, {}))
    with pytest.raises(StateError, match="a has no axis"):
        state.batch_size({"a": torch.tensor(1.0)})


def test_bytes(nest: dict[str, Any]) -> None:
    assert state.num_bytes(nest) == 3 * 4 * 4 + 3 * 8 + 3 * 4 * 8 + 3 + 3 * 2 * 16
    assert state.num_bytes(None) == 0


def test_saved_and_loaded_is_the_same(nest: dict[str, Any], tmp_path: Path) -> None:
    state.save(nest, tmp_path / "deep" / "state.safetensors")
    like = state.select(nest, 0)
    found = state.load(tmp_path / "deep" / "state.safetensors", like)
    assert same(found, nest) and isinstance(found["layers"][0], Cell)
    assert os.listdir(tmp_path / "deep") == ["state.safetensors"]


def test_views_of_one_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    memory = torch.randn(4, 3)
    odd = torch.randn(2, 2, dtype=torch.complex64)
    tangled = (memory[:2], memory[1:3], memory, memory.T, odd, odd.conj(), odd.imag)
    state.save(tangled, tmp_path / "s")
    assert same(state.load(tmp_path / "s", tangled), tangled)


def test_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"same path 'a\.b'"):
        state.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_state_of_something_else_is_refused(tmp_path: Path) -> None:
    state.save(Cell(torch.ones(1, 2), None), tmp_path / "s")
    with pytest.raises(StateError, match="differs in extra"):
        state.load(tmp_path / "s", Cell(torch.ones(1, 2), torch.ones(1)))
    with pytest.raises(StateError, match=r"a tensor has shape \(1, 2\)"):
        state.load(tmp_path / "s", Cell(torch.ones(1, 2, 3), None))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    from ostinato.files import write_tensors

    write_tensors(tmp_path / "weights", {"hidden": torch.ones(1)}, {"kind": "model"})
    with pytest.raises(CheckpointError, match="holds model, not a state"):
        state.load(tmp_path / "weights", Cell(torch.ones(1), None))
    write_tensors(tmp_path / "nameless", {"hidden": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="something foreign"):
        state.load(tmp_path / "nameless", Cell(torch.ones(1), None))
    with pytest.raises(CheckpointError, match="there is no file"):
        state.load(tmp_path / "absent", None)


def test_compact_lets_go_of_what_a_view_holds() -> None:
    sequence, whole = torch.randn(2, 1000, 4), torch.randn(2, 4)
    cell = state.compact(Cell(sequence[:, -1], whole))
    assert torch.equal(cell.hidden, sequence[:, -1]) and cell.extra is whole
    assert cell.hidden.untyped_storage().nbytes() == 2 * 4 * 4
    batched = torch.func.vmap(lambda x: state.compact((x[:, -1],))[0])(torch.randn(3, 2, 5))
    assert batched.shape == (3, 2)
