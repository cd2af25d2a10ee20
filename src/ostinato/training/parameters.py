"""Which parameters take weight decay, and which a lower learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ostinato.mixers.base import Mixer


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser; each names its parameters under "names".

    Not decayed: parameters of fewer than two axes (biases, norms, scalars), embeddings, and what a mixer declares in
    `no_weight_decay`. What a mixer declares in `learning_rate_cap` gets at most that rate (S4's and Mamba's
    transitions and steps: Gu et al. 2022, arXiv 2111.00396, appendix). Frozen parameters are left out.
    """
    no_decay: set[int] = set()
    caps: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            no_decay.add(id(module.weight))
        if isinstance(module, Mixer):
            for name, parameter in module.named_parameters():
                if name in module.no_weight_decay:
                    no_decay.add(id(parameter))
                if name in module.learning_rate_cap:
                    caps[id(parameter)] = module.learning_rate_cap[name]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in no_decay else weight_decay
        rate = min(learning_rate, caps.get(id(parameter), learning_rate))
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
