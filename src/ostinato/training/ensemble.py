"""Many seeds trained as one batch: parameters stacked along a leading axis, and the model mapped over it.

    ensemble = fit_together(build, task, seeds=(0, 1, 2), steps=1000)
    scores = [evaluate(model, task) for model in ensemble]

Member s is what `fit(build(s), task, seed=s, …)` would give, up to rounding: its own initial values, its own batches,
its own clipping. For small models, whose steps cost more to launch than to compute, several cost little more than one;
on a GPU a step is launched as one graph (`ostinato.training.recorded`). One member alone is trained without the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ostinato.errors import ConfigurationError, DivergenceError
from ostinato.tasks.base import Batch, Task
from ostinato.training.parameters import parameter_groups
from ostinato.training.recorded import Recorded
from ostinato.training.schedules import warmup_cosine


class Ensemble:
    """Trained models of one architecture; iterating gives them one by one, in the order of the seeds."""

    def __init__(self, model: nn.Module, stacked: dict[str, Tensor], seeds: Sequence[int], losses: list[list[float]]):
        self.model, self.stacked, self.seeds, self.losses = model, stacked, tuple(seeds), losses

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[nn.Module]:
        """The one module, loaded with the values of each member in turn: use it before asking for the next."""
        for member in range(len(self)):
            self.model.load_state_dict({name: value[member] for name, value in self.stacked.items()}, strict=False)
            yield self.model


def fit_together(
    build: Callable[[int], nn.Module],
    task: Task,
    seeds: Sequence[int],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
    warmup: int = 100,
    final_learning_rate: float = 0.0,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    device: str | torch.device | None = None,
    max_skipped: int = 10,
    added_loss: Callable[[nn.Module], AbstractContextManager[Callable[[], Tensor]]] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Ensemble:
    """Train one model for each seed, all at once, by AdamW with warm-up and a cosine.

    Args:
        build: from a seed to a model with `model(tokens) -> (logits, state)`, all of the same shape; the caller's
            random state is left as it was.
        task: whose `train_batch(step, batch_size, seed)` and `loss` are used.
        seeds: of the initial values and of the batches.
        steps, batch_size, learning_rate, weight_decay, warmup, final_learning_rate, clip: as in `fit`, each member
            for itself.
        betas: of AdamW.
        device: where to train; None takes a GPU if there is one.
        max_skipped: a member's gradient that is not finite counts as zero; so many in a row are an error.
        added_loss: a context around a member's forward pass; it gives a function whose value is added to what is
            minimised, as `training.load_balance` does. The losses that are reported are the task's alone.
        say: told the losses ten times.

    Returns:
        The `Ensemble`; `losses` holds every member's loss at every tenth of the run.

    Raises:
        ConfigurationError: no seeds, no steps, or a model with buffers, which the members would have to share.
        DivergenceError: `max_skipped` steps of a member in a row without a finite loss and gradient.
    """
    if not seeds or steps < 1:
        raise ConfigurationError(f"an ensemble needs at least one seed and one step, got {seeds} and {steps}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    members = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            members.append(build(seed).to(device))
    model = members[0]
    if any(True for _ in model.buffers()):
        raise ConfigurationError(f"{type(model).__name__} has buffers: train its seeds one by one, by fit")
    stacked, _ = stack_module_state(members)
    stacked = {name: nn.Parameter(value.detach()) for name, value in stacked.items()}
    groups: list[dict[str, Any]] = [
        {**group, "params": [stacked[name] for name in group["names"]]}
        for group in parameter_groups(model, learning_rate, weight_decay)
    ]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=betas, capturable=on_gpu)
    rates = [group["lr"] for group in groups]
    if on_gpu:  # a recorded step reads its rates from tensors
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    factor = warmup_cosine(steps, warmup, final_learning_rate)
    current = _stacked([task.train_batch(0, batch_size, seed) for seed in seeds], device)
    each = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    finite = torch.ones(len(seeds), dtype=torch.bool, device=device)

    def logits_of(parameters: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
        with (added_loss or _nothing_added)(model) as term:
            return functional_call(model, parameters, (tokens,))[0], term()

    def update() -> None:
        optimizer.zero_grad()
        if len(seeds) == 1:
            logits, added = logits_of({name: value[0] for name, value in stacked.items()}, current.inputs[0])
            logits = logits.unsqueeze(0)
        else:
            logits, added = vmap(logits_of)(stacked, current.inputs)
        losses = torch.stack([task.loss(logits[member], _member(current, member)) for member in range(len(seeds))])
        (losses.sum() + added.sum()).backward()
        each.copy_(losses.detach())
        finite.copy_(_clip_each(list(stacked.values()), clip))
        optimizer.step()

    recorded = Recorded(update, device)
    losses: list[list[float]] = []
    in_a_row = torch.zeros(len(seeds), dtype=torch.long)
    for step in range(steps):
        if step:
            batch = _stacked([task.train_batch(step, batch_size, seed) for seed in seeds], torch.device("cpu"))
            if batch.inputs.shape != current.inputs.shape:
                raise ConfigurationError(
                    f"{type(task).__name__} has batches of different shapes, {tuple(current.inputs.shape[1:])} and "
                    f"{tuple(batch.inputs.shape[1:])}: train its seeds one by one, by fit"
                )
            for mine, new in zip(current[:3], batch[:3], strict=True):
                mine.copy_(new)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if on_gpu:
                group["lr"].fill_(rate * factor(step))
            else:
                group["lr"] = rate * factor(step)
        recorded()
        if step % 10 == 9 or step == steps - 1:
            # Looked at now and then only: on a GPU it would wait for the step to end.
            in_a_row = torch.where(finite.cpu(), 0, in_a_row + 1)
            if int(in_a_row.max()) >= max_skipped:
                seed = seeds[int(in_a_row.argmax())]
                raise DivergenceError(
                    f"the gradient of seed {seed} was not finite in step {step + 1} and the {max_skipped - 1} looked "
                    f"at before: lower the learning rate ({learning_rate})"
                )
        if (step + 1) % max(1, steps // 10) == 0:
            losses.append(each.tolist())
            say(f"step {step + 1} of {steps}, loss " + ", ".join(f"{loss:.4f}" for loss in losses[-1]))
    return Ensemble(model, {name: value.detach() for name, value in stacked.items()}, seeds, losses)


def _nothing_added(model: nn.Module) -> AbstractContextManager[Callable[[], Tensor]]:
    return nullcontext(lambda: next(model.parameters()).new_zeros(()))


def _stacked(batches: list[Batch], device: torch.device) -> Batch:
    """The members' batches as one, along a leading axis."""
    inputs, targets, mask = (torch.stack([batch[part] for batch in batches]).to(device) for part in range(3))
    return batches[0]._replace(inputs=inputs, targets=targets, mask=mask)


