"""A recurrence of your own: write it, hold it to the law, train a hybrid with it.

    python examples/own_mixer.py [--steps 200]

The recurrence is an exponential moving average at several speeds, whose speeds are learned.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ostinato
from ostinato.ops import diagonal_scan
from ostinato.testing import check_mixer


class AverageState(NamedTuple):
    averages: Tensor  # (batch, speeds, d_model)


class Averages(ostinato.Mixer):
    """a_t = λ ⊙ a_{t−1} + (1 − λ) ⊙ x_t for each of several λ; y_t = W [a_t of all speeds]."""

    traits = ostinato.Traits(
        engine="diagonal_scan", transition="fixed vector", input_gate="tied", state="speeds × d_model"
    )
    no_weight_decay = frozenset({"rate"})

    def __init__(self, d_model: int, speeds: int = 4) -> None:
        super().__init__(d_model)
        self.speeds = speeds
        self.rate = nn.Parameter(torch.linspace(0.0, 5.0, speeds)[:, None].repeat(1, d_model))
        self.to_output = nn.Linear(speeds * d_model, d_model)

    def initial_state(self, batch_size: int) -> AverageState:
        return AverageState(self.zeros(batch_size, self.speeds, self.d_model))

    def mix(self, x: Tensor, state: AverageState, reset: Tensor | None) -> tuple[Tensor, AverageState]:
        decay = torch.sigmoid(self.rate)
        inputs = (1 - decay) * x.unsqueeze(2)  # (batch, time, speeds, d_model)
        averages, last = diagonal_scan(decay.expand_as(inputs), inputs, state.averages, reset=reset)
        return self.to_output(averages.flatten(2)), AverageState(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    report = check_mixer(Averages(16), compile=False)
    print(report.table(report.worst()))

    ostinato.register("averages", Averages, check=False)  # it has just been checked
    model = ostinato.LanguageModel(d_model=64, plan="averages, gated_delta_net", depth=2)
    history = ostinato.fit(model, ostinato.task("text", window=64), steps=arguments.steps, batch_size=8)
    print(f"{history.final:.2f} bits per byte after {arguments.steps} steps")


if __name__ == "__main__":
    main()
