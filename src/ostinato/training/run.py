"""One run while it is going: a step, and what is saved and restored so that the next one follows."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.tasks.base import Batch, Task
from ostinato.training import checkpoints
from ostinato.training.carry import CarriedState
from ostinato.training.history import History
from ostinato.training.plugs import Curriculum, Gradient, Objective
from ostinato.training.schedules import Schedule


def _numbers(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Two scalars as numbers, in one transfer: a step waits for its device once."""
    if first.device != second.device or type(first) is not Tensor:
        return float(first), float(second)
    dtype = torch.promote_types(first.dtype, second.dtype)
    one, other = torch.stack([first.to(dtype), second.to(dtype)]).tolist()
    return one, other


@dataclass
class Run:
    """One call of `fit`: its parts, and how far it is."""

    model: nn.Module
    task: Task
    accelerator: Any
    optimizer: Any
    prepared: nn.Module
    schedule: Schedule
    batch_size: int
    seed: int
    clip: float
    accumulation: int
    objective: Objective
    gradient: Gradient
    curriculum: Curriculum
    carried: CarriedState
    history: History
    directory: Path | None
    step: int = 0
    rates: list[float] = field(default_factory=list)

    def update(self) -> tuple[float, float, int]:
        """Do the next step; returns its loss, the norm of its gradient (not finite: no update) and its tokens."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        whole = self.curriculum(self.task, self.step, self.batch_size, self.seed)
        # Every process draws the whole batch and takes its rows: the curve does not depend on their number.
        rows = self.batch_size // self.accelerator.num_processes
        rank = self.accelerator.process_index
        batch = whole.rows(rank * rows, (rank + 1) * rows).to(self.accelerator.device)
        own_loss, state = self._gradients(batch)
        norm, loss = _numbers(self._clip(), self.accelerator.reduce(own_loss, reduction="mean"))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite or self.accelerator.scaler is not None:
            # A gradient scaler (float16) must see overflows: it skips such a step itself and lowers its scale.
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.carried.update(state)
        if not finite:
            self.carried.clear_unless_finite()
        self.step += 1
        return loss, norm, whole.inputs.numel()

    def _gradients(self, batch: Batch) -> tuple[Tensor, Any]:
        """Leave the gradient of the mean loss in the parameters; in `accumulation` parts of the rows."""
        rows = batch.inputs.shape[0]
        scored = batch.mask.sum()
        total, states = torch.zeros((), device=batch.inputs.device), []
        for index in range(self.accumulation):
            start, stop = rows * index // self.accumulation, rows * (index + 1) // self.accumulation
            part = batch.rows(start, stop)
            weight = 1.0 if self.accumulation == 1 else part.mask.sum() / scored
            with ExitStack() as stack:
                if index < self.accumulation - 1:
                    stack.enter_context(self.accelerator.no_sync(self.prepared))
                loss, state = self.gradient(
                    self.prepared,
                    self.task,
                    part,
                    self.carried.rows(start, stop),
                    self.objective,
                    lambda value, weight=weight: self.accelerator.backward(value * weight),  # type: ignore[misc]
                )
            total = total + loss * weight
            states.append(state)
        return total, states[0] if len(states) == 1 else ostinato.state.concatenate(states)

    def _clip(self) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, self.clip if self.clip else math.inf)
        return norm

    def save(self, settings: dict[str, Any], keep: int) -> None:
        """Write a checkpoint, by the main process; all take part where tensors are spread over them."""
        if self.directory is None:
            return
        state = ostinato.state.map(self.accelerator.gather, self.carried.value)
        model = self.accelerator.unwrap_model(self.prepared)
        notes = {**settings, "windows": self.carried.windows, "bytes": self.carried.bytes}

        def write(folder: Path) -> None:
            checkpoints.write_model(folder / "model", model, model.state_dict())
            checkpoints.write_optimizer(folder / "optimizer.safetensors", self.optimizer.optimizer)
            checkpoints.write_random(folder / "random.safetensors")
            if state is not None:
                ostinato.state.save(state, folder / "state.safetensors")

        if self.accelerator.is_main_process:
            checkpoints.save_checkpoint(self.directory / "checkpoints", self.step, notes, write, keep)
            self.history.save(self.directory / "history.json")
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path, notes: dict[str, Any]) -> None:
        """Go on from a checkpoint whose notes have been read; the weights are in the model already."""
        checkpoints.read_optimizer(path / "optimizer.safetensors", self.optimizer.optimizer)
        self.step = notes["step"]
        if (path / "state.safetensors").exists():
            rows = self.batch_size // self.accelerator.num_processes
            start = self.accelerator.process_index * rows
            state = checkpoints.read_state(path / "state.safetensors", self.model)
            state = ostinato.state.map(lambda leaf: leaf[start : start + rows].contiguous(), state)
            self.carried.value = ostinato.state.to(state, self.accelerator.device)
            self.carried.windows, self.carried.bytes = notes["windows"], notes["bytes"]
        # Last, since what stands above may draw random numbers.
        checkpoints.read_random(path / "random.safetensors")
