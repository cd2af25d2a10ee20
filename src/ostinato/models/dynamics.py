"""A piecewise-linear recurrence as a generative model of a dynamical system, many of them side by side.

    model = DynamicsModel(ShallowPLRNN(hidden=50), latent=3, observed=3, seeds=(0, 1, 2))
    orbit = generate(model, model.first(x[:, :1]), steps=1000)      # (runs, 1000, 1, latent)

Seeds and arms of an experiment are one model with a leading axis: states are (runs, rows, latent).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.ops.cells.piecewise_linear import PiecewiseLinear
from ostinato.ops.cells.protocol import Weights


class DynamicsModel(nn.Module):
    """z_t = f(z_{t−1}) + C s_t, x̂_t = observe(z_t).

    Observation: "identity" reads the first `observed` latents, x̂ = z[:N], and starts at z_1 = [x_1; L x_1] with
    L learned; "affine" reads x̂ = B z, without bias, and infers the latent by the pseudo-inverse, ẑ = B⁺ x.

    Args:
        cell: f.
        latent: M.
        observed: N; at most M.
        seeds: one for each run; a run's initial weights depend on its seed alone.
        observation: "identity" or "affine".
        external: the width K of external inputs s_t; 0 for none.

    Raises:
        ConfigurationError: sizes that do not fit together.

    Source: GTF (arXiv 2306.04406), section 3; initial values as its code: L and C Glorot-uniform, B Kaiming-normal.
    """

    def __init__(
        self,
        cell: PiecewiseLinear,
        latent: int,
        observed: int,
        *,
        seeds: Sequence[int] = (0,),
        observation: str = "identity",
        external: int = 0,
    ) -> None:
        super().__init__()
        self.diagonal: Tensor
        self.matrix: Tensor
        self.slopes: Tensor
        self.readout: Tensor
        self.start: Tensor
        self.drive: Tensor
        if observation not in ("identity", "affine"):
            raise ConfigurationError(f"observation must be 'identity' or 'affine', got {observation!r}")
        if not 1 <= observed <= latent and observation == "identity":
            raise ConfigurationError(
                f"identity observation reads {observed} of {latent} latents; give latent ≥ observed"
            )
        if not seeds:
            raise ConfigurationError("a DynamicsModel needs at least one seed, one for each run")
        self.cell, self.latent, self.observed = cell, latent, observed
        self.seeds, self.observation = tuple(seeds), observation
        drawn: dict[str, list[Tensor]] = {}
        for run, seed in enumerate(self.seeds):
            generator = torch.Generator().manual_seed(seed)
            weights = cell.draw(latent, run, generator)
            if observation == "affine":
                gain = (2 / latent) ** 0.5
                weights["readout"] = gain * torch.randn(observed, latent, generator=generator, dtype=torch.float64)
            elif latent > observed:
                weights["start"] = _glorot(latent - observed, observed, generator)
            if external:
                weights["drive"] = _glorot(latent, external, generator)
            for name, value in weights.items():
                row = value if name not in cell.names or name in cell.matrices else value.unsqueeze(0)
                drawn.setdefault(name, []).append(row)
        for name, values in drawn.items():
            stacked = torch.stack(values).to(torch.get_default_dtype())
            if name in cell.constants():
                self.register_buffer(name, stacked)
            else:
                self.register_parameter(name, nn.Parameter(stacked))

    @property
    def runs(self) -> int:
        """How many models stand side by side."""
        return len(self.seeds)

    @property
    def infers_all(self) -> bool:
        """Whether data decide the whole latent state."""
        return self.observation == "affine" or self.latent == self.observed

    def weights(self) -> Weights:
        """The cell's weights, with their axis of runs."""
        return tuple(getattr(self, name) for name in self.cell.names)

    def weights_of(self, run: int) -> Weights:
        """The weights of one run, without that axis and without gradient."""
        rows = [getattr(self, name).detach()[run] for name in self.cell.names]
        return tuple(
            row if name in self.cell.matrices else row.squeeze(0)
            for name, row in zip(self.cell.names, rows, strict=True)
        )

    def step(self, latent: Float[Tensor, "runs rows latent"], signal: Tensor | None = None) -> Tensor:
        """One step, with the external input (runs, rows, external) if there is one."""
        value = self.cell.advance(self.weights(), latent)
        return value if signal is None else value + self.driven(signal)

    def driven(self, signal: Float[Tensor, "runs ... external"]) -> Tensor:
        """C s. Raises `ConfigurationError` for a model without external inputs."""
        if not hasattr(self, "drive"):
            raise ConfigurationError("this model has no external inputs; build it with external=their width")
        return (signal.flatten(1, -2) @ self.drive.mT).unflatten(1, signal.shape[1:-1])

    def regions(self, latent: Float[Tensor, "runs rows latent"]) -> Bool[Tensor, "runs rows bits"]:
        """The region of each state."""
        return self.cell.regions(self.weights(), latent)

    def jacobian(self, latent: Float[Tensor, "runs rows latent"]) -> Float[Tensor, "runs rows latent latent"]:
        """∂f/∂z at each state."""
        return self.cell.affine(self.weights(), self.regions(latent))[0]

    def observe(self, latent: Float[Tensor, "runs ... latent"]) -> Float[Tensor, "runs ... observed"]:
        """x̂."""
        if self.observation == "identity":
            return latent[..., : self.observed]
        return (latent.flatten(1, -2) @ self.readout.mT).unflatten(1, latent.shape[1:-1])

    def infer(self, data: Float[Tensor, "runs ... observed"]) -> Float[Tensor, "runs ... known"]:
        """ẑ, as far as data decide it: the data themselves (identity) or B⁺ x (affine)."""
        if self.observation == "identity":
            return data
        inverse = torch.linalg.pinv(self.readout)
        return (data.flatten(1, -2) @ inverse.mT).unflatten(1, data.shape[1:-1])

    def first(self, data: Float[Tensor, "runs rows observed"]) -> Float[Tensor, "runs rows latent"]:
        """z_1 from x_1."""
        known = self.infer(data)
        return known if self.infers_all else torch.cat([known, data @ self.start.mT], dim=-1)

    def parameters_per_run(self) -> int:
        """How many numbers one run learns."""
        return sum(parameter[0].numel() for parameter in self.parameters())


