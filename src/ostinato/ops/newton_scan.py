"""`newton_scan`: h_t = f(h_{t−1}, x_t) for all t at once, by Newton's method on the whole trajectory.

The T equations f(h_{t−1}, x_t) − h_t = 0 are linearised around a guess of all states. Each iteration is then
a *linear* recurrence in the correction, which a parallel scan solves:

    δ_t = J_t δ_{t−1} + f(h_{t−1}, x_t) − h_t,   J_t = ∂f/∂h (h_{t−1}, x_t),   h_t ← h_t + ω δ_t.

After k iterations the first k states are exact whatever stands for J, so T iterations always suffice; the
cells made for it (`ParaGRU`, `ParaLSTM`) need three or four. The gradient does not pass through the
iterations: with μ_t = ∂L/∂h_t + J_{t+1}ᵀ μ_{t+1}, one linear recurrence backwards, every derivative of L is
a derivative of Σ_t μ_tᵀ f(h_{t−1}, x_t). No iterate is stored.

Source: DEER (arXiv 2309.12252), ELK (arXiv 2407.19115), ParaRNN (arXiv 2510.21450).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DivergenceError
from ostinato.ops.cells import Cell, Inputs, State, Weights
from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kalman import filtered_means
from ostinato.ops.recurrent_scan import check as check_arguments
from ostinato.ops.recurrent_scan import loop, widen
from ostinato.ops.routes import Engine
from ostinato.ops.scan import BLOCK, DENSE, DIAGONAL, affine_scan, associative_scan

_engine = Engine("newton_scan")

METHODS = ("newton", "quasi", "jacobi", "elk", "quasi_elk")
_DIAGONAL_METHODS = ("quasi", "quasi_elk")

# The residual at which the iteration stops, and at which a fixed number of iterations counts as failed;
# both relative to the largest state of the row where that exceeds 1.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
_FAILURE = 1e-3
# A residual that no longer falls is rounding, if it is within this factor of the tolerance.
_ROUNDING = 20.0
# Where one cannot look at a value (under compile and vmap) the number of iterations is fixed in advance.
_BLIND_ITERATIONS = 10
# Iterates beyond this are clipped to it: they are wrong, and must not become infinite.
_CEILING = 1e8


class NewtonReport(NamedTuple):
    """How a solve went."""

    iterations: int
    residual: float
    """max |f(h_{t−1}, x_t) − h_t| over the largest state of the row, or over 1 if that is larger."""
    converged: bool
    peak: float
    """The largest |h| of all iterates at which the residual was looked at, before they were clipped."""


@dataclass(frozen=True)
class _Settings:
    method: str
    iterations: int | None
    max_iterations: int
    tolerance: float
    step_size: float
    damping: float
    guess: str
    check: bool
    single: bool  # the cell's inputs are one tensor rather than a tuple
    weights: int  # how many of the tensors are weights


def _blind(tensor: Tensor) -> bool:
    """Whether the value of a tensor cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(tensor)


def _split(settings: _Settings, tensors: tuple[Tensor, ...]) -> tuple[Weights, Inputs]:
    weights, inputs = tensors[: settings.weights], tensors[settings.weights :]
    return weights, inputs[0] if settings.single else inputs


