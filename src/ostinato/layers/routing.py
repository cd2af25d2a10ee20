"""Routing: which of several memories a token goes to, the tokens of each memory side by side, and the way back.

    logits = router(x)
    weights, chosen = choose(logits, top_k)
    routed = route_tokens(x, chosen, num_memories)     # routed.packed: (batch, memories, length, d_model)
    y = gather_outputs(outputs_of_the_memories, routed, weights)

Source: Mixture-of-Memories (arXiv 2502.13685), section 3; the loss: its `aux` term, after Switch (arXiv 2101.03961).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.checks import accumulation_dtype


class Router(nn.Module):
    """Logits W_r x over the memories, in float32 at least whatever the type of x."""

    def __init__(self, d_model: int, memories: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(d_model, memories, bias=False).weight.detach())

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time memories"]:
        """The logits."""
        wide = accumulation_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


def choose(
    logits: Float[Tensor, "batch time memories"], top_k: int
) -> tuple[Float[Tensor, "batch time chosen"], Int[Tensor, "batch time chosen"]]:
    """The `top_k` likeliest memories, likeliest first, and their shares: softmax over all, renormalised over them.

    Among equals the first one wins, so that a token is routed alike in a sequence and in a step.
    """
    chosen = logits.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    shares = logits.softmax(dim=-1).gather(-1, chosen)
    return shares / shares.sum(-1, keepdim=True), chosen


def hashed_choice(
    tokens: Int[Tensor, "batch time"], memories: int, top_k: int
) -> tuple[Float[Tensor, "batch time chosen"], Int[Tensor, "batch time chosen"]]:
    """A choice that nothing learns: `top_k` memories by a hash of the token id, with equal shares."""
    memory = torch.arange(memories, device=tokens.device)
    mixed = (tokens.unsqueeze(-1) * 2654435761 + memory * 1013904223 + 12345) % 2**31
    mixed = ((mixed ^ (mixed >> 15)) * 73244475) % 2**31
    mixed = mixed ^ (mixed >> 13)
    chosen = mixed.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    return torch.full(chosen.shape, 1 / top_k, device=tokens.device), chosen


class Routed(NamedTuple):
    """Tokens side by side by memory, in their order in time, and where each has gone."""

    packed: Float[Tensor, "batch memories length d_model"]
    """The tokens of each memory; padding behind them."""
    lengths: Int[Tensor, "batch memories"]
    """How many they are."""
    order: Int[Tensor, "batch memories length"]
    """Which step each is; anything in the padding."""
    place: Int[Tensor, "batch time chosen"]
    """Where the token is in the list of each memory that it chose."""
    kept: Bool[Tensor, "batch time chosen"] | None
    """False where a memory had no room; None if nothing is dropped."""
    chosen: Int[Tensor, "batch time chosen"]
    """The memories that each token chose."""


def longest(lengths: Int[Tensor, "batch memories"], time: int) -> int:
    """The length of the longest list: looked at where a value can be, else `time`, which is always enough."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (lengths.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return time
    return max(1, int(lengths.max()))


def route_tokens(
    x: Float[Tensor, "batch time d_model"],
    chosen: Int[Tensor, "batch time chosen"],
    memories: int,
    capacity: int | None = None,
) -> Routed:
    """Every token put into the list of each memory that it chose; lists keep the order of time.

    Args:
        x: the tokens.
        chosen: distinct memories per token, from 0.
        memories: how many there are.
        capacity: the most tokens of a list; the oldest beyond it are dropped. None drops nothing.

    Raises `ShapeError` where `chosen` does not fit x, `ConfigurationError` for a capacity below 1.
    """
    if chosen.shape[:2] != x.shape[:2]:
        raise ShapeError(f"chosen has shape {tuple(chosen.shape)}, x {tuple(x.shape)}: batch and time must agree")
    if capacity is not None and capacity < 1:
        raise ConfigurationError(f"a memory's capacity must be at least 1, got {capacity}")
    time = x.shape[1]
    goes = (chosen.unsqueeze(-1) == torch.arange(memories, device=x.device)).any(-2)
    lengths = goes.sum(1)
    place = (goes.long().cumsum(1) - 1).gather(-1, chosen)
    # Stable: those that come, in the order of time, then the others.
    order = (~goes).mT.to(torch.int8).argsort(dim=-1, stable=True)
    kept = None
    if capacity is None:
        order = order[..., : longest(lengths, time)]
    else:
        size = min(capacity, time)
        dropped = (lengths - size).clamp(min=0)
        order = order.gather(-1, dropped.unsqueeze(-1) + torch.arange(size, device=x.device))
        place = place - dropped.unsqueeze(1).expand(-1, time, -1).gather(-1, chosen)
        kept, lengths = place >= 0, lengths.clamp(max=size)
    index = order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    packed = x.unsqueeze(1).expand(-1, memories, -1, -1).gather(2, index)
    return Routed(packed, lengths, order, place, kept, chosen)


