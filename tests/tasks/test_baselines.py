from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from ostinato.tasks.baselines import NGram

TEXT = b"how much wood would a woodchuck chuck if a woodchuck could chuck wood? "


def _witten_bell(text: bytes, order: int, history: bytes, byte: int) -> float:
    """The docstring's recursion, byte by byte."""
    probability = 1 / 256
    for k in range(order + 1):
        context = history[len(history) - k :] if k else b""
        if len(history) < k:
            break
        after = Counter(text[i + k] for i in range(len(text) - k) if text[i : i + k] == context)
        count, kinds = sum(after.values()), len(after)
        if count:
            probability = (after[byte] + kinds * probability) / (count + kinds)
    return probability


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_ngram_against_its_definition(order: int) -> None:
    context, text = b"a wood", b"chuck would?\xff\x00 zoo"
    found = NGram(TEXT, order).probabilities(context, text)
    wanted = [_witten_bell(TEXT, order, (context + text)[: 6 + i], text[i]) for i in range(len(text))]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("order", [0, 2, 3])
def test_without_context(order: int) -> None:
    found = NGram(TEXT, order).probabilities(b"", b"wood")
    wanted = [_witten_bell(TEXT, order, b"wood"[:i], b"wood"[i]) for i in range(4)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("context", [b"chu", b"zzz", b"k \xff"])
def test_probabilities_sum_to_one(context: bytes) -> None:
    model = NGram(TEXT, 3)
    total = sum(float(model.probabilities(context, bytes([byte]))[0]) for byte in range(256))
    assert math.isclose(total, 1, rel_tol=1e-12)


def test_more_context_helps_on_repetitive_text() -> None:
    train, test = TEXT * 20, TEXT * 2
    bits = [NGram(train, order).bits_per_byte(train, test) for order in (0, 1, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_bad_order() -> None:
    with pytest.raises(ValueError, match="between 0 and 6"):
        NGram(TEXT, 7)
