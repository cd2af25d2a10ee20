"""Attention transfer: a converted model's new parameters learn to give what softmax attention gave, layer by layer.

    L = (1/L) Σ_l mean (mixer_l(h_l) − attention_l(h_l))²,    h_l the input that layer l has in the original

Source: LoLCATs (arXiv 2410.10254), section 3.1. Every layer is taught on the original's own inputs, so that the layers
do not depend on each other and no gradient goes through the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.models.language import LanguageModel


def transfer_attention(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Iterable[Int[Tensor, "batch time"]],
    *,
    learning_rate: float = 1e-2,
) -> list[float]:
    """One update of AdamW for each batch of tokens; the losses.

    Args:
        student: a conversion of the teacher; the parameters that the teacher has not are learned, in place, all others
            stay, and whether they require gradients is left as it was.
        teacher: with the same blocks, on the same device; not changed.
        batches: of tokens.
        learning_rate: constant.

    On a CUDA device products are in bfloat16 (autocast). Raises `ConfigurationError` if there is nothing to learn.
    """
    known = dict(teacher.named_parameters())
    new = [parameter for name, parameter in student.named_parameters() if name not in known]
    if not new:
        raise ConfigurationError(
            f"the plan {student.config['plan']!r} has no parameters that {teacher.config['plan']!r} has not: "
            "nothing to learn by transfer"
        )
    before = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    student.requires_grad_(False)
    for parameter in new:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(new, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    device = student.device
    losses = []
    try:
        for tokens in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses.append(_teach(student, teacher, tokens.to(device)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        for parameter, learned in before:
            parameter.requires_grad_(learned)
    return [float(loss) for loss in losses]


def _teach(student: LanguageModel, teacher: LanguageModel, tokens: Tensor) -> Tensor:
    """Leave the gradient of the loss in the parameters, one layer after the other; the loss."""
    with torch.no_grad():
        x = teacher.embedding(tokens)
    total = x.new_zeros(())
    blocks: list[tuple[Any, Any]] = list(zip(student.backbone.blocks, teacher.backbone.blocks, strict=True))
    for own, theirs in blocks:
        with torch.no_grad():
            inputs = theirs.norm(x)
            wanted, _ = theirs.mixer(inputs)
        if any(parameter.requires_grad for parameter in own.mixer.parameters()):
            found, _ = own.mixer(inputs)
            loss = F.mse_loss(found.float(), wanted.float()) / len(blocks)
            loss.backward()
            total = total + loss.detach()
        with torch.no_grad():
            x = x + wanted
            if theirs.channel_mixer is not None:
                x = x + theirs.channel_mixer(theirs.channel_norm(x))
    return total