def gather_outputs(
    outputs: Float[Tensor, "batch memories length width"], routed: Routed, weights: Float[Tensor, "batch time chosen"]
) -> Float[Tensor, "batch time width"]:
    """Σ over the chosen memories of weight × output, every token's own; what was dropped counts as zero."""
    length, width = outputs.shape[2:]
    batch, time, count = routed.chosen.shape
    index = (routed.chosen * length + routed.place.clamp(min=0)).flatten(1)
    own = outputs.flatten(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, width)).view(batch, time, count, width)
    weights = weights.to(outputs.dtype)
    if routed.kept is not None:
        weights = weights * routed.kept
    return (own * weights.unsqueeze(-1)).sum(2)


def packed_resets(
    reset: Bool[Tensor, "batch time"], routed: Routed
) -> tuple[Bool[Tensor, "batch memories length"], Bool[Tensor, "batch memories"]]:
    """Resets as the lists see them: the first token of each new sequence; and the memories that no token reached since.

    A reset concerns every memory, those too that its token did not choose: the latter must end empty.
    """
    sequence = reset.long().cumsum(1)
    memories = routed.order.shape[1]
    own = sequence.unsqueeze(1).expand(-1, memories, -1).gather(2, routed.order)
    begins = own != F.pad(own[..., :-1], (1, 0))
    last = F.pad(own, (1, 0)).gather(2, routed.lengths.unsqueeze(-1)).squeeze(-1)
    padded = torch.arange(own.shape[2], device=own.device) >= routed.lengths.unsqueeze(-1)
    return begins & ~padded, last != sequence[:, -1:]


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_memories: int,
    top_k: int,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    """M Σ_slot Σ_m f_{slot,m} P_m over the rows of all layers: `top_k` if the load is balanced, more if not.

    f is the fraction of rows whose slot-th choice is m, P the mean probability of m; the gradient goes through P.

    Args:
        router_logits: of one layer, or of each layer, (…, memories).
        num_memories, top_k: M, and how many memories a token chooses.
        mask: False at padding, which does not count; the same for all layers.

    Raises `ConfigurationError` for no layers, `ShapeError` for logits over another number of memories.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers:
        raise ConfigurationError("there are no router logits: does the model have a mixture of memories?")
    if wrong := [tuple(logits.shape) for logits in layers if logits.shape[-1] != num_memories]:
        raise ShapeError(f"router logits end with {num_memories} memories, got shape {wrong[0]}")
    rows = torch.cat([logits.flatten(0, -2) for logits in layers])
    counted = torch.ones_like(rows[:, :1])
    if mask is not None:
        counted = mask.flatten().repeat(len(layers)).unsqueeze(-1).to(rows)
    total = counted.sum().clamp(min=1)
    _, chosen = choose(rows.unsqueeze(0), top_k)
    memory = torch.arange(num_memories, device=rows.device)
    taken = (chosen[0].unsqueeze(-1) == memory).to(rows) * counted.unsqueeze(-1)
    fractions = taken.sum(0) / total
    probability = (rows.softmax(-1) * counted).sum(0) / total
    return num_memories * (fractions * probability).sum()


def router_load(logits: Float[Tensor, "... memories"], top_k: int) -> Float[Tensor, " memories"]:
    """The share of tokens that choose each memory: top_k / memories if balanced."""
    _, chosen = choose(logits.flatten(0, -2).unsqueeze(0), top_k)
    memory = torch.arange(logits.shape[-1], device=logits.device)
    return (chosen[0].unsqueeze(-1) == memory).any(1).double().mean(0)


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that the logits of every router are appended to, layer by layer, while the block runs."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: found.append(output))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
