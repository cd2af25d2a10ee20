"""Teacher forcing: how far the data correct a model's state while it is trained, and the gradients under it.

After every step the state is mixed with the one that data infer, z̃_t = (1 − α) z_t + α ẑ_t, and the next step
starts from z̃_t. The mixture multiplies each Jacobian in the gradient's chain by (1 − α). One component has it all:

    TeacherForcing.none(runs)              α = 0: a free run
    TeacherForcing.full(runs)              α = 1 after every step
    TeacherForcing.sparse(tau, runs)       α = 1 after every τ-th step, else 0
    TeacherForcing.generalized(alpha, runs)
    TeacherForcing.adaptive("product", runs)   α follows the Jacobians: 1 − 1/norm
    TeacherForcing.join(…)                 arms side by side

The error is that of z_t, *before* it is mixed. Nothing is forced when the trained model generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.models.dynamics import DynamicsModel

Jacobians = Float[Tensor, "runs rows time latent latent"]


def spectral_norm(matrices: Float[Tensor, "... m m"]) -> Float[Tensor, ...]:
    """‖J‖₂ of each matrix, from the largest eigenvalue of JᵀJ (quicker than singular values for many small ones)."""
    return torch.linalg.eigvalsh(matrices.mT @ matrices)[..., -1].clamp_min(0).sqrt()


def batch_maximum(jacobians: Jacobians) -> Float[Tensor, " runs"]:
    """max over rows and time of ‖J‖₂."""
    return spectral_norm(jacobians).flatten(1).amax(1)


def product_bound(jacobians: Jacobians) -> Float[Tensor, " runs"]:
    """max over rows of the geometric mean over time of ‖J‖₂: ‖ΠJ‖^(1/T) is at most that."""
    return spectral_norm(jacobians).clamp_min(1e-30).log().mean(2).amax(1).exp()


def arithmetic_mean(jacobians: Jacobians) -> Float[Tensor, " runs"]:
    """‖mean over rows and time of J‖₂."""
    return spectral_norm(jacobians.mean((1, 2)))


def log_euclidean_mean(jacobians: Jacobians) -> Float[Tensor, " runs"]:
    """‖exp(mean log J)‖₂, logarithms of the eigenvalues in the complex plane.

    A matrix with an eigenvalue of zero has no logarithm: its eigenvalues are held at 1e-12 or more in modulus.
    """
    values, vectors = torch.linalg.eig(jacobians)
    values = torch.where(values.abs() < 1e-12, torch.full_like(values, 1e-12), values)
    logs = vectors @ (values.log().unsqueeze(-1) * torch.linalg.inv(vectors))
    return torch.linalg.matrix_norm(torch.linalg.matrix_exp(logs.mean((1, 2))), 2)


RULES: dict[str, Callable[[Jacobians], Tensor] | None] = {
    "bound": None,  # of the weights, not of the data: the cell's norm_bound
    "maximum": batch_maximum,
    "product": product_bound,
    "mean": arithmetic_mean,
    "log_mean": log_euclidean_mean,
}


@torch.no_grad()
def estimate_alpha(
    model: DynamicsModel,
    windows: Float[Tensor, "runs rows time observed"],
    rule: str,
    chosen: Sequence[int] | None = None,
) -> Float[Tensor, " chosen"]:
    """α = max(0, 1 − 1/n), n the norm that the rule finds of Jacobians at the states that data infer.

    Rules: "bound" (of the weights alone), "maximum", "product" (the default of adaptive forcing), "mean",
    "log_mean". `chosen` limits it to some runs.

    Raises:
        ConfigurationError: no such rule, or a model whose states data do not decide (only "bound" works then).

    Source: GTF (arXiv 2306.04406), section 4 and its code.
    """
    if rule not in RULES:
        raise ConfigurationError(f"there is no rule {rule!r} for α; choose one of {', '.join(RULES)}")
    rows = slice(None) if chosen is None else list(chosen)
    measure, weights = RULES[rule], tuple(weight[rows] for weight in model.weights())
    if measure is None:
        norm = model.cell.norm_bound(weights)
    else:
        if not model.infers_all:
            raise ConfigurationError(
                f"the rule {rule!r} needs states that data decide, but {model.latent - model.observed} of the "
                f"{model.latent} latents are free; use rule 'bound', or affine observation"
            )
        states = model.infer(windows)[rows]
        regions = model.cell.regions(weights, states.flatten(1, 2))
        norm = measure(model.cell.affine(weights, regions)[0].unflatten(1, states.shape[1:3]))
    return (1 - 1 / norm.clamp_min(1e-30)).clamp_min(0)


def chain_growth(jacobians: Float[Tensor, "time latent latent"], alpha: float = 0.0) -> Float[Tensor, " time"]:
    """log ‖Π_{k ≤ t} (1 − α) J_k‖₂ for t = 1 … T: how a gradient may grow back through t steps.

    At most 0 for every t where α ≥ 1 − 1/max‖J_k‖₂. −∞ where the product vanishes. In the type of the Jacobians.

    Source: GTF (arXiv 2306.04406), theorem on bounded gradients.
    """
    product = torch.eye(jacobians.shape[-1], dtype=jacobians.dtype, device=jacobians.device)
    logs, scale = [], torch.zeros((), dtype=jacobians.dtype, device=jacobians.device)
    for jacobian in (1 - alpha) * jacobians:
        product = jacobian @ product
        norm = torch.linalg.matrix_norm(product, 2)
        scale = scale + norm.log()
        logs.append(scale)
        product = product / norm.clamp_min(1e-300)
    return torch.stack(logs)


class TeacherForcing:
    """α of each run, how often it applies, and the rule that moves it; see the module's text for the kinds.

    Args:
        alpha: of each run.
        tau: of each run: α applies after every τ-th scored step.
        rules: of each run: None keeps α.
        gamma, every: adaptive α: every `every` batches it jumps up to the estimate, or sinks towards it by
            α ← γ α + (1 − γ) α_est.

    Raises:
        ConfigurationError: α outside [0, 1], τ < 1, or no such rule.

    Source: GTF (arXiv 2306.04406), sections 3 and 4; sparse: arXiv 2110.07238.
    """

    def __init__(
        self,
        alpha: Sequence[float],
        tau: Sequence[int] | None = None,
        rules: Sequence[str | None] | None = None,
        *,
        gamma: float = 0.999,
        every: int = 5,
    ) -> None:
        self.tau = tuple(tau) if tau is not None else (1,) * len(alpha)
        self.rules = tuple(rules) if rules is not None else (None,) * len(alpha)
        if not len(alpha) == len(self.tau) == len(self.rules):
            raise ConfigurationError(f"alpha, tau and rules must be one for each run, got {alpha}, {tau}, {rules}")
        if any(not 0 <= each <= 1 for each in alpha) or any(each < 1 for each in self.tau):
            raise ConfigurationError(f"alpha must be in [0, 1] and tau at least 1, got {list(alpha)} and {self.tau}")
        unknown = {rule for rule in self.rules if rule is not None} - set(RULES)
        if unknown:
            raise ConfigurationError(f"there is no rule {', '.join(sorted(unknown))} for α; known: {', '.join(RULES)}")
        self.alpha = torch.tensor(list(alpha), dtype=torch.float64)
        self.gamma, self.every = gamma, every

    @classmethod
    def none(cls, runs: int = 1) -> TeacherForcing:
        """A free run from the first point of the window."""
        return cls([0.0] * runs)

    @classmethod
    def full(cls, runs: int = 1) -> TeacherForcing:
        """The data at every step."""
        return cls([1.0] * runs)

    @classmethod
    def sparse(cls, tau: int, runs: int = 1) -> TeacherForcing:
        """The data after every τ-th step."""
        return cls([1.0] * runs, [tau] * runs)

    @classmethod
    def generalized(cls, alpha: float, runs: int = 1) -> TeacherForcing:
        """A constant mixture."""
        return cls([alpha] * runs)

    @classmethod
    def adaptive(cls, rule: str = "product", runs: int = 1, *, gamma: float = 0.999, every: int = 5) -> TeacherForcing:
        """α starts at 1 and comes down to what the Jacobians ask for."""
        return cls([1.0] * runs, rules=[rule] * runs, gamma=gamma, every=every)

    @classmethod
    def join(cls, *arms: TeacherForcing) -> TeacherForcing:
        """Arms side by side, in their order; `gamma` and `every` must agree among the adaptive ones."""
        adaptive = {(arm.gamma, arm.every) for arm in arms if any(arm.rules)} or {(0.999, 5)}
        if len(adaptive) > 1:
            raise ConfigurationError(f"arms side by side must share gamma and every, got {sorted(adaptive)}")
        ((gamma, every),) = adaptive
        return cls(
            [float(alpha) for arm in arms for alpha in arm.alpha],
            [tau for arm in arms for tau in arm.tau],
            [rule for arm in arms for rule in arm.rules],
            gamma=gamma,
            every=every,
        )

    @property
    def runs(self) -> int:
        """How many runs it serves."""
        return len(self.tau)

    def strengths(self, time: int) -> Float[Tensor, "runs time"]:
        """α after each of `time` scored steps."""
        steps = torch.arange(1, time + 1)
        applies = steps.unsqueeze(0) % torch.tensor(self.tau).unsqueeze(1) == 0
        return self.alpha.unsqueeze(1) * applies

    def update(self, model: DynamicsModel, windows: Float[Tensor, "runs rows time observed"], batch: int) -> bool:
        """Move the adaptive α's on the batch numbered `batch`; says whether it did."""
        if batch % self.every or not any(self.rules):
            return False
        for rule in sorted({rule for rule in self.rules if rule is not None}):
            moving = [run for run, each in enumerate(self.rules) if each == rule]
            estimate = estimate_alpha(model, windows, rule, moving).to("cpu", torch.float64)
            alpha = self.alpha[moving]
            moved = torch.where(estimate > alpha, estimate, self.gamma * alpha + (1 - self.gamma) * estimate)
            self.alpha[moving] = torch.where(moved.isfinite(), moved, alpha)
        return True


