"""`ostinato compare`: several mixers on one task, all else equal."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import INTERRUPTED, err, out, print_json, print_table, progress_bar
from ostinato.errors import ConfigurationError


@dataclass
class Trained:
    """What one mixer reached: a value for each seed, its sizes, and the curve of its first seed."""

    plan: str
    scores: list[float]
    splits: dict[str, list[float]]
    parameters: int
    state_bytes: int
    milliseconds: float
    curve: tuple[list[int], list[float]]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation of the scores; NaN for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


def compare(
    task: Annotated[str, typer.Option(help="A task; `ostinato tasks` lists them.")],
    mixers: Annotated[str, typer.Option(help="Mixers or plans, by commas; options in brackets.")],
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the task, NAME=VALUE; may be repeated.")
    ] = None,
    d_model: Annotated[int, typer.Option(help="Width, the same for all.")] = 64,
    depth: Annotated[int, typer.Option(help="Layers, the same for all.")] = 2,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    batch: Annotated[int, typer.Option(help="Sequences in one update.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its peak, the same for all.")] = 2e-3,
    seeds: Annotated[int, typer.Option(help="Runs of each mixer.")] = 1,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder; reports/compare-TASK by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu to stay there; the best there is by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train several mixers on one task: the same width, depth, batches, steps and learning rate.

    Prints the scores beside the task's baselines, and writes a page, a figure and the numbers. An interrupted
    comparison goes on where it was when it is started again.

    [bold]Examples[/]

      ostinato compare --task parity --mixers lstm,gla,"delta_net(negative_eigenvalues=True)"

      ostinato compare --task mqar --mixers mamba2,gated_delta_net,attention --steps 2000 --seeds 3

      ostinato compare --task word_problem --option group=S3 --mixers "delta_product, gru" --out s3
    """
    import ostinato
    from ostinato.cli.runs import parse_options, split_names
    from ostinato.files import read_json, write_json
    from ostinato.models.plan import parse_plan
    from ostinato.report import provenance

    plans = [str(parse_plan(name)) for name in split_names(mixers)]
    if not plans or seeds < 1:
        raise ConfigurationError(f"a comparison needs at least one mixer and one seed, got {mixers!r} and {seeds}")
    if len(set(plans)) < len(plans):
        raise ConfigurationError(f"a mixer is named twice in {mixers!r}")
    made = ostinato.task(task, **parse_options(option))
    folder = out_folder or Path("reports") / f"compare-{task}"
    settings = {
        "task": {"name": made.name, "options": made.options(), "fingerprint": made.fingerprint()},
        "d_model": d_model,
        "depth": depth,
        "steps": steps,
        "batch_size": batch,
        "learning_rate": learning_rate,
    }
    record = folder / "settings.json"
    if record.exists() and read_json(record) != _plain(settings):
        raise ConfigurationError(f"{folder} holds a comparison with other settings; name another --out, or remove it")
    write_json(record, settings)
    with progress_bar() as bar:
        total = bar.add_task("", total=len(plans) * seeds * steps, note="")
        rows = [_train(plan, made, settings, seeds, folder, device, bar, total) for plan in plans]
    baselines = made.baselines()
    rows.sort(key=lambda row: row.mean, reverse=made.higher_is_better)
    content = {**settings, "metric": made.metric, "seeds": seeds, "baselines": baselines, "machine": provenance()}
    content["results"] = [
        {
            "plan": row.plan,
            "score": row.mean,
            "scores": row.scores,
            "splits": row.splits,
            "parameters": row.parameters,
            "state_bytes": row.state_bytes,
            "milliseconds_per_step": row.milliseconds,
        }
        for row in rows
    ]
    write_json(folder / "result.json", content)
    headers, table = _table(rows, made, baselines, seeds)
    _write_page(folder, headers, table, rows, made, baselines, content)
    if json:
        print_json(content)
    else:
        print_table(headers, table, f"{task}, {steps} steps, {depth} layers of width {d_model}")
        out.print(f"\n{folder / 'index.html'}")


def _plain(content: Any) -> Any:
    """What a value is after a trip through JSON (tuples become lists)."""
    import json

    return json.loads(json.dumps(content))


