"""The training loop: a thin one over Hugging Face Accelerate, that can be stopped at any step and resumed exactly.

    history = fit(model, task, steps=1000, directory="runs/first")
    history = fit(model, task, steps=1000, directory="runs/first", resume=True)     # after Ctrl-C, or kill -9

A run is a folder: `run.json` (what was asked), `metrics.jsonl` (what happened, line by line), `history.json` (the
same as one record), `checkpoints/` (see `ostinato.training.checkpoints`).
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ostinato.errors import CheckpointError, ConfigurationError, DivergenceError
from ostinato.tasks.base import Metrics, Task
from ostinato.training import checkpoints
from ostinato.training.captured import Captured
from ostinato.training.carry import CarriedState
from ostinato.training.compiled import compiled_blocks
from ostinato.training.evaluate import evaluate
from ostinato.training.history import History
from ostinato.training.log import Log
from ostinato.training.parameters import parameter_groups
from ostinato.training.plugs import Curriculum, Gradient, Objective, backpropagation, shown_in_order, task_loss
from ostinato.training.run import Run
from ostinato.training.schedules import Schedule, warmup_cosine


@dataclass
class Report:
    """What a callback is told after each step."""

    step: int
    """Steps done."""
    loss: float
    gradient_norm: float
    model: nn.Module
    history: History
    metrics: Metrics | None
    """The scores, if the model was evaluated after this step."""


Callback = Callable[[Report], bool | None]
"""Called after each step; returning True ends the run there, with a checkpoint."""


def fit(
    model: nn.Module,
    task: Task,
    *,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    warmup: int | None = None,
    final_learning_rate: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    directory: str | Path | None = None,
    resume: bool = False,
    evaluate_every: int | None = None,
    evaluation_batches: int | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    mixed_precision: str = "no",
    gradient_accumulation: int = 1,
    device: str | None = None,
    compile: bool | str = False,
    capture: bool = False,
    objective: Objective = task_loss,
    gradient: Gradient = backpropagation,
    curriculum: Curriculum = shown_in_order,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    schedule: Schedule | None = None,
    callbacks: Sequence[Callback] = (),
    max_skipped: int = 10,
    tensorboard: bool = False,
    progress: bool = True,
) -> History:
    """Train a model on a task.

    The model is any module with `model(tokens, state, reset=…) -> (logits, state)`. Where the task carries state, the
    state at the end of a window enters the next one, without gradient.

    Args:
        steps: updates in all, those before a resume included.
        batch_size: sequences in one update, over all processes.
        learning_rate, weight_decay: see `parameter_groups`; some parameters take less.
        warmup: steps of linear warm-up; None takes a twentieth of the steps, at most 200.
        final_learning_rate: where the cosine ends, as a share of `learning_rate`.
        clip: largest global norm of the gradient; 0 does not clip.
        seed: of the batches, and of dropout. The caller's random state is left as it was.
        directory: where the run is kept; None keeps nothing.
        resume: go on from the last checkpoint in `directory`. Same task, batch_size and seed; on the same machine, a
            resumed run ends with the same bits as one that was never stopped.
        evaluate_every: steps between evaluations (None: a tenth of the run); one more at the end. 0: only that one.
        evaluation_batches: at most so many test batches each time.
        checkpoint_every: steps between checkpoints (None: a tenth of the run); one more at the end and on Ctrl-C.
        keep_checkpoints: how many of them stay.
        mixed_precision: "no", "bf16" or "fp16".
        gradient_accumulation: parts in which the batch is done, to save memory; the result is the same.
        device: "cpu" to stay there; None takes what Accelerate finds.
        compile: compile the model's blocks for this run, by `torch.compile` (a string names its backend): pointwise
            work between the engines becomes fewer passes over memory. The first step then waits for the compiler, and
            so does the first evaluation and every new shape; results differ by rounding from those without.
        capture: record the gradient of a step as a CUDA graph and replay it, see `ostinato.training.captured`: on a
            GPU that waits for the host's launches, a step takes a fraction of the time. Elsewhere it changes nothing.
        objective, gradient, curriculum: the places for learning rules, see `ostinato.training.plugs`.
        optimizer: from parameter groups to an optimiser; None is AdamW with betas (0.9, 0.95), fused on a GPU.
        schedule: from steps done to a factor on the learning rate; None is warm-up and cosine.
        callbacks: called after each step; one that returns True ends the run there.
        max_skipped: a step whose loss or gradient is not finite is skipped and counted; so many in a row are an error.
        tensorboard: also write TensorBoard's files to the directory.
        progress: show a bar.

    Ctrl-C ends the run after the current step, with a checkpoint, and returns; `history.interrupted` says so. A second
    Ctrl-C stops at once. One process, or many under `accelerate launch` (data parallel; dropout then repeats after a
    resume only in the first process).

    Raises:
        BackendError: `capture` of a step that waits for its device.
        ConfigurationError: an argument out of range; `compile` of a model without blocks; `capture` together with
            several processes, parts of a batch or "fp16", whose steps are not alike; a run in `directory` that is
            not to be resumed; a resumed run whose task, batch_size or seed is another.
        CheckpointError: there is no run to resume, its checkpoint is damaged or newer, or one cannot be written.
        DivergenceError: `max_skipped` steps in a row without a finite loss and gradient.
    """
    at_least = {
        "steps": (1, steps),
        "batch_size": (1, batch_size),
        "gradient_accumulation": (1, gradient_accumulation),
        "keep_checkpoints": (1, keep_checkpoints),
        "max_skipped": (1, max_skipped),
        "evaluation_batches": (1, evaluation_batches),
        "evaluate_every": (0, evaluate_every),
        "checkpoint_every": (0, checkpoint_every),
        "learning_rate": (0, learning_rate),
        "weight_decay": (0, weight_decay),
        "warmup": (0, warmup),
        "clip": (0, clip),
    }
    _check(model, task, at_least, mixed_precision)
    directory = None if directory is None else Path(directory)
    found = _find_run(directory, resume)
    settings = {"task": _describe(task), "batch_size": batch_size, "seed": seed}
    notes = {} if found is None else _same_run(found, settings)
    if found is not None:
        checkpoints.read_model(found / "model", model)

    make = optimizer or _adamw
    accelerator = _accelerator(mixed_precision, device)
    if capture:
        if accelerator.num_processes > 1 or gradient_accumulation > 1 or mixed_precision == "fp16":
            raise ConfigurationError(
                f"capture=True takes one process, gradient_accumulation=1 and mixed_precision 'no' or 'bf16'; got "
                f"{accelerator.num_processes} processes, {gradient_accumulation} and {mixed_precision!r}"
            )
        gradient = Captured(gradient)
    if batch_size % (accelerator.num_processes * gradient_accumulation):
        raise ConfigurationError(
            f"batch_size={batch_size} is not divisible by {accelerator.num_processes} processes × "
            f"gradient_accumulation={gradient_accumulation}"
        )
    # The parameters move to the device first: the optimiser must see them there.
    model.to(accelerator.device)
    raw = make(parameter_groups(model, learning_rate, weight_decay))
    rates = [group["lr"] for group in raw.param_groups]
    prepared, prepared_optimizer = accelerator.prepare(model, raw)
    if warmup is None:
        warmup = min(200, steps // 20)
    run = Run(
        model,
        task,
        accelerator,
        prepared_optimizer,
        prepared,
        schedule or warmup_cosine(steps, warmup, final_learning_rate),
        batch_size,
        seed,
        clip,
        gradient_accumulation,
        objective,
        gradient,
        curriculum,
        CarriedState(task.carries_state),
        History(task.name, task.metric, task.higher_is_better),
        directory,
        rates=rates,
    )
    evaluate_every = max(1, steps // 10) if evaluate_every is None else evaluate_every
    checkpoint_every = max(1, steps // 10) if checkpoint_every is None else checkpoint_every
    asked = {
        "steps": steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "final_learning_rate": final_learning_rate,
        "clip": clip,
        "evaluate_every": evaluate_every,
        "evaluation_batches": evaluation_batches,
        "checkpoint_every": checkpoint_every,
        "mixed_precision": mixed_precision,
        "gradient_accumulation": gradient_accumulation,
        "compile": compile,
        "capture": capture,
    }
    header = {"task": settings["task"], "training": {"batch_size": batch_size, "seed": seed, **asked}}
    training = model.training
    with ExitStack() as stack:
        devices = [torch.cuda.current_device()] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(seed + accelerator.process_index)
        stack.callback(lambda: model.train(training))
        stack.callback(lambda: accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
        if compile:
            stack.enter_context(compiled_blocks(model, "inductor" if compile is True else compile))
        if found is not None:
            run.restore(found, notes)
        log = Log(run, stack, header, steps, progress, tensorboard)
        stopped = stack.enter_context(_interruptible())
        prepared.train()
        in_a_row, ended, saved = 0, False, run.step
        while run.step < steps and not ended:
            loss, norm, tokens = run.update()
            finite = math.isfinite(loss) and math.isfinite(norm)
            in_a_row = 0 if finite else in_a_row + 1
            log.step(loss, norm, tokens, finite)
            if in_a_row >= max_skipped:
                raise DivergenceError(
                    f"the loss or its gradient was not finite in {in_a_row} steps in a row, up to step {run.step} "
                    f"(loss {loss}, gradient norm {norm}): lower the learning rate ({learning_rate})"
                )
            last = run.step == steps
            metrics = None
            if last or (evaluate_every and run.step % evaluate_every == 0):
                metrics = evaluate(prepared, task, batches=evaluation_batches)
                log.evaluation(metrics)
            report = Report(run.step, loss, norm, model, run.history, metrics)
            ended = sum(bool(callback(report)) for callback in callbacks) > 0 or stopped.is_set()
            run.history.interrupted, run.history.finished = stopped.is_set() and not last, last
            if last or ended or (checkpoint_every and run.step % checkpoint_every == 0):
                log.flush()
                run.save(settings, keep_checkpoints)
                saved = run.step
        run.history.finished = run.step >= steps
        if run.history.interrupted:
            where = f"; step {saved} is saved in {directory}" if directory else ""
            log.bar.say(f"interrupted after step {run.step}{where}")
    return run.history


def _check(
    model: nn.Module, task: Task, at_least: Mapping[str, tuple[float, float | None]], mixed_precision: str
) -> None:
    for name, (least, value) in at_least.items():
        if value is not None and not value >= least:
            raise ConfigurationError(f"{name} must be at least {least}, got {value}")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigurationError(f"mixed_precision is 'no', 'bf16' or 'fp16', got {mixed_precision!r}")
    if not hasattr(task, "train_batch"):
        raise ConfigurationError(f"{task!r} is not a task; build one by ostinato.task(name, …)")
    size = getattr(model, "vocab_size", None)
    if isinstance(size, int) and size < task.vocab_size:
        raise ConfigurationError(f"the task {task.name} has {task.vocab_size} tokens, the model only {size}")


def _find_run(directory: Path | None, resume: bool) -> Path | None:
    """The checkpoint to go on from; None begins anew."""
    if directory is None:
        if resume:
            raise ConfigurationError("resume=True needs the directory of the run")
        return None
    if resume and not (directory / "run.json").exists() and checkpoints.last_checkpoint(directory) is None:
        raise CheckpointError(f"there is no run in {directory} to resume")
    found = checkpoints.last_checkpoint(directory)
    if found is not None and not resume:
        raise ConfigurationError(f"{directory} holds a run already: pass resume=True to go on, or another directory")
    return found


def _describe(task: Task) -> dict[str, Any]:
    return {"name": task.name, "options": task.options(), "fingerprint": task.fingerprint()}


def _same_run(found: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The notes of a checkpoint, if it is of this task, batch_size and seed."""
    notes = checkpoints.read_checkpoint(found)
    before = notes.get("task", {})
    if before.get("fingerprint") != settings["task"]["fingerprint"]:
        raise ConfigurationError(
            f"{found} is of the task {before.get('name')} with {before.get('options')}, not of "
            f"{settings['task']['name']} with {settings['task']['options']} (or its text has changed)"
        )
    for name in ("batch_size", "seed"):
        if notes.get(name) != settings[name]:
            raise ConfigurationError(f"{found} was trained with {name}={notes.get(name)}, not {settings[name]}")
    return notes


def _accelerator(mixed_precision: str, device: str | None) -> Any:
    """An Accelerator of this call's own: its settings are global, so those of a call before are forgotten."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if device not in (None, "cpu", "cuda", "mps", "xpu"):
        raise ConfigurationError(f"device is None, 'cpu', 'cuda', 'mps' or 'xpu', got {device!r}")
    if PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device == "cpu")
    if device is not None and accelerator.device.type != device:
        raise ConfigurationError(f"there is no device {device!r} here; Accelerate found {accelerator.device}")
    return accelerator


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The default: one launch a group where the parameters are on a GPU, and the kind that torch chooses elsewhere."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.is_cuda and parameter.is_floating_point() for parameter in parameters)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True if fused else None)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt as usual. Only in the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