def _clear(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Zero at the marked (batch, time)."""
    return tensor if mask is None else tensor.masked_fill(mask.view(*mask.shape, *[1] * (tensor.ndim - 2)), 0)


def _entering(states: Tensor, initial: Tensor, reset: Tensor | None) -> Tensor:
    """The state that enters each step."""
    return _clear(torch.cat([initial.unsqueeze(1), states[:, :-1]], dim=1), reset)


def _correction(
    cell: Cell, settings: _Settings, jacobian: Tensor, gap: Tensor, states: Tensor, entering: Tensor, initial: Tensor
) -> Tensor:
    """What an iteration adds to the states, before damping by the step size."""
    structure = DIAGONAL if settings.method in _DIAGONAL_METHODS else cell.structure
    if settings.method in ("newton", "quasi"):
        return associative_scan(structure, (jacobian, gap), (torch.zeros_like(initial),))[0]
    # ELK. The offset of the linearised step is b = f(h) − J h; f(h) is gap + states.
    if structure is BLOCK:
        # (…, k, k, channels) -> (…, channels, k, k): a small dense matrix for each channel.
        jacobian = jacobian.movedim(-1, -3)
        states, entering, gap, initial = (t.transpose(-1, -2) for t in (states, entering, gap, initial))
        means = filtered_means(
            jacobian,
            DENSE.apply(-jacobian, entering, gap + states),
            states,
            initial,
            settings.damping,
            structure=DENSE,
        )
        return (means - states).transpose(-1, -2)
    offset = structure.apply(-jacobian, entering, gap + states)
    return filtered_means(jacobian, offset, states, initial, settings.damping, structure=structure) - states


def diverged(cell: Cell, settings: _Settings, count: int, residual: float) -> DivergenceError:
    """The error that a solve ends in which did not converge."""
    return DivergenceError(
        f"newton_scan with method={settings.method!r} on {type(cell).__name__} did not converge: after "
        f"{count} iterations the residual max|f(h) − h| is {residual:.3g}, wanted "
        f"{settings.tolerance:.3g}; allow more iterations, bound the recurrent weights (the para cells take "
        "them in ±0.5), try method='elk', or use recurrent_scan"
    )


def _solve(
    cell: Cell, settings: _Settings, reset: Tensor | None, initial: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """All packed states, and (iterations, residual, peak, converged) for each row of the batch."""
    weights, inputs = _split(settings, tensors)
    batch, time = tensors[settings.weights].shape[:2]
    zeros = initial.new_zeros(initial.shape).unsqueeze(1).expand(batch, time, *initial.shape[1:])
    states = cell.pack(cell.step(weights, cell.unpack(zeros), inputs)) if settings.guess == "one_step" else zeros
    blind = _blind(states)
    until = settings.iterations is None and not blind
    limit = settings.iterations
    if limit is None:
        limit = _BLIND_ITERATIONS if blind else settings.max_iterations
        if settings.step_size == 1 and not settings.method.endswith("elk"):
            limit = min(limit, time)  # undamped, T iterations are always enough
    axes = tuple(range(1, states.ndim))
    count, residual, peak = 0, initial.new_zeros(batch), initial.new_zeros(batch)
    wanted, best = settings.tolerance, float("inf")
    while True:
        last = count == limit
        if last and not settings.check and not until:
            break
        entering = _entering(states, initial, reset)
        if last or settings.method == "jacobi":
            value, jacobian = cell.pack(cell.step(weights, cell.unpack(entering), inputs)), None
        elif settings.method in _DIAGONAL_METHODS:
            value, jacobian = cell.step_and_diagonal(weights, cell.unpack(entering), inputs)
        else:
            value, jacobian = cell.step_and_jacobian(weights, cell.unpack(entering), inputs)
        gap = value - states
        if until or last:
            largest = states.abs().amax(axes)
            peak = torch.maximum(peak, largest)
            residual = gap.abs().amax(axes) / largest.clamp(min=1)
            if until:
                worst = float(residual.amax())
                if best <= worst <= _ROUNDING * settings.tolerance:
                    wanted = _ROUNDING * settings.tolerance
                if worst <= wanted:
                    break
                best = min(best, worst)
        if last:
            break
        if jacobian is None:
            change = gap
        else:
            change = _correction(cell, settings, _clear(jacobian, reset), gap, states, entering, initial)
        states = states + change if settings.step_size == 1 else states + settings.step_size * change
        if until and not bool(change.abs().amax() < _CEILING):
            peak = torch.maximum(peak, states.abs().nan_to_num(torch.inf).amax(axes))
            states = states.nan_to_num(0.0, _CEILING, -_CEILING).clamp(-_CEILING, _CEILING)
        count += 1
    if settings.check:
        good = residual <= wanted
        if blind:
            states = torch.where(good.view(-1, *[1] * (states.ndim - 1)), states, torch.nan)
        elif not bool(good.all()):
            raise diverged(cell, settings, count, float(residual.max()))
    converged = (residual <= wanted).to(residual.dtype)
    return states, torch.stack([torch.full_like(residual, count), residual, peak, converged], dim=1)


class _Newton(torch.autograd.Function):
    """The states as an implicit function of weights, inputs and the initial state.

    The backward reads the solution only, and is written in functions that can be differentiated: so the
    second derivative is exact too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cell: Cell, settings: _Settings, reset: Tensor | None, initial: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _solve(cell, settings, reset, initial, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.cell, ctx.settings, reset, initial, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(reset, initial, output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cell, settings = ctx.cell, ctx.settings
        reset, initial, states, *saved = ctx.saved_tensors
        tensors = tuple(saved)
        weights, inputs = _split(settings, tensors)
        entering = _entering(states, initial, reset)
        jacobian = _clear(cell.step_and_jacobian(weights, cell.unpack(entering), inputs)[1], reset)
        adjoint = cell.structure.adjoint(jacobian)
        following = torch.cat([adjoint[:, 1:], torch.zeros_like(adjoint[:, :1])], dim=1)
        mu = affine_scan(following, grad, torch.zeros_like(grad[:, 0]), structure=cell.structure, reverse=True)

        def step(*tensors: Tensor) -> Tensor:
            weights, inputs = _split(settings, tensors)
            return cell.pack(cell.step(weights, cell.unpack(entering), inputs))

        _, pull_back = torch.func.vjp(step, *tensors)
        grad_initial = cell.structure.apply(adjoint[:, 0], mu[:, 0], None) if ctx.needs_input_grad[3] else None
        return None, None, None, grad_initial, *pull_back(mu)


@_engine.route("reference")
def _reference(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None, settings: _Settings
) -> tuple[Tensor, State, Tensor | None]:
    weights, inputs, state = widen(cell, weights, inputs, state)
    return *loop(cell, weights, inputs, state, reset), None


def _one_step(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None, settings: _Settings
) -> str | None:
    first = inputs if settings.single else inputs[0]
    return "a single step needs no solver" if first.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
def _parallel(
    cell: Cell, weights: Weights, inputs: Inputs, state: State, reset: Tensor | None, settings: _Settings
) -> tuple[Tensor, State, Tensor | None]:
    weights, inputs, state = widen(cell, weights, inputs, state)
    tensors = (inputs,) if settings.single else inputs
    states, report = _Newton.apply(cell, settings, reset, cell.pack(state), *weights, *tensors)
    return cell.output(cell.unpack(states)), cell.unpack(states[:, -1]), report


def newton_scan(
    cell: Cell,
    weights: Weights,
    inputs: Float[Tensor, "batch time ..."] | tuple[Float[Tensor, "batch time ..."], ...],
    state: State = None,
    *,
    method: str = "newton",
    iterations: int | None = None,
    max_iterations: int = 100,
    tolerance: float | None = None,
    step_size: float = 1.0,
    damping: float = 1e-3,
    guess: str = "one_step",
    reset: Bool[Tensor, "batch time"] | None = None,
    check: bool = True,
    return_report: bool = False,
    validate: bool = False,
) -> Any:
    """All outputs of h_t = f(h_{t−1}, x_t), in parallel over time.

    Args:
        cell, weights, inputs, state, reset, validate: as in `recurrent_scan`, which computes the same.
        method: what stands for the Jacobian J.
            "newton": J in the cell's structure (DEER where that is dense: O(T d²) memory, O(T d³) work);
            "quasi": its diagonal (quasi-DEER: more iterations, each in O(T d) memory; the backward of a dense
            cell still takes the whole J once);
            "jacobi": zero (fixed-point iteration);
            "elk": J, with every step a Levenberg–Marquardt step, found by a Kalman filter: slower, and
            bounded where Newton's iterates explode; "quasi_elk": the same with the diagonal.
        iterations: this many; None for as many as the tolerance needs, with iterates clipped to ±1e8 as in DEER.
            A compiled kernel may return states that are closer to the solution than that many iterations make;
            the iterates themselves are seen under `ostinato.backend("parallel")`.
        max_iterations: the limit for None.
        tolerance: on the residual max |f(h_{t−1}, x_t) − h_t|, relative to the largest state of the row where
            that is above 1. Default 1e-12 in float64 and 2e-6 in float32 (a residual within twenty times that
            is taken too once it stops falling: it is rounding); 1e-3 for a fixed number of iterations.
        step_size: ω, what part of each correction is taken; 1 is Newton, below 1 is damped.
        damping: λ of the ELK methods.
        guess: the first iterate: "one_step", f(0, x_t), or "zeros".
        check: look at the final residual. False saves one evaluation of the step and trusts `iterations`; without
            a number of iterations it returns states that did not converge, and the report says so.
        return_report: return a `NewtonReport` as well.

    Returns:
        Outputs (batch, time, …) in the type of the inputs, the last state, and the report if asked for. Half
        precision is computed in float32. Derivatives of any order are those of the exact solution.

    Raises:
        DivergenceError: the tolerance was not reached. Under `torch.compile` and `torch.func.vmap`, where no
            value can be looked at, ten iterations are made unless `iterations` says otherwise, and the rows
            that did not converge are NaN.
        ConfigurationError: an unknown method or guess, or a number out of its range.
        ShapeError, DtypeError, NonFiniteError: as `recurrent_scan`.

    Source: ParaRNN (arXiv 2510.21450), section 2 and appendix A; DEER (arXiv 2309.12252), section 3;
    ELK (arXiv 2407.19115), section 4.
    """
    if method not in METHODS:
        raise ConfigurationError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if guess not in ("one_step", "zeros"):
        raise ConfigurationError(f"guess must be 'one_step' or 'zeros', got {guess!r}")
    if iterations is not None and iterations < 0:
        raise ConfigurationError(f"iterations must be at least 0, or None to follow the tolerance, got {iterations}")
    if max_iterations < 1:
        raise ConfigurationError(f"max_iterations must be positive, got {max_iterations}")
    if not 0 < step_size <= 1:
        raise ConfigurationError(f"step_size must lie in (0, 1], got {step_size}")
    if damping <= 0:
        raise ConfigurationError(f"damping must be positive, got {damping}; without damping use method='newton'")
    if not check and iterations is None and not return_report:
        raise ConfigurationError("check=False needs a fixed number of iterations, or return_report=True")
    if getattr(cell, "gradient_clip", None) is not None:
        raise ConfigurationError("newton_scan computes derivatives; a cell with gradient_clip needs recurrent_scan")
    weights = tuple(weights)
    dtype = check_arguments(cell, weights, inputs, state, reset, validate)
    if tolerance is None:
        wide = accumulation_dtype(dtype)
        for tensor in (*weights, *((inputs,) if isinstance(inputs, Tensor) else inputs)):
            wide = torch.promote_types(wide, accumulation_dtype(tensor.dtype))
        tolerance = _FAILURE if iterations is not None else _TOLERANCE[wide]
    settings = _Settings(
        method=method,
        iterations=iterations,
        max_iterations=max_iterations,
        tolerance=tolerance,
        step_size=step_size,
        damping=damping,
        guess=guess,
        check=check,
        single=isinstance(inputs, Tensor),
        weights=len(weights),
    )
    outputs, last, found = _engine(cell, weights, inputs, state, reset, settings)
    outputs = outputs.to(dtype)
    if not return_report:
        return outputs, last
    if found is None:
        return outputs, last, NewtonReport(0, 0.0, True, float(outputs.detach().abs().max()))
    if callable(found):
        found = found()
    count, residual, peak, _ = found.detach().amax(0).tolist()
    looked = check or iterations is None
    return outputs, last, NewtonReport(int(count), residual, looked and bool(found[:, 3].all()), peak)
