"""`ostinato mixers`, `ostinato tasks`, `ostinato papers`: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from ostinato.cli.console import out, print_json, print_table

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def mixers(
    name: Annotated[str | None, typer.Argument(help="Show one mixer: its traits and its options.")] = None,
    json: Json = False,
) -> None:
    """List the sequence mixers: what a plan may be made of.

    [bold]Examples[/]

      ostinato mixers

      ostinato mixers gated_delta_net

      ostinato mixers --json
    """
    from ostinato.mixers import registry

    if name is not None:
        return _one_mixer(name, json)
    names = registry.mixers()
    if json:
        return print_json(names)
    rows = []
    for each in names:
        traits = registry.mixer_class(each).traits
        rows.append([each, traits.engine, traits.transition, traits.input_gate, traits.state, traits.paper])
    print_table(["mixer", "engine", "transition", "input gate", "state per layer", "source"], rows)
    out.print("\nOptions of one: [bold]ostinato mixers NAME[/]; a plan uses them: [bold]gla(heads=2)*3, attention[/]")


def _one_mixer(name: str, json: bool) -> None:
    import inspect

    from ostinato.mixers import registry

    cls = registry.mixer_class(name)
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.name != "d_model"]
    if json:
        defaults = {p.name: p.default if isinstance(p.default, (int, float, str)) else None for p in parameters}
        return print_json({"name": name, **cls.traits.as_dict(), "options": defaults})
    out.print(f"[bold]{name}[/]: {inspect.getdoc(cls) or ''}\n", markup=True)
    print_table(
        ["trait", "value"], [[key.replace("_", " "), str(value)] for key, value in cls.traits.as_dict().items()]
    )
    out.print()
    print_table(["option", "default"], [[p.name, repr(p.default)] for p in parameters])


def tasks(json: Json = False) -> None:
    """List the tasks that mixers can be compared on.

    [bold]Examples[/]

      ostinato tasks

      ostinato compare --task parity --mixers lstm,gla
    """
    import dataclasses
    import inspect

    from ostinato.tasks import registry

    names = registry.tasks()
    if json:
        return print_json(names)
    rows = []
    for name in names:
        cls = registry.task_class(name)
        first = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        options = ", ".join(field.name for field in dataclasses.fields(cls) if field.init)
        rows.append([name, cls.metric.replace("_", " "), first, options])
    print_table(["task", "metric", "what is asked", "options"], rows)


def papers(
    json: Json = False,
    state: Annotated[str | None, typer.Option(help="Only those planned, built, reproduced, or 'did not hold'.")] = None,
    room: Annotated[str | None, typer.Option(help="Only those that live in this room, e.g. mixers.")] = None,
) -> None:
    """List the 82 systems of the catalogue and the state of each.

    [bold]Examples[/]

      ostinato papers

      ostinato papers --room quantum

      ostinato papers --json
    """
    from ostinato.errors import ConfigurationError
    from ostinato.papers import catalogue

    if state is not None and state not in catalogue.STATES:
        raise ConfigurationError(f"there is no state {state!r}; choose one of {', '.join(catalogue.STATES)}")
    records = [which.as_dict() for which in catalogue.systems()]
    known = sorted({each for record in records for each in record["rooms"]})
    if room is not None and room not in known:
        raise ConfigurationError(f"there is no room {room!r}; choose one of {', '.join(known)}")
    records = [r for r in records if (state or r["state"]) == r["state"] and (room is None or room in r["rooms"])]
    if json:
        return print_json(records)
    rows = [
        [f"{r['number']:02d}", r["system"], str(r["year"]), " ".join(r["rooms"]), r["state"], " ".join(r["mixers"])]
        for r in records
    ]
    print_table(["no", "system", "year", "rooms", "state", "mixers that are there"], rows)
    counts = {each: sum(r["state"] == each for r in records) for each in catalogue.STATES}
    out.print(f"\n{len(records)} systems: " + ", ".join(f"{n} {each}" for each, n in counts.items()))