def _targets(model: DynamicsModel, inferred: Tensor) -> Tensor:
    """Inferred states at full width: what data do not decide is zero there, and never mixed in."""
    return inferred if model.infers_all else F.pad(inferred, (0, model.latent - inferred.shape[-1]))


def _mixing(model: DynamicsModel, strengths: Tensor, like: Tensor) -> Float[Tensor, "runs time 1 latent"]:
    """α for each latent: zero where data do not decide."""
    width = model.latent if model.infers_all else model.observed
    decided = (torch.arange(model.latent, device=like.device) < width).to(like.dtype)
    return strengths.to(like)[:, :, None, None] * decided


def check_windows(model: DynamicsModel, windows: Tensor, strengths: Tensor) -> None:
    """Raise `ShapeError` unless windows are (runs, time + 1, rows, observed) and strengths (runs, time)."""
    runs, time = model.runs, windows.shape[1] - 1
    if windows.ndim != 4 or windows.shape[0] != runs or time < 1 or windows.shape[3] != model.observed:
        raise ShapeError(
            f"windows must be ({runs} runs, at least 2 points, rows, {model.observed} observed), "
            f"got {tuple(windows.shape)}"
        )
    if tuple(strengths.shape) != (runs, time):
        raise ShapeError(f"strengths must be ({runs} runs, {time} scored steps), got {tuple(strengths.shape)}")


