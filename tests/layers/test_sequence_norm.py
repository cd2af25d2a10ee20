"""The batch norm of sequences: its formula, its running averages, and what a layer norm would lose."""

from __future__ import annotations

import torch

from ostinato.layers.sequence_norm import SequenceBatchNorm


def test_the_formula_in_training_and_in_evaluation() -> None:
    norm, x = SequenceBatchNorm(3).double(), 2 + 5 * torch.randn(4, 7, 3, dtype=torch.float64)
    mean, variance = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    norm.eval()
    y = torch.randn(1, 1, 3, dtype=torch.float64)
    running = 0.9 + 0.1 * x.var((0, 1), unbiased=True)
    torch.testing.assert_close(norm(y), (y - 0.1 * mean) / (running + 1e-5).sqrt(), rtol=0, atol=1e-12)


def test_a_loud_step_stays_loud() -> None:
    """One step ten times the size of the others: a layer norm makes them equal, this one does not."""
    x = torch.randn(8, 50, 16, dtype=torch.float64)
    x[:, 20] *= 10
    loudness = [
        norm.double()(x).detach().norm(dim=-1).mean(0) for norm in (SequenceBatchNorm(16), torch.nn.LayerNorm(16))
    ]
    others = torch.arange(50) != 20
    ratios = [float(step[20] / step[others].mean()) for step in loudness]
    assert ratios[0] > 8 and abs(ratios[1] - 1) < 0.01
