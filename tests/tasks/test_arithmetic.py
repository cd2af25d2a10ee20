from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.tasks.arithmetic import ModularArithmetic, ModularCounting, Parity


@pytest.mark.parametrize("dense", [True, False])
def test_parity_against_counting(dense: bool) -> None:
    batch = Parity(min_length=1, max_length=9, dense=dense).train_batch(3, 64, seed=1)
    assert batch.inputs.shape == (64, 10)
    lengths = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        assert tokens[0] == 0 and not mask[0]
        bits = [token for token in tokens[1:] if token]
        lengths.add(len(bits))
        assert tokens[1 + len(bits) :] == [0] * (9 - len(bits))
        for position in range(1, 10):
            inside = position <= len(bits)
            assert mask[position] == (inside if dense else position == len(bits))
            if inside:
                assert targets[position] == 1 + sum(bit == 2 for bit in bits[:position]) % 2
    assert lengths == set(range(1, 10))


@pytest.mark.parametrize("modulus", [2, 3, 7])
def test_modular_counting_against_counting(modulus: int) -> None:
    task = ModularCounting(modulus=modulus, max_length=20)
    batch = task.train_batch(0, 64, seed=0)
    answers = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        for position in range(1, 21):
            assert mask[position] == (tokens[position] > 0)
            if mask[position]:
                assert targets[position] == 1 + sum(token == 2 for token in tokens[: position + 1]) % modulus
                answers.add(targets[position])
    assert answers == set(range(1, modulus + 1)) and task.vocab_size == 1 + max(modulus, 2)
    if modulus == 2:
        assert torch.equal(batch.targets, Parity(max_length=20).train_batch(0, 64, seed=0).targets)


def test_modular_counting_needs_a_modulus() -> None:
    with pytest.raises(ConfigurationError, match="at least 2"):
        ModularCounting(modulus=1)


def test_parity_test_lengths() -> None:
    task = Parity(tested_lengths=(5, 11), test_size=70)
    shapes = [(batch.split, tuple(batch.inputs.shape)) for batch in task.test_batches()]
    assert shapes == [
        ("length 5", (64, 6)),
        ("length 5", (6, 6)),
        ("length 11", (64, 12)),
        ("length 11", (6, 12)),
    ]


def _value(tokens: list[int], modulus: int) -> int:
    signs = {1: "+", 2: "-", 3: "*"}
    return eval("".join(signs.get(token, str(token - 5)) for token in tokens)) % modulus


@pytest.mark.parametrize("modulus", [2, 5, 7])
def test_modular_arithmetic_against_python(modulus: int) -> None:
    task = ModularArithmetic(modulus=modulus, min_length=2, max_length=12, dense=True)
    batch = task.train_batch(0, 128, seed=0)
    lengths = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        end = tokens.index(4)
        lengths.add(end)
        assert end % 2 == 0 and set(tokens[end + 1 :]) <= {0}
        assert mask[end] and targets[end] == 5 + _value(tokens[1:end], modulus)
        for digit in range(1, end, 2):
            assert mask[digit] and targets[digit] == 5 + _value(tokens[1 : digit + 1], modulus)
        assert sum(mask) == 1 + end // 2
    assert lengths == {2, 4, 6, 8, 10, 12}


def test_modular_arithmetic_scores_only_the_answer() -> None:
    batch = ModularArithmetic().train_batch(0, 16, seed=0)
    assert torch.equal(batch.mask, batch.inputs == 4)


def test_vocabulary_is_used() -> None:
    batch = ModularArithmetic().train_batch(0, 64, seed=0)
    assert set(batch.inputs.unique().tolist()) == set(range(10))


@pytest.mark.parametrize("options", [{"modulus": 1}, {"max_length": 7}, {"min_length": 10, "max_length": 4}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        ModularArithmetic(**options)


def test_bad_parity_lengths() -> None:
    with pytest.raises(ConfigurationError, match="min_length <= max_length"):
        Parity(min_length=5, max_length=4)
