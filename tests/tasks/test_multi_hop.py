from __future__ import annotations

import pytest

from ostinato.errors import ConfigurationError
from ostinato.tasks.multi_hop import MultiHop


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_hops_against_the_definition(hops: int) -> None:
    batch = MultiHop(hops=hops, vocabulary=3, length=20, tested_lengths=(20,)).train_batch(0, 32, seed=0)
    assert batch.inputs.shape == (32, 20)
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        for position in range(20):
            place: int | None = position
            for _ in range(hops):
                earlier = [j for j in range(place) if tokens[j] == tokens[place]] if place is not None else []
                place = 1 + max(earlier) if earlier else None
            assert mask[position] == (place is not None)
            if place is not None:
                assert targets[position] == tokens[place]


def test_hops_that_do_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="hops must be positive"):
        MultiHop(hops=0)
    with pytest.raises(ConfigurationError, match="need a length above 80"):
        MultiHop(hops=5, vocabulary=16)
