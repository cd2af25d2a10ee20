from __future__ import annotations

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.dyck import Dyck, ShuffleDyck


@pytest.mark.parametrize(("kinds", "bound"), [(1, None), (2, 3), (3, None)])
def test_dyck_against_a_stack(kinds: int, bound: int | None) -> None:
    task = Dyck(kinds=kinds, max_depth=bound, min_length=5, max_length=30)
    batch = task.train_batch(0, 100, seed=0)
    deepest, answers = 0, set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        stack: list[int] = []
        assert tokens[0] == 0 and not mask[0]
        for token, target, scored in zip(tokens[1:], targets[1:], mask[1:], strict=True):
            assert scored == (token > 0)
            if not scored:
                continue
            if token <= kinds:
                stack.append(token)
            else:
                assert stack.pop() == token - kinds, "the wrong bracket was closed"
            assert target == (1 + stack[-1] if stack else 1)
            deepest = max(deepest, len(stack))
            answers.add(target)
    assert answers == set(range(1, kinds + 2))
    assert deepest == bound if bound else deepest > 5


@pytest.mark.parametrize("bound", [None, 4])
def test_shuffle_against_counters(bound: int | None) -> None:
    task = ShuffleDyck(kinds=3, max_depth=bound)
    batch = task.train_batch(0, 100, seed=0)
    answers, crossed = set(), False
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        count, order = [0, 0, 0], []
        for token, target in zip(tokens[1:], targets[1:], strict=True):
            if not token:
                continue
            kind = (token - 1) % 3
            count[kind] += 1 if token <= 3 else -1
            if token <= 3:
                order.append(kind)
            else:
                crossed |= order[-1] != kind
                order.remove(kind)
            assert min(count) >= 0 and (bound is None or sum(count) <= bound)
            assert target == 1 + sum(2**i for i in range(3) if count[i])
            answers.add(target)
    assert answers == set(range(1, 9)) and crossed, "a shuffle closes brackets in any order"


def test_baselines() -> None:
    found = Dyck(test_size=32).baselines()
    # After an opening bracket, half of all, the last opened is right; it is not always.
    assert 0.2 < found["last opened"] < 0.9 and found["most frequent answer"] < found["last opened"]
    assert ShuffleDyck(test_size=8).baselines()["most frequent answer"] < 0.6


@pytest.mark.parametrize("options", [{"kinds": 0}, {"max_depth": 0}, {"opening": 1.0}])
def test_bad_brackets(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        Dyck(**options)