def _member(batch: Batch, member: int) -> Batch:
    return batch._replace(inputs=batch.inputs[member], targets=batch.targets[member], mask=batch.mask[member])


@torch.no_grad()
def _clip_each(parameters: Sequence[Tensor], clip: float) -> Tensor:
    """Clip every member's gradient to the norm `clip` (0 does not); one that is not finite becomes zero.

    Returns which members' gradients are finite, (members,).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    finite = norms.isfinite()
    broken = ~finite
    scale = (clip / (norms + 1e-6)).clamp(max=1) if clip else torch.ones_like(norms)
    for gradient in gradients:
        shape = (-1, *[1] * (gradient.ndim - 1))
        gradient.mul_(scale.view(shape)).masked_fill_(broken.view(shape), 0)
    return finite


def fit_seeds(
    build: Callable[[int], nn.Module], task: Task, seeds: Sequence[int], *, steps: int, **options: Any
) -> Iterator[Ensemble]:
    """`fit_together` of all seeds on a GPU; of one after the other on a processor, where a batch of them gains nothing.

    Arguments, results and errors are those of `fit_together`; the ensembles follow the order of the seeds.
    """
    groups = [list(seeds)] if torch.cuda.is_available() or not seeds else [[seed] for seed in seeds]
    for group in groups:
        yield fit_together(build, task, group, steps=steps, **options)
