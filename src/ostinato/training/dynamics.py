"""Training piecewise-linear models on a long series: random windows, teacher forcing, all runs at once.

    trainer = DynamicsTrainer(model, series, TeacherForcing.adaptive(runs=3), window=60, updates=5000)
    trainer.run(1000)
    kept = trainer.snapshot()        # JSON: a run that was interrupted goes on from it by `restore`

Runs never meet: each has its own loss, and the optimisers work number by number. On a GPU the update is one CUDA
graph.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DataError
from ostinato.models.dynamics import DynamicsModel
from ostinato.training.teacher_forcing import TeacherForcing, forced_gradients

_BLOCK = 256
"""Window positions are drawn for so many updates at once."""


class DynamicsTrainer:
    """Trains the runs of a `DynamicsModel` by Adam or RAdam under teacher forcing.

    Args:
        model: the models; trained in place.
        series: standardised data, (time, observed); runs of the same seed see the same windows.
        forcing: one strength for each run.
        window: T: how many points of a window are scored.
        batch: windows an update.
        updates: of the whole training: the learning rate falls from the first to the second of
            `learning_rate` exponentially over them.
        optimizer: "adam" or "radam".
        noise: standard deviation of noise drawn afresh for every window.
        penalty: added to the loss of each run, (runs,).
        seed: of the noise; windows are drawn from the model's seeds.

    A run whose gradient is not finite skips the update, and `skipped` counts it; nothing is clipped.

    Raises:
        ConfigurationError, DataError: arguments that do not fit together, or a series shorter than a window.
    """

    def __init__(
        self,
        model: DynamicsModel,
        series: Float[Tensor, "time observed"],
        forcing: TeacherForcing,
        *,
        window: int,
        updates: int,
        batch: int = 16,
        learning_rate: tuple[float, float] = (3e-3, 3e-5),
        optimizer: str = "adam",
        noise: float = 0.0,
        penalty: Callable[[DynamicsModel], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if forcing.runs != model.runs:
            raise ConfigurationError(f"the forcing is for {forcing.runs} runs, the model has {model.runs}")
        if optimizer not in ("adam", "radam"):
            raise ConfigurationError(f"optimizer must be 'adam' or 'radam', got {optimizer!r}")
        if len(series) <= window + 1:
            raise DataError(f"the series has {len(series)} points: too few for windows of {window + 1}")
        self.model, self.forcing, self.penalty = model, forcing, penalty
        self.window, self.batch, self.updates, self.noise, self.seed = window, batch, updates, noise, seed
        self.learning_rate = learning_rate
        self.step = 0
        reference = next(model.parameters())
        self.series = series.to(reference)
        self.device = reference.device
        on_gpu = self.device.type == "cuda"
        self._rate = torch.tensor(learning_rate[0], dtype=torch.float32, device=self.device)
        parameters = list(model.parameters())
        if optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, lr=self._rate, fused=True, capturable=on_gpu
            )
        else:
            self._optimizer = torch.optim.RAdam(parameters, lr=self._rate, foreach=True, capturable=on_gpu)
        self.skipped = torch.zeros(model.runs, dtype=torch.long, device=self.device)
        self._groups = sorted(set(model.seeds))
        self._group_of = torch.tensor([self._groups.index(each) for each in model.seeds], device=self.device)
        self._offsets = torch.arange(window + 1, device=self.device)[:, None]
        shape = (model.runs, window + 1, batch, model.observed)
        self._windows = torch.zeros(shape, dtype=reference.dtype, device=self.device)
        self._strengths = torch.zeros(model.runs, window, dtype=reference.dtype, device=self.device)
        self.loss = torch.full((model.runs,), float("nan"), dtype=reference.dtype, device=self.device)
        self._graph: Any = None
        self.best: dict[str, Tensor] | None = None
        """The weights that `keep_best` kept."""
        self.best_scores = torch.full((model.runs,), torch.inf)

    def _starts(self, block: int) -> Tensor:
        """Where the windows of a block of updates begin: (update, group, row)."""
        most = len(self.series) - self.window
        drawn = [np.random.default_rng([each, block]).integers(0, most, (_BLOCK, self.batch)) for each in self._groups]
        return torch.from_numpy(np.stack(drawn, axis=1)).to(self.device)

    def _update(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()
        loss = forced_gradients(self.model, self._windows, self._strengths)
        if self.penalty is not None:
            with torch.enable_grad():
                extra = self.penalty(self.model)
                extra.sum().backward()
            loss = loss + extra.detach()
        with torch.no_grad():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            size = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
            bad = ~size.isfinite()
            for gradient in gradients:
                gradient.masked_fill_(bad.view(-1, *[1] * (gradient.ndim - 1)), 0)
            self.skipped.add_(bad)
            self.loss.copy_(loss)
        self._optimizer.step()

    def run(self, updates: int) -> Float[Tensor, "updates runs"]:
        """Train for so many more updates (at most to the end); the losses, one in ten, of the way.

        The noise of an update depends on the step at which this call began: resumed at the same steps, a run is
        the same run.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.step)
        first, last = self.learning_rate
        losses: list[Tensor] = []
        block, starts = -1, torch.empty(0)
        for _ in range(min(updates, self.updates - self.step)):
            if self.step // _BLOCK != block:
                block = self.step // _BLOCK
                starts = self._starts(block)
            index = starts[self.step % _BLOCK][:, None, :] + self._offsets
            torch.index_select(self.series[index], 0, self._group_of, out=self._windows)
            if self.noise:
                noise = torch.randn(self._windows.shape, generator=generator, device=self.device)
                self._windows.add_(noise, alpha=self.noise)
            moved = self.forcing.update(self.model, self._windows.transpose(1, 2), self.step)
            if moved or not losses:
                self._strengths.copy_(self.forcing.strengths(self.window))
            self._rate.fill_(first * (last / first) ** (self.step / max(1, self.updates)))
            self._replay()
            if self.step % 10 == 0 or not losses:
                losses.append(self.loss.clone())
            self.step += 1
        return torch.stack(losses).cpu() if losses else torch.empty(0, self.model.runs)

    def _replay(self) -> None:
        """One update: on a GPU, the recorded one from the fourth on."""
        if self.device.type != "cuda":
            return self._update()
        if self._graph is None:
            self._graph = 0
        if isinstance(self._graph, int):
            if self._graph < 3:  # the optimiser and the libraries must have met their shapes before recording
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._update()
                torch.cuda.current_stream().wait_stream(stream)
                self._graph += 1
                return None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._update()
            self._graph = graph
        self._graph.replay()
        return None

    def keep_best(self, scores: Float[Tensor, " runs"]) -> None:
        """Keep the weights of each run whose score is lower than ever before; NaN never is."""
        now = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.best is None:
            self.best, self.best_scores = now, torch.where(scores.isnan(), torch.inf, scores)
            return
        better = scores < self.best_scores
        self.best_scores = torch.where(better, scores, self.best_scores)
        for name, value in now.items():
            chosen = better.to(value.device).view(-1, *[1] * (value.ndim - 1))
            self.best[name] = torch.where(chosen, value, self.best[name])

    def snapshot(self) -> dict[str, Any]:
        """Weights, optimiser, α and step, as JSON values."""
        optimizer = self._optimizer.state_dict()["state"]
        best = None if self.best is None else {name: packed(value) for name, value in self.best.items()}
        return {
            "best": best,
            "best_scores": self.best_scores.tolist(),
            "step": self.step,
            "alpha": self.forcing.alpha.tolist(),
            "skipped": self.skipped.tolist(),
            "weights": {name: packed(value) for name, value in self.model.state_dict().items()},
            "optimizer": {str(i): {k: packed(v) for k, v in state.items()} for i, state in optimizer.items()},
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        self.step = kept["step"]
        self.forcing.alpha = torch.tensor(kept["alpha"], dtype=torch.float64)
        best = kept["best"]
        self.best = best and {name: unpacked(value).to(self.device) for name, value in best.items()}
        self.best_scores = torch.tensor(kept["best_scores"])
        self.skipped.copy_(torch.tensor(kept["skipped"]))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(unpacked(kept["weights"][name]))
        state = self._optimizer.state_dict()
        state["state"] = {int(i): {k: unpacked(v) for k, v in s.items()} for i, s in kept["optimizer"].items()}
        self._optimizer.load_state_dict(state)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self._graph = None


def packed(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON: its type, its shape, its bytes in base 64 (exact, and small)."""
    array = tensor.detach().cpu().contiguous().numpy()
    return {"type": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def unpacked(kept: dict[str, Any]) -> Tensor:
    """The inverse of `packed`."""
    array = np.frombuffer(base64.b64decode(kept["data"]), dtype=kept["type"]).reshape(kept["shape"])
    return torch.from_numpy(array.copy())
