"""An even load for a mixture of memories: the routers' balance loss, added to whatever is minimised.

    fit(model, task, objective=balanced(task_loss))

Source: MoM (arXiv 2502.13685), section 3.3; weight 0.01 as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.layers.routing import load_balancing_loss, router_load, router_logits
from ostinato.mixers.mom import MixtureOfMemories
from ostinato.tasks.base import Batch, Task
from ostinato.training.plugs import Objective, task_loss


@contextmanager
def load_balance(model: nn.Module, weight: float = 0.01) -> Iterator[Callable[[], Tensor]]:
    """Around a forward pass: a function for the term to add, weight × the loss over all layers' routers together.

    Layers of different sizes (memories, top_k) are groups of their own, whose losses are averaged.

    Raises `ConfigurationError` for a model without a learned router, and where nothing was computed in the block.
    """
    kinds = _routed(model)
    with router_logits(model) as found:

        def term() -> Tensor:
            if len(found) != len(kinds):
                raise ConfigurationError(
                    f"{len(kinds)} routers were to speak once each, {len(found)} did: one forward pass, then the term"
                )
            groups: dict[tuple[int, int], list[Tensor]] = {}
            for kind, logits in zip(kinds, found, strict=True):
                groups.setdefault(kind, []).append(logits)
            losses = [load_balancing_loss(layers, *kind) for kind, layers in groups.items()]
            return weight * torch.stack(losses).mean()

        yield term


def balanced(objective: Objective = task_loss, weight: float = 0.01) -> Objective:
    """The objective plus `weight` × the routers' balance loss, for `fit` and for every gradient rule."""

    def with_balance(model: nn.Module, task: Task, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        with load_balance(model, weight) as term:
            loss, state = objective(model, task, batch, state)
            return loss + term(), state

    return with_balance


@torch.no_grad()
def loads(model: nn.Module, *inputs: Any) -> list[list[float]]:
    """The share of tokens that choose each memory, layer by layer, when the model reads `inputs`."""
    kinds = _routed(model)
    with router_logits(model) as found:
        model(*inputs)
    return [router_load(logits, top_k).tolist() for (_, top_k), logits in zip(kinds, found, strict=True)]


def _routed(model: nn.Module) -> list[tuple[int, int]]:
    kinds = [
        (module.count, module.top_k)
        for module in model.modules()
        if isinstance(module, MixtureOfMemories) and module.router is not None
    ]
    if not kinds:
        raise ConfigurationError("this model has no mixture of memories with a router (the mixer 'mom')")
    return kinds
