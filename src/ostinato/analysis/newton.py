"""How Newton's method fares on a cell: the error after each iteration, and how many iterations a tolerance takes.

problem = random_problem("para_gru", time=1024, width=16)
errors_by_iteration(problem, range(6))      # max |h^k − h|, h by the loop in float64
attempt(problem, method="elk").peak         # a solve that is allowed to fail
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.cells import GRU, Cell, Elman, ParaGRU, ParaLSTM, Weights
from ostinato.ops.newton_scan import NewtonReport, newton_scan
from ostinato.ops.recurrent_scan import recurrent_scan
from ostinato.ops.routes import backend

CELLS = ("para_gru", "para_lstm", "gru", "tanh")


class Problem(NamedTuple):
    """A cell with weights, and the pre-activations that its inputs give."""

    cell: Cell
    weights: Weights
    inputs: Tensor

    def to(self, target: torch.dtype | torch.device) -> Problem:
        """The same in another type or on another device."""
        return Problem(self.cell, tuple(weight.to(target) for weight in self.weights), self.inputs.to(target))


def random_problem(
    name: str,
    time: int,
    width: int,
    *,
    batch: int = 1,
    weight_scale: float | None = None,
    bound: float | None = 0.5,
    input_scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """A cell of random weights under Gaussian pre-activations N(0, input_scale²), in float64.

    para_gru, para_lstm: recurrent weights and peepholes N(0, weight_scale²), by default 1/√width, clamped to ±bound
    (None does not clamp). gru: uniform in ±weight_scale, by default 1/√width, as PyTorch's; zero recurrent bias.
    tanh: N(0, weight_scale²/width), by default of gain 1.5.

    Raises `ConfigurationError` for another name. Source: ParaRNN (arXiv 2510.21450), appendix C.1, for the scales.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = (1.5 if name == "tanh" else 1 / math.sqrt(width)) if weight_scale is None else weight_scale
    if name in ("para_gru", "para_lstm"):
        weights = [scale * normal(3, width)]
        if name == "para_lstm":
            weights.append(scale * normal(2, width))
        if bound is not None:
            weights = [weight.clamp(-bound, bound) for weight in weights]
        cell: Cell = ParaGRU() if name == "para_gru" else ParaLSTM()
        return Problem(cell, tuple(weights), input_scale * normal(batch, time, 3, width))
    if name == "gru":
        recurrent = scale * (2 * torch.rand(3, 1, width, width, generator=generator, dtype=torch.float64) - 1)
        return Problem(
            GRU(), (recurrent, recurrent.new_zeros(1, width)), input_scale * normal(batch, time, 3, 1, width)
        )
    if name == "tanh":
        recurrent = scale / math.sqrt(width) * normal(1, 1, width, width)
        return Problem(Elman(), (recurrent,), input_scale * normal(batch, time, 1, 1, width))
    raise ConfigurationError(f"there is no cell {name!r} to draw a problem for; choose one of {', '.join(CELLS)}")


@torch.no_grad()
def errors_by_iteration(
    problem: Problem,
    iterations: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    method: str = "newton",
    **options: Any,
) -> list[float]:
    """max |h^k − h| over all steps for each number k of iterations made in `dtype`; h is the loop's, in float64.

    Iterates that are not finite count as infinitely wrong. `options` are those of `newton_scan`.
    """
    exact, _ = recurrent_scan(*problem)
    cell, weights, inputs = problem.to(dtype)
    found = []
    for count in iterations:
        with backend(newton_scan="parallel"):  # Kernels return the solution, not the iterates.
            outputs, _ = newton_scan(cell, weights, inputs, method=method, iterations=count, check=False, **options)
        found.append(float((outputs.double() - exact).abs().nan_to_num(torch.inf, torch.inf).amax()))
    return found


@torch.no_grad()
def attempt(problem: Problem, *, method: str = "newton", max_iterations: int = 300, **options: Any) -> NewtonReport:
    """The report of a solve to the tolerance, converged or not. `options` are those of `newton_scan`."""
    with backend(newton_scan="parallel"):
        *_, report = newton_scan(
            *problem, method=method, max_iterations=max_iterations, check=False, return_report=True, **options
        )
    return report
