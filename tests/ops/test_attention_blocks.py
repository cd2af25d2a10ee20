"""Attention by blocks of queries: the same as all queries at once, with no block wider than it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ostinato.ops.attention import attend
from ostinato.ops.attention_blocks import attend_by_blocks


@pytest.mark.parametrize(
    ("window", "cached", "widest"),
    [(None, 0, 600), (None, 70, 670), (1, 0, 64), (4, 3, 64 + 3), (71, 70, 71 + 70), (300, 299, 256 + 299)],
)
def test_blocks_equal_all_queries_at_once(window: int | None, cached: int, widest: int) -> None:
    time = 600
    queries = torch.randn(2, time, 4, 3, dtype=torch.float64)
    keys, values = (torch.randn(2, cached + time, 2, width, dtype=torch.float64) for width in (3, 5))
    sequence = (torch.rand(2, cached + time) < 0.01).cumsum(1)
    widths = []

    def attend_block(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor) -> Tensor:
        widths.append(k.shape[2])
        assert q.shape[2] <= 256 and tuple(distance.shape) == (q.shape[2], k.shape[2])
        return attend(q, k, v, visible, distance, 0.5)

    found = attend_by_blocks(attend_block, queries, keys, values, sequence, window)
    steps = torch.arange(cached + time)
    distance = steps[cached:, None] - steps
    visible = (distance >= 0) & (distance < (window or cached + time))
    visible = visible & (sequence[:, cached:, None] == sequence[:, None])
    by_head = (x.transpose(1, 2) for x in (queries, keys, values))
    expected = attend(*by_head, visible.unsqueeze(1), distance, 0.5).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert max(widths) == widest
    assert len(widths) == (3 if window is None else 1)


def test_keys_and_values_are_given_in_the_type_of_queries() -> None:
    seen = []

    def attend_block(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype, visible.dtype))
        return v

    values = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    sequence = torch.zeros(1, 5, dtype=torch.long)
    outputs = attend_by_blocks(attend_block, torch.randn(1, 5, 2, 3), values, values, sequence, None)
    assert seen == [(torch.float32, torch.float32, torch.float32, torch.bool)]
    torch.testing.assert_close(outputs, values.float(), atol=0, rtol=0)