def _train(
    plan: str, task: Any, settings: dict[str, Any], seeds: int, folder: Path, device: str | None, bar: Any, total: Any
) -> Trained:
    import torch

    import ostinato
    from ostinato.models.language import LanguageModel
    from ostinato.models.vector_classifier import VectorClassifier
    from ostinato.training.checkpoints import last_checkpoint

    steps = settings["steps"]
    histories: list[Any] = []
    model: LanguageModel | VectorClassifier | None = None
    for seed in range(seeds):
        err.print(f"[dim]{plan}, seed {seed}[/]")
        torch.manual_seed(seed)
        shape = (settings["d_model"], plan, settings["depth"])
        if task.reads_vectors:
            model = VectorClassifier(task.vocab_size, task.num_classes, *shape)
        else:
            # A token of a task is a byte's number: every task's vocabulary fits, or has its own size.
            model = LanguageModel(max(256, task.vocab_size), *shape, tie_embeddings=False)
        run = folder / "runs" / f"{''.join(c if c.isalnum() or c in '_-' else '-' for c in plan)}-{seed}"
        resume = last_checkpoint(run) is not None
        done = bar.tasks[0].completed

        def tick(report: Any, done: float = done, seed: int = seed) -> None:
            bar.update(total, completed=done + report.step, note=f"{plan} {seed}: loss {report.loss:.3f}")

        history = ostinato.fit(
            model,
            task,
            steps=steps,
            batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            weight_decay=0.01,
            seed=seed,
            directory=run,
            resume=resume,
            keep_checkpoints=1,
            device=device,
            callbacks=[tick],
            progress=False,
        )
        if history.interrupted:
            err.print(f"stopped; finished parts are kept in {folder}: the same command goes on")
            raise typer.Exit(INTERRUPTED)
        bar.update(total, completed=done + steps)
        histories.append(history)
    assert model is not None
    final = [history.evaluations[-1].metrics for history in histories]
    names = [name for name in final[0] if name.startswith(f"{task.metric}/")]
    points = histories[0].evaluations
    return Trained(
        plan,
        [metrics[task.metric] for metrics in final],
        {name.partition("/")[2]: [metrics[name] for metrics in final] for name in names},
        sum(parameter.numel() for parameter in model.parameters()),
        ostinato.state.num_bytes(model.initial_state(1)),
        1e3 * histories[0].seconds[-1] / steps if histories[0].seconds else math.nan,
        ([each.step for each in points], [each.metrics[task.metric] for each in points]),
    )


def _table(
    rows: list[Trained], task: Any, baselines: dict[str, float], seeds: int
) -> tuple[list[str], list[list[Any]]]:
    splits = list(rows[0].splits)
    headers = ["mixer", task.metric.replace("_", " "), *(["±"] if seeds > 1 else []), *splits]
    headers += ["parameters", "state bytes", "ms per step"]
    table: list[list[Any]] = []
    for row in rows:
        parts = [statistics.fmean(row.splits[name]) for name in splits]
        spread = [row.spread] if seeds > 1 else []
        table.append([row.plan, row.mean, *spread, *parts, row.parameters, row.state_bytes, row.milliseconds])
    blank = [""] * (len(headers) - 2)
    table += [[f"baseline: {name}", value, *blank] for name, value in baselines.items()]
    return headers, table


def _write_page(
    folder: Path,
    headers: list[str],
    table: list[list[Any]],
    rows: list[Trained],
    task: Any,
    baselines: dict[str, float],
    content: dict[str, Any],
) -> None:
    from ostinato.report import Figure, Page, Series, save_png, save_svg

    name = task.metric.replace("_", " ")
    lines = [Series(row.plan, *row.curve) for row in rows]
    figure = Figure(f"{name} on the test set", lines, "step", name, levels=baselines)
    save_svg(figure, folder / "figure.svg")
    save_png(figure, folder / "figure.png")
    page = Page(f"{task.name}: {len(rows)} mixers", "the same width, depth, batches, steps and learning rate for all")
    page.table(headers, table)
    page.figure(figure)
    page.heading("How it was had")
    facts = {key: content[key] for key in ("d_model", "depth", "steps", "batch_size", "learning_rate", "seeds")}
    facts |= content["task"]["options"] | content["machine"]
    page.table(["what", "value"], [[key, str(value)] for key, value in facts.items()])
    page.save(folder / "index.html")