def _glorot(out: int, into: int, generator: torch.Generator) -> Tensor:
    bound = (6 / (out + into)) ** 0.5
    return (2 * torch.rand(out, into, generator=generator, dtype=torch.float64) - 1) * bound


@torch.no_grad()
def generate(
    model: DynamicsModel, start: Float[Tensor, "runs rows latent"], steps: int, *, limit: float = 1e6
) -> Float[Tensor, "runs steps rows latent"]:
    """The free-running orbit z_1 … z_steps from the state before it; nothing is forced.

    A run that leaves |z| ≤ limit has diverged: it is NaN from there on.
    """
    weights = model.weights()
    advance = model.cell.advance
    orbit = start.new_empty(start.shape[0], steps, *start.shape[1:])
    state = start
    for t in range(steps):
        state = advance(weights, state)
        orbit[:, t] = state
    gone = ~(orbit.abs() <= limit).all(-1, keepdim=True)
    return orbit.masked_fill(gone.cummax(1).values if steps else gone, float("nan"))


@torch.no_grad()
def free_run(
    model: DynamicsModel, data: Float[Tensor, "time observed"], *, discard: float = 0.25
) -> Float[Tensor, "runs time latent"]:
    """The orbit that is compared with test data: from its first point, 1.25·T steps, the first 0.25·T discarded.

    Source: GTF (arXiv 2306.04406), evaluation protocol.
    """
    length = len(data)
    skipped = int(discard * length)
    start = model.first(data[:1].expand(model.runs, 1, -1))
    return generate(model, start, skipped + length)[:, skipped:, 0]


def memory_penalty(model: DynamicsModel) -> Float[Tensor, " runs"]:
    """‖1 − A‖² + the squares of every other weight of the cell: keeps latents slow, and the rest small.

    Source: GTF (arXiv 2306.04406), its code's λ_lat.
    """
    total = (1 - model.diagonal).square().flatten(1).sum(1)
    for name in model.cell.names:
        if name != "diagonal" and name not in model.cell.constants():
            total = total + getattr(model, name).square().flatten(1).sum(1)
    return total


def readout_penalty(model: DynamicsModel) -> Float[Tensor, " runs"]:
    """(1 − s_max(B)/(s_min(B) + 1e-8))²: keeps B well conditioned (λ_obs of GTF's code)."""
    singular = torch.linalg.svdvals(model.readout)
    return (1 - singular[:, 0] / (singular[:, -1] + 1e-8)).square()


def self_coupling_penalty(model: DynamicsModel, most: float = 0.05) -> Float[Tensor, " runs"]:
    """‖relu(A + diag W − most)‖ of an AL-RNN (arXiv 2410.14240, its code)."""
    coupling = model.diagonal.squeeze(1) + model.matrix.diagonal(dim1=-2, dim2=-1)
    return F.relu(coupling - most).norm(dim=-1)


def linearity_penalty(model: DynamicsModel) -> Float[Tensor, " runs"]:
    """Σ|1 − s| over learned slopes of an AL-RNN: few units stay nonlinear (arXiv 2410.14240)."""
    return (1 - model.slopes).abs().flatten(1).sum(1)
