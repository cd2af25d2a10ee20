"""`ostinato reproduce`: run a paper's experiment, and see its numbers beside ours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ostinato.cli.console import INTERRUPTED, USER_ERROR, err, explain, out, print_json, print_table


def reproduce(
    numbers: Annotated[
        list[str], typer.Argument(metavar="NN…|all", help="The numbers of systems, or all that are built.")
    ],
    budget: Annotated[
        str, typer.Option(help="smoke (seconds), cpu (minutes on two cores) or gpu (minutes on one H100).")
    ] = "smoke",
    seed: Annotated[int, typer.Option(help="The seed of every random draw.")] = 0,
    out_folder: Annotated[Path, typer.Option("--out", help="The folder of reports.")] = Path("reports"),
    jobs: Annotated[int, typer.Option(help="Processes that compute parts side by side, over all GPUs.")] = 1,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", "--stop-after", help="Begin no part after so many; the same call goes on."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run the experiments of systems, and write the claims, the papers' numbers and ours.

    Each part is told with the time left, if a run of the same budget was ever finished. An interrupted run goes on
    where it was: start it again with the same budget and seed.

    With --jobs the parts of an experiment run side by side, each process on one GPU; what is timed runs alone,
    afterwards.

    [bold]Examples[/]

      ostinato reproduce 01

      ostinato reproduce 41 --budget cpu --out reports

      ostinato reproduce 36 47 --budget gpu --jobs 8 --minutes 50

      ostinato reproduce all --budget smoke
    """
    from ostinato.errors import OstinatoError
    from ostinato.papers import catalogue, runner

    if "all" in numbers:
        asked = [which.number for which in catalogue.systems() if catalogue.module_path(which) is not None]
        planned = len(catalogue.systems()) - len(asked)
        err.print(f"{len(asked)} systems are built, {planned} are planned and have no experiment yet")
        if not asked:
            raise typer.Exit(USER_ERROR)
    else:
        asked = list(dict.fromkeys(catalogue.system(number).number for number in numbers))
    end = None if minutes is None else time.monotonic() + 60 * minutes
    outcomes, failures = [], 0
    for index in asked:
        label = f"{index:02d}"
        left = None if end is None else (end - time.monotonic()) / 60

        def say(message: str, label: str = label) -> None:
            err.print(f"{label}  {escape(message)}")

        try:
            outcome = runner.reproduce(index, budget, seed=seed, out=out_folder, say=say, jobs=jobs, minutes=left)
        except (KeyboardInterrupt, runner.TimeIsUp) as stop:
            if isinstance(stop, runner.TimeIsUp):
                say(str(stop))
            again = f"ostinato reproduce {' '.join(numbers)} --budget {budget} --seed {seed} --out {out_folder}"
            again += f" --jobs {jobs}" if jobs > 1 else ""
            err.print(f"stopped; finished parts are kept: `{again}` goes on")
            raise typer.Exit(INTERRUPTED) from None
        except OstinatoError as error:
            if len(asked) == 1:
                raise
            explain(error)
            failures += 1
            continue
        outcomes.append(outcome)
        if not json:
            rows = [[c["claim"], c["theirs"], c["ours"], runner.verdict(c["holds"])] for c in outcome["claims"]]
            print_table(["claim", "theirs", "ours", "verdict"], rows, title=f"{label} {outcome['system']}")
            out.print(f"{out_folder / label / 'index.html'}\n")
    if json:
        print_json(outcomes)
    if failures:
        raise typer.Exit(1)
