"""The sequence autoencoder: everything passes through one vector, and seeds train together."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.models.sequence_autoencoder import SequenceAutoencoder, sinusoids
from ostinato.tasks.compression import Compression
from ostinato.training.ensemble import fit_together
from ostinato.training.evaluate import evaluate


def test_sinusoids_are_the_formula() -> None:
    found = sinusoids(5, 6, torch.zeros(1, dtype=torch.float64))
    rates = [1.0, 10000**-0.5, 10000**-1.0]
    wanted = [[torch.tensor(p * w).sin() for w in rates] + [torch.tensor(p * w).cos() for w in rates] for p in range(5)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)
    assert sinusoids(3, 2, torch.zeros(1)).shape == (3, 2)


def test_only_the_last_output_is_told_again() -> None:
    torch.manual_seed(0)
    model = SequenceAutoencoder(7, 16, "gla(heads=2)", 2)
    tokens = torch.randint(0, 7, (3, 10))
    logits, state = model(tokens)
    assert logits.shape == (3, 10, 7)
    code, _ = model.encode(tokens)
    torch.testing.assert_close(model.decode(code, 10), logits)
    # In pieces: the code is that of the state, and so is what is told of the last piece's length.
    _, first = model(tokens[:, :6])
    pieces, after = model.encode(tokens[:, 6:], first)
    torch.testing.assert_close(pieces, code)
    torch.testing.assert_close(after[0].memory, state[0].memory)
    # One code for all positions: with the positions taken away, all logits are the same.
    logits = model.decoder(code.unsqueeze(1).expand(-1, 4, -1))
    torch.testing.assert_close(logits[:, 0], logits[:, 3])


def test_a_few_tokens_are_learned() -> None:
    task = Compression(symbols=4, length=5, test_size=128)
    ensemble = fit_together(
        lambda _: SequenceAutoencoder(task.vocab_size, 32, "delta_net(heads=2)", 2),
        task,
        [0, 1],
        steps=150,
        batch_size=32,
        learning_rate=3e-3,
    )
    scores = [evaluate(model, task)["accuracy"] for model in ensemble]
    assert min(scores) > 0.8 > task.chance


@pytest.mark.parametrize(("vocabulary", "width"), [(0, 8), (4, 0), (4, 7)])
def test_sizes_that_cannot_be(vocabulary: int, width: int) -> None:
    with pytest.raises(ConfigurationError, match="even"):
        SequenceAutoencoder(vocabulary, width, "gla")