def forced_loss(
    model: DynamicsModel,
    windows: Float[Tensor, "runs points rows observed"],
    strengths: Float[Tensor, "runs time"],
    signals: Float[Tensor, "runs points rows external"] | None = None,
) -> Float[Tensor, " runs"]:
    """The definition: the mean squared error of the unforced z_t over time, rows and dimensions, by automatic
    differentiation.

        z_1 = ẑ_1; for t = 2 … T + 1: z_t = f(z̃_{t−1}), score x̂(z_t) against x_t, z̃_t = (1 − α_t) z_t + α_t ẑ_t.

    Raises:
        ShapeError: see `check_windows`.

    Source: GTF (arXiv 2306.04406), section 3. Computed in the type of the weights.
    """
    check_windows(model, windows, strengths)
    targets, mixing = _targets(model, model.infer(windows)), _mixing(model, strengths, windows)
    drive = None if signals is None else model.driven(signals)
    state, error = model.first(windows[:, 0]), windows.new_zeros(model.runs)
    time = windows.shape[1] - 1
    for t in range(time):
        state = model.step(state) if drive is None else model.step(state) + drive[:, t + 1]
        error = error + (model.observe(state) - windows[:, t + 1]).square().mean((1, 2))
        state = torch.lerp(state, targets[:, t + 1], mixing[:, t])
    return error / time


