"""The loss of a prompt read as a whole: what is asked where."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ostinato.errors import ConfigurationError
from ostinato.training.prefix_objective import mask_prefix, prefix_lm_loss


def test_the_loss_asks_masks_in_the_prefix_and_what_follows_after_it() -> None:
    logits = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 7))
    masked = torch.zeros(2, 7, dtype=torch.bool)
    masked[0, 1] = masked[1, 2] = True
    loss = prefix_lm_loss(logits, tokens, 4, masked)
    following = cross_entropy(logits[:, 4:6].flatten(0, 1), tokens[:, 5:].flatten())
    hidden = cross_entropy(torch.stack([logits[0, 1], logits[1, 2]]), torch.stack([tokens[0, 1], tokens[1, 2]]))
    assert torch.allclose(loss, following + 0.25 * hidden)
    (gradient,) = torch.autograd.grad(loss, logits)
    asked = gradient.abs().sum(-1) > 0
    assert asked.tolist() == [
        [False, True, False, False, True, True, False],
        [False, False, True, False, True, True, False],
    ]
    none = torch.zeros_like(masked)
    assert torch.allclose(prefix_lm_loss(logits, tokens, 4, none), following)


def test_a_share_of_the_prefix_is_masked() -> None:
    tokens = torch.randint(3, 9, (64, 100))
    read, masked = mask_prefix(tokens, 60, 2, generator=torch.Generator().manual_seed(0))
    assert not masked[:, 60:].any() and (read[masked] == 2).all() and torch.equal(read[~masked], tokens[~masked])
    assert masked[:, :60].double().mean() == pytest.approx(0.15, abs=0.02)


def test_what_cannot_be_asked_is_said() -> None:
    logits, tokens = torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConfigurationError, match="leaves nothing to predict"):
        prefix_lm_loss(logits, tokens, 3, tokens > 0)
    with pytest.raises(ConfigurationError, match="in the prefix alone"):
        prefix_lm_loss(logits, tokens, 1, tokens == 0)
