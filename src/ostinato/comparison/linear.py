"""What each linear recurrence can do: every linear mixer on the same tasks, small and all alike.

The question is what a recurrence can learn in a few hundred steps at a width of 64 in two layers, not what it could
reach: a zero says "not under these conditions". Every mixer has the same tasks, batches, steps and learning rate; text
alone is at equal parameters instead of equal width. Attention and the GRU stand beside them, as yardsticks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ostinato.comparison.cells import Cell
from ostinato.errors import ConfigurationError, UnknownNameError

YARDSTICKS = ("attention", "gru")
SIGNED = (
    "delta_net(negative_eigenvalues=True)",
    "delta_product(negative_eigenvalues=True)",
    "gated_delta_net(negative_eigenvalues=True)",
    "mamba(negative_eigenvalues=True)",
)
"""Variants whose transitions may turn a sign: it decides on parity and on groups."""


class Training(NamedTuple):
    """One model is trained on one task, for some columns of the table."""

    task: str
    steps: int
    columns: dict[str, str]
    """By column, the key of its number among the metrics."""
    batch_size: int = 32
    also: tuple[str, ...] = ()
    parameters: int | None = None
    """Widths are chosen for so many, instead of the width of the budget."""
    higher_is_better: bool = True


class Budget(NamedTuple):
    """What is trained."""

    plans: tuple[str, ...] | None
    """None: every linear mixer, the signed variants and the yardsticks."""
    d_model: int
    depth: int
    seeds: int
    learning_rate: float
    trainings: tuple[Training, ...]


def _trainings(
    scale: float, test_size: int, *, names: Iterable[str] | None = None, steps: int | None = None
) -> tuple[Training, ...]:
    """The trainings of the table, at a share of their steps; or some of them, or all with `steps`."""
    size = f"test_size={test_size}"
    grammar = f"letters=6, length=16, test_size={min(32, test_size)}"
    t4 = f"selectivbench(variant='T4', gap=(1, 5), tested_gaps=(10, 50), {grammar})"
    found = {
        "parity": Training(
            f"parity(min_length=2, max_length=16, tested_lengths=(16, 64, 256), {size})",
            300,
            {"parity": "accuracy/length 16", "parity, 4×": "accuracy/length 64"},
        ),
        "mod-3": Training(
            f"modular_counting(modulus=3, min_length=2, max_length=16, tested_lengths=(16, 64), {size})",
            300,
            {"mod-3": "accuracy/length 16", "mod-3, 4×": "accuracy/length 64"},
        ),
        "S3": Training(
            f"word_problem(group='S3', length=12, tested_lengths=(12, 48), {size})",
            400,
            {"S3": "accuracy/length 12", "S3, 4×": "accuracy/length 48"},
            64,
        ),
        # Words of swaps: all 120 elements would not be learned in so few steps by any.
        "S5": Training(
            f"word_problem(group='S5', letters='swaps', length=8, tested_lengths=(8, 32), {size})",
            400,
            {"S5": "accuracy/length 8", "S5, 4×": "accuracy/length 32"},
            64,
        ),
        "MQAR": Training(
            f"mqar(vocabulary=32, sizes=((16, 2), (32, 4), (64, 8)), {size})",
            400,
            {f"MQAR {pairs}": f"accuracy/length {8 * pairs}" for pairs in (2, 4, 8)},
        ),
        "selective copying": Training(
            f"selective_copying(symbols=4, alphabet=8, places=20, {size})",
            200,
            {"selective copying": "accuracy"},
        ),
        "passkey": Training(
            f"passkey(digits=3, length=32, tested_lengths=(32, 128, 512), {size})",
            200,
            {
                "passkey": "accuracy/length 32",
                "passkey, 4×": "accuracy/length 128",
                "passkey, 16×": "accuracy/length 512",
            },
        ),
        "T1": Training(f"selectivbench(variant='T1', {grammar})", 100, {"T1": "accuracy"}),
        "T2": Training(
            f"selectivbench(variant='T2', gap=(1, 5), {grammar})",
            100,
            {"T2": "accuracy", "T4": f"{t4}: accuracy/gap 50"},
            also=(t4,),
        ),
        "T3": Training(f"selectivbench(variant='T3', {grammar})", 100, {"T3": "accuracy"}),
        "text": Training(
            "text(window=64, max_bytes=200000)", 200, {"bits per byte": "bits_per_byte"}, 16, (), 150_000, False
        ),
    }
    chosen = found if names is None else {name: found[name] for name in names}
    return tuple(
        training._replace(steps=steps or max(1, round(training.steps * scale))) for training in chosen.values()
    )


BUDGETS = {
    "smoke": Budget(("delta_net", "mamba2"), 16, 1, 2, 5e-3, _trainings(1, 4, names=("parity", "T2"), steps=2)),
    "cpu": Budget(
        ("linear_attention", "gla", "mamba2", "delta_net", SIGNED[0], "attention"),
        64,
        2,
        3,
        5e-3,
        _trainings(0.75, 64, names=("parity", "MQAR", "selective copying", "passkey", "T1")),
    ),
    "gpu": Budget(None, 64, 2, 3, 5e-3, _trainings(1, 64)),
}


def linear_plans() -> list[str]:
    """Every registered mixer whose recurrence is linear, the signed variants, then the yardsticks."""
    from ostinato.mixers.registry import mixer_class, mixers

    names = [name for name in mixers() if mixer_class(name).traits.linear and name not in YARDSTICKS]
    found = []
    for name in names:
        found += [name, *(plan for plan in SIGNED if plan.startswith(f"{name}("))]
    return [*found, *YARDSTICKS]


def budget_of(name: str) -> Budget:
    """A budget by its name; raises `UnknownNameError`."""
    if name not in BUDGETS:
        raise UnknownNameError("budget", name, BUDGETS)
    return BUDGETS[name]


def plans_of(budget: Budget, chosen: Iterable[str] = ()) -> list[str]:
    """The rows: those chosen, else those of the budget; raises what parsing a plan raises."""
    from ostinato.models.plan import parse_plan

    return [str(parse_plan(plan)) for plan in (list(chosen) or budget.plans or linear_plans())]


def cells_of(budget: Budget, plans: Iterable[str]) -> tuple[list[Cell], dict[str, str]]:
    """The cells, all of the first seed before any of the next; and the plans that have no cell for a training.

    The second maps "plan on task" to the reason: no width has the parameters asked.
    """
    from ostinato.comparison.widths import width_for

    cells, without = [], {}
    plans = list(plans)
    for seed in range(budget.seeds):
        for training in budget.trainings:
            for plan in plans:
                width = budget.d_model
                if training.parameters is not None:
                    try:
                        width = width_for(plan, training.task, budget.depth, training.parameters)
                    except ConfigurationError as error:
                        without[f"{plan} on {training.task}"] = str(error)
                        continue
                cells.append(
                    Cell(
                        plan,
                        training.task,
                        seed,
                        width,
                        budget.depth,
                        training.steps,
                        training.batch_size,
                        budget.learning_rate,
                        training.also,
                        device="cpu",
                    )
                )
    return cells, without


def columns_of(budget: Budget) -> dict[str, tuple[str, str, bool]]:
    """The columns, as `board.read_board` takes them."""
    return {
        name: (training.task, key, training.higher_is_better)
        for training in budget.trainings
        for name, key in training.columns.items()
    }


def content_of(
    name: str,
    plans: Iterable[str],
    cells: list[Cell],
    found: Mapping[Cell, dict[str, Any]],
    speeds: Mapping[str, Mapping[str, Any]],
    without: Mapping[str, str],
) -> dict[str, Any]:
    """The whole table as JSON: sizes, columns with their baselines and chance, a row for each plan, the machine.

    Args:
        name: of the budget.
        plans: the rows, in order.
        cells: all that there are to be, and `found`, those that have been run.
        speeds: by plan, then by "cpu" or "cuda", what `measure_speed` gave or `{"failed": message}`.
        without: see `cells_of`.
    """
    from ostinato.comparison.board import read_board
    from ostinato.comparison.cells import build_task
    from ostinato.comparison.speed import CPU_LOAD, CUDA_LOAD
    from ostinato.mixers.registry import mixer_class
    from ostinato.models.plan import parse_plan
    from ostinato.report import provenance

    budget = budget_of(name)
    columns = columns_of(budget)
    board = read_board(found, columns)
    rows = []
    for plan in plans:
        base = parse_plan(plan).layers[0].name
        of_width = [r for c, r in found.items() if c.plan == plan and c.d_model == budget.d_model and "failed" not in r]
        rows.append(
            {
                "plan": plan,
                "mixer": base,
                "linear": mixer_class(base).traits.linear,
                "scores": {
                    column: {
                        "mean": round(score.mean, 4) if score.values else None,
                        "spread": round(score.spread, 4) if len(score.values) > 1 else None,
                        "values": [round(value, 4) for value in score.values],
                        "failed": score.failures,
                    }
                    for column, score in board.scores.get(plan, {}).items()
                },
                "state_bytes": of_width[0]["state_bytes"] if of_width else None,
                "milliseconds_per_step": round(board.costs[plan]["ms per step"], 2) if plan in board.costs else None,
                "speed": speeds.get(plan, {}),
            }
        )
    tasks = {training.task: build_task(training.task) for training in budget.trainings}
    for training in budget.trainings:
        # Baselines in the measure of the columns: where a task's own metric is another, this one object has it changed.
        measure = next(iter(training.columns.values())).partition("/")[0]
        setattr(tasks[training.task], "metric", measure)  # noqa: B010 (a class variable, to the type checker)
    return {
        "budget": name,
        "sizes": {
            "d_model": budget.d_model,
            "layers": budget.depth,
            "seeds": budget.seeds,
            "learning_rate": budget.learning_rate,
        },
        "trainings": [
            {
                "task": training.task,
                "steps": training.steps,
                "batch_size": training.batch_size,
                "parameters": training.parameters,
                "columns": list(training.columns),
                "chance": tasks[training.task].chance,
                "baselines": tasks[training.task].baselines(),
            }
            for training in budget.trainings
        ],
        "columns": {column: {"higher_is_better": higher} for column, (_, _, higher) in columns.items()},
        "best": {column: board.best(column) for column in columns},
        "rows": rows,
        "left_out": dict(without),
        "speed_loads": {"cpu": CPU_LOAD._asdict(), "cuda": CUDA_LOAD._asdict()},
        "finished": [len(found), len(cells)],
        "seconds": round(sum(record["seconds"] for record in found.values()), 1),
        "machine": provenance(),
    }


def rows_of(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """The table as text, from its JSON: headers, rows, and the places (row, column) of the best.

    Numbers are means ± standard deviations; a sign tells columns apart in which a smaller one is better.
    """
    columns = list(content["columns"])
    devices = [name for name in ("cpu", "cuda") if any(name in row["speed"] for row in content["rows"])]
    headers = ["mixer", *columns, "state, bytes"]
    headers += [f"tokens/s, {'two threads' if name == 'cpu' else 'GPU'}" for name in devices]
    rows, best = [], set()
    for index, row in enumerate(content["rows"]):
        cells = [row["plan"]]
        for number, column in enumerate(columns, start=1):
            score = row["scores"].get(column)
            if score is None or (score["mean"] is None and not score["failed"]):
                cells.append("–")
                continue
            if score["mean"] is None:
                cells.append("failed")
                continue
            spread = "" if score["spread"] is None else f" ± {score['spread']:.2f}"
            cells.append(f"{score['mean']:.2f}{spread}" + (" *" if score["failed"] else ""))
            if row["plan"] in content["best"][column]:
                best.add((index, number))
        cells.append("–" if row["state_bytes"] is None else f"{row['state_bytes']:,}")
        for name in devices:
            speed = row["speed"].get(name, {})
            cells.append(f"{speed['training']:,.0f}" if "training" in speed else "failed" if speed else "–")
        rows.append(cells)
    return headers, rows, best