def forced_gradients(
    model: DynamicsModel,
    windows: Float[Tensor, "runs points rows observed"],
    strengths: Float[Tensor, "runs time"],
    signals: Float[Tensor, "runs points rows external"] | None = None,
) -> Float[Tensor, " runs"]:
    """`forced_loss`, its gradients added to the parameters' `.grad`, several times faster.

    The forward loop keeps states only. The adjoint λ_t = ∂L/∂z_t runs back through the exact slopes of the
    regions visited, λ_t = e_t + (1 − α_t) J_{t+1}ᵀ λ_{t+1}, and every parameter's gradient is then one product
    over all times at once. Equal to automatic differentiation of `forced_loss`; the loss returned carries no
    graph.
    """
    check_windows(model, windows, strengths)
    cell, runs, (time, rows) = model.cell, model.runs, (windows.shape[1] - 1, windows.shape[2])
    inferred, first = model.infer(windows), model.first(windows[:, 0])
    drive = None if signals is None else model.driven(signals[:, 1:])
    with torch.no_grad():
        weights = tuple(weight.detach() for weight in model.weights())
        targets, mixing = _targets(model, inferred.detach()), _mixing(model, strengths, windows)
        keep = 1 - mixing
        entered = windows.new_empty(runs, time, rows, model.latent)
        states = torch.empty_like(entered)
        entered[:, 0] = first
        advance = cell.advance
        for t in range(time):
            state = advance(weights, entered[:, t])
            if drive is not None:
                state = state + drive[:, t]
            states[:, t] = state
            if t + 1 < time:
                torch.lerp(state, targets[:, t + 1], mixing[:, t], out=entered[:, t + 1])
    states.requires_grad_()
    with torch.enable_grad():
        loss = (model.observe(states) - windows[:, 1:]).square().mean((1, 2, 3))
        loss.sum().backward()
    assert states.grad is not None
    adjoint, at_start = states.grad, states.grad
    to_inferred = torch.zeros_like(targets) if inferred.requires_grad else None
    with torch.no_grad():
        slopes = cell.linearise(weights, entered.flatten(1, 2)).unflatten(1, (time, rows))
        for t in range(time - 1, -1, -1):
            at_start = cell.pull_back(weights, slopes[:, t], adjoint[:, t])
            if t:
                adjoint[:, t - 1].addcmul_(keep[:, t - 1], at_start)
                if to_inferred is not None:
                    to_inferred[:, t] = mixing[:, t - 1] * at_start
    with torch.enable_grad():
        value = cell.advance(model.weights(), entered.flatten(1, 2))
        outputs, gradients = [value], [adjoint.flatten(1, 2)]
        if first.requires_grad:
            outputs.append(first)
            gradients.append(at_start)
        if to_inferred is not None:
            outputs.append(inferred)
            gradients.append(to_inferred)
        if drive is not None:
            outputs.append(drive)
            gradients.append(adjoint)
        torch.autograd.backward(outputs, gradients)
    return loss.detach()
