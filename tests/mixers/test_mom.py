"""Mixture of memories: what it is of its base, memory by memory; its routers; what its capacity breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.layers.routing import choose
from ostinato.mixers.mom import MixtureOfMemories, StackedLinear
from ostinato.models.token_classifier import TokenClassifier
from ostinato.training.parameters import parameter_groups

D_MODEL, BATCH, TIME = 16, 2, 23
BASES = ["gated_delta_net", "gla", "linear_attention", "gated_slot_attention", "hgrn2", "retnet", "delta_product"]


def built(shake: float = 0.2, **options: Any) -> MixtureOfMemories:
    torch.manual_seed(0)
    found = ostinato.mixer("mom", D_MODEL, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    assert isinstance(found, MixtureOfMemories)
    return found


def sequence(time: int = TIME) -> Tensor:
    return torch.randn(BATCH, time, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def alone(mixture: MixtureOfMemories, which: int, base: str, **options: Any) -> Any:
    """The base mixer with the maps of one memory."""
    one = ostinato.mixer(base, D_MODEL, **options).double()
    taken = {}
    for name, value in mixture.base.state_dict().items():
        owner = mixture.base.get_submodule(name.rpartition(".")[0])
        taken[name] = value[which] if isinstance(owner, StackedLinear) else value
    one.load_state_dict(taken)
    return one


@pytest.mark.parametrize("base", BASES)
def test_one_memory_is_the_base(base: str) -> None:
    mixture = built(base=base, memories=1, top_k=1, shared_memory=False)
    one = alone(mixture, 0, base)
    reset = torch.zeros(BATCH, TIME, dtype=torch.bool)
    reset[0, 9] = reset[1, 0] = True
    (found, after), (wanted, last) = mixture(sequence(), reset=reset), one(sequence(), reset=reset)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    inner = [leaf.squeeze(1) for _, leaf in ostinato.state.leaves(after.memories)]
    for mine, theirs in zip(inner, [leaf for _, leaf in ostinato.state.leaves(last)], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_the_mixture_is_separate_mixers_on_their_own_tokens(base: str) -> None:
    mixture = built(base=base, memories=3, top_k=2)
    x = sequence()
    assert mixture.router is not None
    shares, chosen = choose(mixture.router(x), 2)
    total, _ = alone(mixture, 3, base).remember(x, alone(mixture, 3, base).initial_state(BATCH), None)
    for memory in range(3):
        one = alone(mixture, memory, base)
        for row in range(BATCH):
            steps = [t for t in range(TIME) if memory in chosen[row, t].tolist()]
            read, _last = one.remember(x[row : row + 1, steps], one.initial_state(1), None)
            share = (shares[row, steps] * (chosen[row, steps] == memory)).sum(-1)
            total[row, steps] += share[:, None, None] * read[0]
    found, _after = mixture(x)
    torch.testing.assert_close(found, mixture.base.read_out(total, x), rtol=0, atol=1e-11)  # type: ignore[operator]


def test_permuting_the_memories_changes_nothing() -> None:
    mixture = built()
    other = built()
    order = torch.tensor([2, 0, 3, 1, 4])
    with torch.no_grad():
        for module in other.base.modules():
            if isinstance(module, StackedLinear):
                module.weight.copy_(module.weight[order])
        assert other.router is not None
        other.router.weight.copy_(other.router.weight[order[:4]])
    torch.testing.assert_close(mixture(sequence())[0], other(sequence())[0], rtol=0, atol=1e-12)


def test_memories_not_chosen_are_left_alone() -> None:
    mixture = built()
    _, state = mixture(sequence())
    x = sequence()[:1, 3]
    _, chosen = choose(mixture.router(x.unsqueeze(1)), 2)  # type: ignore[misc]
    own = ostinato.state.select(state, 0)
    for step in (lambda: mixture.step(x, own), lambda: mixture(x.unsqueeze(1), own, reset=torch.zeros(1, 1).bool())):
        _, after = step()
        for memory in range(4):
            same = torch.equal(after.memories.memory[:, memory], own.memories.memory[:, memory])
            assert same == (memory not in chosen[0, 0].tolist())


def test_one_row_and_many_rows_step_alike() -> None:
    mixture = built()
    _, state = mixture(sequence())
    together, after = mixture.step(sequence()[:, 5].repeat(2, 1), ostinato.state.select(state, [0, 1, 0, 1]))
    for row in range(2):
        own, single = mixture.step(sequence()[row : row + 1, 5], ostinato.state.select(state, row))
        torch.testing.assert_close(own[0], together[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(single.memories.memory[0], after.memories.memory[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", ["gated_delta_net", "gla"])
def test_a_whole_list_is_the_same_under_a_map(base: str) -> None:
    # Under vmap no length can be looked at: the lists are as long as the sequence, the shared memory's is one of them.
    mixture = built(base=base)
    _, before = mixture(sequence())
    reset = torch.zeros(BATCH, TIME, dtype=torch.bool)
    reset[0, 9] = reset[1, 0] = True
    x = torch.stack([sequence(), sequence().flip(1)])
    for marks in (None, reset):

        def read(one: Tensor, marks: Tensor | None = marks) -> tuple[Tensor, list[Tensor]]:
            y, after = mixture(one, before, reset=marks)
            return y, [leaf for _, leaf in ostinato.state.leaves(after)]

        found, states = torch.vmap(read)(x)
        for index in range(2):
            wanted, after = read(x[index])
            torch.testing.assert_close(found[index], wanted, rtol=0, atol=1e-12)
            for own, other in zip(states, after, strict=True):
                torch.testing.assert_close(own[index], other, rtol=0, atol=1e-12)


def test_capacity_that_is_large_enough_drops_nothing_and_a_small_one_breaks_causality() -> None:
    free, roomy, tight = built(), built(capacity=2.0), built(capacity=0.5)
    x = sequence()
    torch.testing.assert_close(free(x)[0], roomy(x)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(tight(x)[0], free(x)[0])
    later = torch.cat([x[:, :12], x[:, :1].expand(-1, 11, -1)], dim=1)
    assert not torch.allclose(tight(later)[0][:, :12], tight(x)[0][:, :12])


def test_shared_projections_and_no_shared_memory() -> None:
    mixture = built(shared_projections=True, shared_memory=False)
    assert not any(isinstance(module, StackedLinear) for module in mixture.modules())
    assert mixture.initial_state(3).shared is None
    one = alone(mixture, 0, "gated_delta_net")
    assert sum(p.numel() for p in mixture.parameters()) == sum(p.numel() for p in one.parameters()) + 4 * D_MODEL


def test_hash_router_streams_with_its_tokens() -> None:
    mixture = built(router="hash")
    tokens = torch.randint(0, 100, (BATCH, TIME), generator=torch.Generator().manual_seed(3))
    whole, _ = mixture(sequence(), tokens=tokens)
    first, state = mixture(sequence()[:, :9], tokens=tokens[:, :9])
    second, _ = mixture(sequence()[:, 9:], state, tokens=tokens[:, 9:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    model = TokenClassifier(100, D_MODEL, "mom(router=hash)*2")
    assert model(tokens)[0].shape == (BATCH, TIME, 100)


def test_frozen_router_and_biases_in_the_optimiser() -> None:
    frozen = built(router="frozen", base="gla")
    groups = parameter_groups(frozen, 1e-3, 0.1)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    named = {name for group in groups for name in group["names"]}
    assert "router.weight" not in named
    assert "memories.base.to_decay.1.bias" in named - decayed
    assert "memories.base.project.to_keys.weight" in decayed


def test_errors() -> None:
    for options, text in [
        ({"top_k": 5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"router": "random"}, "router must be"),
        ({"capacity": -1.0}, "capacity"),
        ({"base": "lstm"}, "no matrix memory"),
        ({"base": "hgrn2", "conv": 4}, "no option conv"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            ostinato.mixer("mom", D_MODEL, **options)
