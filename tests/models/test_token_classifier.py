from __future__ import annotations

import pytest
import torch

import ostinato.state
from ostinato.errors import ConfigurationError
from ostinato.models.token_classifier import TokenClassifier


def test_it_obeys_the_law() -> None:
    model = TokenClassifier(5, 8, "delta_net(heads=2), min_gru", num_classes=3).double()
    tokens = torch.randint(0, 5, (2, 9))
    whole, last = model(tokens)
    assert whole.shape == (2, 9, 3)
    first, state = model(tokens[:, :4], model.initial_state(2))
    second, state = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-9, rtol=0)
    for (_, ours), (_, wanted) in zip(ostinato.state.leaves(state), ostinato.state.leaves(last), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=0)


def test_reset_forgets() -> None:
    model = TokenClassifier(5, 8, "lstm").double()
    tokens = torch.randint(0, 5, (1, 6))
    reset = torch.tensor([[False, False, True, False, False, False]])
    torch.testing.assert_close(model(tokens, reset=reset)[0][:, 2:], model(tokens[:, 2:])[0])


def test_embedding_starts_at_variance_one() -> None:
    assert abs(float(TokenClassifier(200, 64, "min_gru").embedding.weight.detach().std()) - 1) < 0.05


def test_sizes_are_positive() -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        TokenClassifier(3, 8, "min_gru", num_classes=0)
