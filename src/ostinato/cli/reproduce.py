"""`ostinato reproduce`: run a paper's experiment, and see its numbers beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ostinato.cli.console import INTERRUPTED, USER_ERROR, err, explain, out, print_json, print_table


def reproduce(
    number: Annotated[str, typer.Argument(metavar="NN|all", help="The number of a system, or all that are built.")],
    budget: Annotated[
        str, typer.Option(help="smoke (seconds), cpu (minutes on two cores) or gpu (minutes on one H100).")
    ] = "smoke",
    seed: Annotated[int, typer.Option(help="The seed of every random draw.")] = 0,
    out_folder: Annotated[Path, typer.Option("--out", help="The folder of reports.")] = Path("reports"),
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run the experiment of a system, and write the claims, the paper's numbers and ours.

    Each part is told with the time left, if a run of the same budget was ever finished. An interrupted run goes on
    where it was: start it again with the same budget and seed.

    [bold]Examples[/]

      ostinato reproduce 01

      ostinato reproduce 41 --budget cpu --out reports

      ostinato reproduce all --budget smoke
    """
    from ostinato.errors import OstinatoError
    from ostinato.papers import catalogue, runner

    if number == "all":
        numbers = [which.number for which in catalogue.systems() if catalogue.module_path(which) is not None]
        planned = len(catalogue.systems()) - len(numbers)
        err.print(f"{len(numbers)} systems are built, {planned} are planned and have no experiment yet")
        if not numbers:
            raise typer.Exit(USER_ERROR)
    else:
        numbers = [catalogue.system(number).number]
    outcomes, failures = [], 0
    for index in numbers:
        label = f"{index:02d}"
        try:
            outcome = runner.reproduce(
                index, budget, seed=seed, out=out_folder, say=lambda part, label=label: err.print(f"{label}  {part}")
            )
        except KeyboardInterrupt:
            again = f"ostinato reproduce {number} --budget {budget} --seed {seed} --out {out_folder}"
            err.print(f"stopped; finished parts are kept: `{again}` goes on")
            raise typer.Exit(INTERRUPTED) from None
        except OstinatoError as error:
            if number != "all":
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
