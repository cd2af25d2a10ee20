"""Symbols, graphs and entropies of strings that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ostinato.analysis.cycles import regions_of_codes
from ostinato.analysis.symbolic import (
    encode,
    occupancy_curve,
    occupancy_distance,
    string_period,
    topological_entropy,
    transition_graph,
)
from ostinato.errors import DataError


def test_codes_are_the_bits_of_the_last_units() -> None:
    codes = [3, 0, 2, 1, 3]
    regions = regions_of_codes(codes, 2, 5)
    assert encode(regions, 2).tolist() == codes
    assert encode(regions).tolist() == [0, 1, 2, 3, 0]  # numbered as they come
    assert encode(torch.zeros(4, 3, dtype=torch.bool), 0).tolist() == [0, 0, 0, 0]


def test_graph_of_a_string() -> None:
    graph = transition_graph(np.array([0, 0, 1, 0, 0, 1, 2, 0]), least=0.0)
    assert graph.symbols.tolist() == [0, 1, 2]
    np.testing.assert_allclose(graph.occupancy, [5 / 8, 2 / 8, 1 / 8])
    assert graph.edges.tolist() == [[1, 1, 0], [1, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(graph.weights * 7, [[2, 2, 0], [1, 0, 1], [1, 0, 0]])
    assert "0→1 0.286" in str(graph) and "T 8" in str(graph)


def test_rare_symbols_are_left_out_with_their_transitions() -> None:
    codes = np.array([0, 1] * 50 + [7] + [0, 1] * 50)
    graph = transition_graph(codes, least=0.01)
    assert graph.symbols.tolist() == [0, 1]
    assert graph.edges.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(DataError, match="empty"):
        transition_graph(np.array([], dtype=np.int64))


def test_entropies_of_known_shifts() -> None:
    golden = (1 + math.sqrt(5)) / 2
    assert topological_entropy(np.ones((2, 2), dtype=np.int64)) == pytest.approx(math.log(2), abs=1e-14)
    assert topological_entropy(np.array([[1, 1], [1, 0]])) == pytest.approx(math.log(golden), abs=1e-14)
    assert topological_entropy(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])) == pytest.approx(0, abs=1e-12)
    assert topological_entropy(np.array([[0, 1], [0, 0]])) == -math.inf
    assert topological_entropy(np.zeros((0, 0), dtype=np.int64)) == -math.inf


def test_periods_of_strings() -> None:
    assert string_period(np.array([0, 1, 1] * 20)) == 3
    assert string_period(np.array([5, 4] + [2] * 30), transient=2) == 1
    assert string_period(np.array([5, 4] + [2] * 30)) is None
    assert string_period(np.random.default_rng(0).integers(0, 2, 400)) is None


def test_occupancy() -> None:
    one, other = np.array([0] * 6 + [1] * 4), np.array([9] * 5 + [3] * 3 + [2] * 2)
    np.testing.assert_allclose(occupancy_curve(one, 3), [0.6, 1.0, 1.0])
    np.testing.assert_allclose(occupancy_curve(other, 3), [0.5, 0.8, 1.0])
    assert occupancy_distance(one, other) == pytest.approx(0.2)
    assert occupancy_distance(one, 1 - one) == 0
