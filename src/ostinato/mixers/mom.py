"""Mixture of memories: several matrix memories per layer, a router that sends each token to some of them.

Memories that a token does not choose are left as they are, neither written nor decayed; time inside a memory counts
its own tokens only. The recurrence is that of any mixer with a matrix memory, computed on the tokens of each memory
side by side (`ostinato.layers.routing`).

Source: MoM (arXiv 2502.13685), section 3. Where the authors' training path lets the short convolution run on from one
memory's tokens to the next one's, here every memory has a window of its own, as in their decoding.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import ostinato.state
from ostinato.errors import ConfigurationError
from ostinato.layers.routing import Routed, Router, choose, gather_outputs, hashed_choice, packed_resets, route_tokens
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.registry import mixer, mixer_class

ROUTERS = ("learned", "frozen", "hash")

# What all memories of a layer share: what asks and what reads out. Every other linear map writes, and is per memory.
_READING = {"to_queries", "to_gate", "to_output"}


class MixtureState(NamedTuple):
    """The base mixer's state of every memory, (batch, memories, …), and of the shared memory (None without one)."""

    memories: Any
    shared: Any


class StackedLinear(nn.Module):
    """n linear maps for a batch whose rows take turns: row r goes through map r mod n."""

    def __init__(self, maps: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([one.weight.detach() for one in maps]))
        biases = [one.bias.detach() for one in maps if one.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """(rows, time, in) -> (rows, time, out)."""
        count = self.weight.shape[0]
        if count == 1:
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        y = torch.einsum("rnti,noi->rnto", x.unflatten(0, (-1, count)), self.weight)
        return (y if self.bias is None else y + self.bias.unsqueeze(1)).flatten(0, 1)


class _Memories(nn.Module):
    """The base mixer, its writing maps stacked; called like a module, so that it can be given other parameters."""

    def __init__(self, bases: list[Mixer]) -> None:
        super().__init__()
        self.base = bases[0]
        self.stacked: list[str] = []
        if len(bases) == 1:
            return
        for name, module in list(self.base.named_modules()):
            if isinstance(module, nn.Linear) and not _READING & set(name.split(".")):
                owner = self.base.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], StackedLinear([base.get_submodule(name) for base in bases]))
                self.stacked += [f"base.{name}.{part}" for part, _ in module.named_parameters()]

    def forward(self, x: Tensor, state: Any, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return self.base.remember(x, state, reset, lengths)  # type: ignore[operator]

    def only(self, which: Any, *arguments: Any) -> tuple[Tensor, Any]:
        """The recurrence with the writing maps of some memories: the rows of the batch take turns among them."""
        if not self.stacked:
            return self(*arguments)
        # Not get_parameter: inside another functional call it need not be one.
        return functional_call(self, {name: attrgetter(name)(self)[which] for name in self.stacked}, arguments)


class MixtureOfMemories(Mixer):
    """o_t = Σ_{m ∈ I_t} g_t^m (S_t^m)ᵀ q_t (+ o_t of the shared memory); then the base mixer's way out.

    s = softmax(W_r x) over the memories, I the `top_k` largest, g = s renormalised over I. For m ∈ I the base mixer's
    recurrence with keys, values and gates of memory m; for the others S_t^m = S_{t−1}^m. Queries, convolution, decay
    rates, norm and output are shared. The shared memory sees every token, with keys, values and gates of its own.

    The choice has no gradient; the router learns through g (with `top_k` = 1 it does not: g is 1) and through
    `ostinato.training.load_balance`.

    Args:
        d_model: width.
        base: a mixer with a matrix memory: "gated_delta_net", "gla", "linear_attention", "gated_slot_attention", …
        memories: M, how many a token is routed among.
        top_k: how many it is sent to.
        shared_memory: whether there is one more that sees all tokens.
        shared_projections: one set of keys, values and gates for all memories, the shared one too.
        router: "learned"; "frozen", as it was drawn; "hash", by the token id, with equal shares.
        capacity: None drops nothing. A number c is the authors' early variant: a memory takes at most
            ceil(c · time / top_k) tokens of a call, and drops the oldest beyond; later tokens then decide about
            earlier ones, so causality and streaming hold only where nothing is dropped.
        heads, expand_k, expand_v, conv, negative_eigenvalues: the base mixer's; None keeps its default.

    Raises `ConfigurationError` for a base without a matrix memory or without an option that was set.
    """

    traits = Traits(
        engine="delta_rule",
        transition="data scalar × rank-1",
        input_gate="beta",
        state="(memories + 1) × (heads × key_dim × value_dim, taps × channels)",
        channel_mixing=True,
        paper="MoM (arXiv 2502.13685)",
    )

    def __init__(
        self,
        d_model: int,
        base: str = "gated_delta_net",
        memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        shared_projections: bool = False,
        router: str = "learned",
        capacity: float | None = None,
        heads: int = 4,
        expand_k: float | None = None,
        expand_v: float | None = None,
        conv: int | None = None,
        negative_eigenvalues: bool | None = None,
    ) -> None:
        super().__init__(d_model)
        if not 1 <= top_k <= memories:
            raise ConfigurationError(f"top_k must be in 1 … memories={memories}, got {top_k}")
        if router not in ROUTERS:
            raise ConfigurationError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
        if capacity is not None and capacity <= 0:
            raise ConfigurationError(f"capacity is a positive number, or None to drop nothing, got {capacity}")
        cls = mixer_class(base)
        if not hasattr(cls, "remember"):
            raise ConfigurationError(f"{base!r} has no matrix memory to make several of; take 'gated_delta_net', say")
        asked = {"expand_k": expand_k, "expand_v": expand_v, "conv": conv, "negative_eigenvalues": negative_eigenvalues}
        options = {name: value for name, value in asked.items() if value is not None}
        if odd := options.keys() - inspect.signature(cls).parameters.keys():
            raise ConfigurationError(f"the base {base!r} has no option {', '.join(sorted(odd))}")
        copies = 1 if shared_projections else memories + shared_memory
        self.memories = _Memories([mixer(base, d_model, heads=heads, **options) for _ in range(copies)])
        self.count, self.top_k, self.shared_memory = memories, top_k, shared_memory
        self.capacity, self.routing = capacity, router
        self.router = None if router == "hash" else Router(d_model, memories)
        if self.router is not None and router == "frozen":
            self.router.requires_grad_(False)
        if router == "hash":
            self.needs = ("tokens",)  # type: ignore[misc]
        inner = cls.traits
        self.traits = replace(inner, state=f"(memories + 1) × ({inner.state})", paper=type(self).traits.paper)
        # A stack of biases has two axes; it is not to be decayed all the same.
        self.no_weight_decay = frozenset(  # type: ignore[misc]
            f"memories.{name}" for name in self.memories.stacked if name.endswith("bias")
        )

    @property
    def base(self) -> Mixer:
        """The mixer that is mixed; its writing maps hold all memories', stacked, the shared memory's last."""
        return self.memories.base

    @property
    def to_output(self) -> nn.Module:
        """W_o, the base mixer's."""
        return self.base.to_output  # type: ignore[return-value]

    @property
    def to_gate(self) -> nn.Module | None:
        """W_g, the base mixer's."""
        return getattr(self.base, "to_gate", None)

    def initial_state(self, batch_size: int) -> MixtureState:
        """Zeros."""
        every = self.base.initial_state(batch_size * self.count)
        shared = self.base.initial_state(batch_size) if self.shared_memory else None
        return MixtureState(ostinato.state.map(lambda leaf: leaf.unflatten(0, (-1, self.count)), every), shared)

    def mix(
        self, x: Tensor, state: MixtureState, reset: Tensor | None, tokens: Tensor | None = None
    ) -> tuple[Tensor, MixtureState]:
        """The recurrence, over the whole sequence."""
        if self.router is None:
            assert tokens is not None
            weights, chosen = hashed_choice(tokens, self.count, self.top_k)
        else:
            weights, chosen = choose(self.router(x), self.top_k)
        few = x.shape[1] == 1 and x.shape[0] * self.top_k <= self.count and reset is None
        mixed = self._step(x, weights, chosen, state) if few else self._sequence(x, weights, chosen, state, reset)
        return self.base.read_out(mixed[0], x), mixed[1]  # type: ignore[operator]

    def _sequence(
        self, x: Tensor, weights: Tensor, chosen: Tensor, state: MixtureState, reset: Tensor | None
    ) -> tuple[Tensor, MixtureState]:
        """The tokens of every memory side by side: (batch · memories, length)."""
        room = None if self.capacity is None else max(1, -int(-self.capacity * x.shape[1] // self.top_k))
        routed: Routed = route_tokens(x, chosen, self.count, room)
        packed, lengths, before, lists = routed.packed, routed.lengths, state.memories, self.count
        begins = stale = None
        if reset is not None:
            begins, stale = packed_resets(reset, routed)
        # Lists as long as the whole take the shared memory's beside them: one call where there would be two.
        together = self.shared_memory and packed.shape[2] == x.shape[1]
        if together:
            lists += 1
            packed, lengths = _beside(packed, x), _beside(lengths, lengths.new_full(lengths.shape[:1], x.shape[1]))
            before = ostinato.state.map(_beside, before, state.shared)
            begins = None if begins is None or reset is None else _beside(begins, reset)
        outputs, after = self.memories.only(
            slice(0, lists),
            packed.flatten(0, 1),
            ostinato.state.map(lambda leaf: leaf.flatten(0, 1), before),
            None if begins is None else begins.flatten(0, 1),
            lengths.flatten(),
        )
        outputs = outputs.unflatten(0, (-1, lists))
        after = ostinato.state.map(lambda leaf: leaf.unflatten(0, (-1, lists)), after)

        def own(leaf: Tensor) -> Tensor:
            leaf = leaf[:, : self.count]
            return leaf if stale is None else leaf.masked_fill(stale.view(*stale.shape, *[1] * (leaf.ndim - 2)), 0)

        mixed = gather_outputs(outputs[:, : self.count].flatten(3), routed, weights).unflatten(-1, outputs.shape[3:])
        every = ostinato.state.map(own, after)
        if not together:
            return self._with_shared(mixed, every, x, state, reset)
        return mixed + outputs[:, -1], MixtureState(every, ostinato.state.map(lambda leaf: leaf[:, -1], after))

    def _with_shared(
        self, mixed: Tensor, every: Any, x: Tensor, state: MixtureState, reset: Tensor | None
    ) -> tuple[Tensor, MixtureState]:
        """What the shared memory adds, in a call of its own."""
        if not self.shared_memory:
            return mixed, MixtureState(every, None)
        own, shared = self.memories.only(slice(self.count, None), x, state.shared, reset, None)
        return mixed + own, MixtureState(every, shared)

    def _step(self, x: Tensor, weights: Tensor, chosen: Tensor, whole: MixtureState) -> tuple[Tensor, MixtureState]:
        """One step of few rows: the chosen memories and their maps alone are touched."""
        index, state = chosen[:, 0], whole.memories

        def spread(leaf: Tensor) -> Tensor:
            return index.view(*index.shape, *[1] * (leaf.ndim - 2)).expand(-1, -1, *leaf.shape[2:])

        before = ostinato.state.map(lambda leaf: leaf.gather(1, spread(leaf)).flatten(0, 1), state)
        outputs, after = self.memories.only(index.flatten(), x.repeat_interleave(self.top_k, 0), before, None, None)
        outputs = outputs.unflatten(0, (-1, self.top_k)) * weights[:, 0, :, None, None, None].to(outputs.dtype)
        after = ostinato.state.map(
            lambda old, new: old.scatter(1, spread(old), new.unflatten(0, (-1, self.top_k)).to(old.dtype)), state, after
        )
        return self._with_shared(outputs.sum(1), after, x, whole, None)


def _beside(lists: Tensor, one: Tensor) -> Tensor:
    """(batch, memories, …) and one more, (batch, …)."""
    return torch.cat([lists, one.unsqueeze(1)], dim=1)
