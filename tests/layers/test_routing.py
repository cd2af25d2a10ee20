"""Tokens to memories and back, and how evenly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.layers.routing import (
    Router,
    choose,
    gather_outputs,
    hashed_choice,
    load_balancing_loss,
    packed_resets,
    route_tokens,
    router_load,
    router_logits,
)

BATCH, TIME, WIDTH, MEMORIES, TOP = 3, 17, 5, 4, 2


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(BATCH, TIME, MEMORIES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_choice_by_hand(logits: Tensor) -> None:
    shares, chosen = choose(logits, TOP)
    probability = logits.softmax(-1)
    for b in range(BATCH):
        for t in range(TIME):
            best = sorted(range(MEMORIES), key=lambda m: -logits[b, t, m].item())[:TOP]
            assert chosen[b, t].tolist() == best
            wanted = probability[b, t, best] / probability[b, t, best].sum()
            torch.testing.assert_close(shares[b, t], wanted)


def test_ties_go_to_the_first_memory() -> None:
    _, chosen = choose(torch.zeros(1, 2, 4), 2)
    assert chosen.tolist() == [[[0, 1], [0, 1]]]


def test_lists_hold_their_tokens_in_the_order_of_time(logits: Tensor, x: Tensor) -> None:
    _, chosen = choose(logits, TOP)
    routed = route_tokens(x, chosen, MEMORIES)
    assert routed.packed.shape[2] == int(routed.lengths.max()) < TIME
    for b in range(BATCH):
        for m in range(MEMORIES):
            steps = [t for t in range(TIME) if m in chosen[b, t].tolist()]
            assert int(routed.lengths[b, m]) == len(steps)
            assert torch.equal(routed.packed[b, m, : len(steps)], x[b, steps])


def test_the_way_back(logits: Tensor, x: Tensor) -> None:
    shares, chosen = choose(logits, TOP)
    routed = route_tokens(x, chosen, MEMORIES)
    scale = torch.arange(1.0, MEMORIES + 1, dtype=torch.float64)
    found = gather_outputs(routed.packed * scale.view(1, -1, 1, 1), routed, shares)
    torch.testing.assert_close(found, x * (scale[chosen] * shares).sum(-1, keepdim=True))


def test_capacity_drops_the_oldest(logits: Tensor, x: Tensor) -> None:
    shares, chosen = choose(logits, TOP)
    routed = route_tokens(x, chosen, MEMORIES, capacity=3)
    assert routed.packed.shape[2] == 3 and int(routed.lengths.max()) == 3
    assert routed.kept is not None
    for b in range(BATCH):
        for m in range(MEMORIES):
            steps = [t for t in range(TIME) if m in chosen[b, t].tolist()][-3:]
            assert torch.equal(routed.packed[b, m, : len(steps)], x[b, steps])
            for t in range(TIME):
                for slot in range(TOP):
                    if chosen[b, t, slot] == m:
                        assert bool(routed.kept[b, t, slot]) == (t in steps)
    wanted = x * (shares * routed.kept).sum(-1, keepdim=True)
    torch.testing.assert_close(gather_outputs(routed.packed, routed, shares), wanted)


def test_resets_reach_every_list(logits: Tensor, x: Tensor) -> None:
    _, chosen = choose(logits, TOP)
    routed = route_tokens(x, chosen, MEMORIES)
    reset = torch.zeros(BATCH, TIME, dtype=torch.bool)
    reset[0, 0] = reset[0, 7] = reset[1, -1] = True
    begins, stale = packed_resets(reset, routed)
    sequence = reset.long().cumsum(1)
    for b in range(BATCH):
        for m in range(MEMORIES):
            steps = [t for t in range(TIME) if m in chosen[b, t].tolist()]
            numbers = [0, *sequence[b, steps].tolist()]
            wanted = [before != own for before, own in itertools.pairwise(numbers)]
            assert begins[b, m, : len(steps)].tolist() == wanted
            assert not begins[b, m, len(steps) :].any()
            assert bool(stale[b, m]) == (numbers[-1] != int(sequence[b, -1]))
    assert bool(stale[1].any())


def test_balance_loss_by_hand(logits: Tensor) -> None:
    layers = [logits, logits.flip(1) + 1]
    rows = torch.cat([layer.flatten(0, 1) for layer in layers])
    best = rows.topk(TOP, dim=-1).indices
    wanted = 0.0
    for slot in range(TOP):
        for m in range(MEMORIES):
            wanted += float((best[:, slot] == m).double().mean() * rows.softmax(-1)[:, m].mean())
    assert load_balancing_loss(layers, MEMORIES, TOP).item() == pytest.approx(MEMORIES * wanted)


def test_balance_loss_is_top_k_when_balanced_and_more_when_not() -> None:
    logits = 0.1 * torch.eye(4).repeat(3, 1).unsqueeze(0)
    assert load_balancing_loss(logits, 4, 1).item() == pytest.approx(1.0)
    skewed = logits + torch.tensor([3.0, 0, 0, 0])
    assert load_balancing_loss(skewed, 4, 1).item() > 1.5
    torch.testing.assert_close(router_load(skewed, 1), torch.tensor([1.0, 0, 0, 0]).double())


def test_balance_loss_leaves_padding_out(logits: Tensor) -> None:
    mask = torch.arange(TIME).expand(BATCH, -1) < 11
    found = load_balancing_loss(logits, MEMORIES, TOP, mask)
    torch.testing.assert_close(found, load_balancing_loss(logits[:, :11], MEMORIES, TOP))


def test_hash_spreads_tokens_evenly() -> None:
    shares, chosen = hashed_choice(torch.arange(512).unsqueeze(0), 4, 2)
    assert torch.equal(shares, torch.full_like(shares, 0.5))
    assert bool((chosen[..., 0] != chosen[..., 1]).all())
    counts = torch.bincount(chosen.flatten(), minlength=4) / 512
    assert bool(((counts > 0.4) & (counts < 0.6)).all())


def test_router_is_wide_and_watched() -> None:
    model = nn.Sequential(Router(5, 3).to(torch.bfloat16))
    with router_logits(model) as found:
        logits = model(torch.randn(2, 4, 5, dtype=torch.bfloat16))
    model(torch.randn(2, 4, 5, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32 and len(found) == 1 and found[0] is logits


def test_errors(x: Tensor, logits: Tensor) -> None:
    with pytest.raises(ShapeError, match="batch and time must agree"):
        route_tokens(x, torch.zeros(BATCH, 3, 1, dtype=torch.long), 2)
    with pytest.raises(ConfigurationError, match="capacity"):
        route_tokens(x, torch.zeros(BATCH, TIME, 1, dtype=torch.long), 2, capacity=0)
    with pytest.raises(ConfigurationError, match="no router logits"):
        load_balancing_loss([], 4, 2)
    with pytest.raises(ShapeError, match="3 memories"):
        load_balancing_loss(logits, 3, 2)
