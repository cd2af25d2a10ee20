"""A cell: one mixer, one task, one seed; what it reached and what it cost, kept in one file.

    cell = Cell("gated_delta_net", "mqar(pairs=8, length=64)", seed=0, steps=500)
    result = run_cell(cell, folder)

A cell's name is made of everything that decides it, so that a folder may hold the cells of several comparisons, and a
comparison that is started again finds those that are there.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ostinato.errors import ConfigurationError
from ostinato.tasks.base import Task


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while a cell was training; what it had done is in its checkpoint, if it had one."""


@dataclass(frozen=True)
class Cell:
    """What decides a result."""

    plan: str
    """As `str(parse_plan(…))` writes it."""
    task: str
    """A name with options, "mqar(pairs=8)"; see `parse_task`."""
    seed: int = 0
    d_model: int = 64
    depth: int = 2
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 2e-3
    also: tuple[str, ...] = ()
    """Other tasks that the trained model is scored on: longer gaps, other sizes. They fit its inputs and outputs."""
    evaluations: int = 1
    """How often the model is scored on the way, the end included."""
    device: str | None = None

    def name(self) -> str:
        """A file's name: what a person wants to know, and a digest of everything else."""
        content = dataclasses.asdict(self)
        content["task"] = [_fingerprint(spec) for spec in (self.task, *self.also)]
        del content["device"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        return f"{_slug(self.task)}--{_slug(self.plan)}--{self.seed}--{digest}"


@lru_cache(maxsize=256)
def _fingerprint(spec: str) -> str:
    return build_task(spec).fingerprint()


def _slug(text: str) -> str:
    """Letters, digits and dashes, at most 60 of them."""
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in text).split())[:60]


def parse_task(text: str) -> tuple[str, dict[str, Any]]:
    """ "mqar(pairs=8, tested_lengths=(64, 128))" as a name and options; bare words are text: `word_problem(group=S5)`.

    Raises `ConfigurationError` for a text that is no such thing.
    """
    wrong = ConfigurationError(f"a task is written NAME or NAME(option=value, …), got {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise wrong from None
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)) or tree.args:
        raise wrong
    options: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise wrong
        try:
            options[keyword.arg] = (
                keyword.value.id if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            )
        except ValueError:
            raise wrong from None
    return tree.func.id, options


def build_task(text: str) -> Task:
    """The task that a text names; raises what `parse_task` and `ostinato.task` raise."""
    from ostinato.tasks.registry import task

    name, options = parse_task(text)
    return task(name, **options)


def build_model(plan: str, task: Task, d_model: int, depth: int) -> Any:
    """The model of a comparison: a classifier of every step, of tokens or of vectors, by what the task gives.

    Raises what the plan and the mixers raise.
    """
    from ostinato.models.token_classifier import TokenClassifier
    from ostinato.models.vector_classifier import VectorClassifier

    if task.reads_vectors:
        return VectorClassifier(task.vocab_size, task.num_classes, d_model, plan, depth)
    return TokenClassifier(task.vocab_size, d_model, plan, depth, num_classes=task.num_classes)


def result_path(cell: Cell, folder: Path) -> Path:
    """Where a cell's result is kept."""
    return folder / "cells" / f"{cell.name()}.json"


def read_result(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of a cell that has been run, else None; a damaged file counts as none."""
    try:
        content = json.loads(result_path(cell, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and ("metrics" in content or "failed" in content) else None


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and score one cell, and keep the result; one that fails is kept as failed, with its message.

    Returns the record: `cell`, and either `failed` (the message) or `metrics` (every score on the test set, those of
    the tasks of `also` by their own texts), `metric`, `curve` (steps, scores), `parameters`, `state_bytes` (of one
    sequence), `seconds` and `milliseconds_per_step`. Long cells have checkpoints, and go on from the last one.

    Raises:
        Interrupted: Ctrl-C.
    """
    from ostinato.files import write_json

    begin = time.perf_counter()
    record: dict[str, Any] = {"cell": _described(cell)}
    try:
        record |= _train(cell, folder)
    except Exception as error:  # whatever it is, it is this cell's own, and the others go on
        text = str(error).strip().splitlines()
        record["failed"] = f"{type(error).__name__}: {text[0] if text else ''}"
    record["seconds"] = round(time.perf_counter() - begin, 3)
    write_json(result_path(cell, folder), record)
    return record


def _described(cell: Cell) -> dict[str, Any]:
    """As JSON gives it back."""
    return {**dataclasses.asdict(cell), "also": list(cell.also)}


def failed(cell: Cell, folder: Path, message: str) -> dict[str, Any]:
    """Keep a cell as failed: what its process can no longer do itself."""
    from ostinato.files import write_json

    record = {"cell": _described(cell), "failed": message, "seconds": 0.0}
    write_json(result_path(cell, folder), record)
    return record


def _train(cell: Cell, folder: Path) -> dict[str, Any]:
    import torch

    import ostinato.state
    from ostinato.training.checkpoints import last_checkpoint
    from ostinato.training.evaluate import evaluate
    from ostinato.training.fit import fit

    task = build_task(cell.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = build_model(cell.plan, task, cell.d_model, cell.depth)
    # A short cell is quicker begun anew than kept.
    long = cell.steps >= 1000
    run = folder / "runs" / cell.name()
    history = fit(
        model,
        task,
        steps=cell.steps,
        batch_size=cell.batch_size,
        learning_rate=cell.learning_rate,
        weight_decay=0.01,
        seed=cell.seed,
        directory=run if long else None,
        resume=long and last_checkpoint(run) is not None,
        evaluate_every=max(1, math.ceil(cell.steps / cell.evaluations)) if cell.evaluations > 1 else 0,
        checkpoint_every=cell.steps // 4 if long else 0,
        keep_checkpoints=1,
        device=cell.device,
        progress=False,
    )
    if history.interrupted:
        raise Interrupted
    points = history.evaluations
    metrics = dict(points[-1].metrics)
    for spec in cell.also:
        other = build_task(spec)
        metrics |= {f"{spec}: {name}": value for name, value in evaluate(model, other).items()}
    shutil.rmtree(run, ignore_errors=True)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise ArithmeticError("the scores are not finite")
    seconds = history.seconds[-1] if history.seconds else math.nan
    return {
        "metric": task.metric,
        "metrics": metrics,
        "curve": [[point.step for point in points], [point.metrics[task.metric] for point in points]],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": ostinato.state.num_bytes(model.initial_state(1)),
        "milliseconds_per_step": round(1e3 * seconds / cell.steps, 3),
    }
