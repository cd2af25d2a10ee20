"""`ostinato verify`: hold every mixer to the law, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ostinato.cli.console import err, print_json


def verify(
    mixers: Annotated[list[str] | None, typer.Argument(metavar="[MIXER]…", help="Which ones; all by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU if there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="float32 and the usual route alone: seconds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every row as JSON.")] = False,
) -> None:
    """Check that training, splitting and streaming are the same function, gradients included, on this machine.

    What to run before reporting a bug: the table names the versions, the device, and the largest errors.

    [bold]Examples[/]

      ostinato verify --quick

      ostinato verify gated_delta_net mamba2

      ostinato verify --device cuda --json
    """
    from ostinato import testing

    report = testing.verify(
        mixers or None, device=device, quick=quick, progress=lambda name: err.print(f"[dim]{name}[/]")
    )
    if json:
        print_json(report.as_dict())
    else:
        print(report.summary())
    if not report.ok:
        raise typer.Exit(1)
