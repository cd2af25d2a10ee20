"""Which recurrences can count modulo two? Train a few on parity, and test them on longer sequences.

    python examples/who_can_count.py [--steps 400]

A linear recurrence whose transition has only positive eigenvalues cannot (Grazzi et al. 2024, arXiv 2411.12537); the
same with eigenvalues in [−1, 1] can, and so can a nonlinear one. The table shows how far each gets here.
"""

from __future__ import annotations

import argparse

import torch

import ostinato

MIXERS = ("lstm", "gla", "delta_net", "delta_net(negative_eigenvalues=True)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test-size", type=int, default=128)
    arguments = parser.parse_args()

    task = ostinato.task("parity", max_length=20, tested_lengths=(20, 80), test_size=arguments.test_size)
    for name, value in task.baselines().items():
        print(f"{'baseline: ' + name:40} {value:6.3f}")
    for plan in MIXERS:
        torch.manual_seed(0)
        model = ostinato.LanguageModel(d_model=32, plan=plan, depth=2, tie_embeddings=False)
        history = ostinato.fit(model, task, steps=arguments.steps, evaluate_every=0, progress=False)
        scores = history.evaluations[-1].metrics
        row = "   ".join(f"length {n}: {scores[f'scaled_accuracy/length {n}']:6.3f}" for n in task.test_lengths)
        print(f"{plan:40} {row}", flush=True)


if __name__ == "__main__":
    main()
