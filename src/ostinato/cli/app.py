"""The commands, gathered, and the one place where their errors are caught."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ostinato import __version__
from ostinato.cli import bench, compare, demo, generate, linearize, listing, reproduce, train, tune, verify
from ostinato.cli.console import INTERRUPTED, USER_ERROR, debugging, explain, out
from ostinato.errors import OstinatoError


class _Commands(TyperGroup):
    """A group whose commands' errors are one clear line, unless debugging."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; errors of ours and of files become a line and an exit code."""
        try:
            return super().invoke(ctx)
        except (OstinatoError, OSError) as error:
            if debugging() or isinstance(error, BrokenPipeError):
                raise
            explain(error)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            if debugging():
                raise
            raise typer.Exit(INTERRUPTED) from None

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they were added: the main job first."""
        return list(self.commands)


app = typer.Typer(
    name="ostinato",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Every recurrence behind one interface: trained in parallel, streamed in constant memory.",
    epilog="Start with [bold]ostinato demo[/], or train on your own text: [bold]ostinato train book.txt --out run[/]",
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ostinato {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Options that stand before the command."""
    if debug:
        os.environ["OSTINATO_DEBUG"] = "1"


_MAIN, _COMPARE, _KNOW, _CHECK = "The main job", "Comparing", "What there is", "This machine"

app.command("train", rich_help_panel=_MAIN)(train.train)
app.command("generate", rich_help_panel=_MAIN)(generate.generate)
app.command("linearize", rich_help_panel=_MAIN)(linearize.linearize)
app.command("demo", rich_help_panel=_MAIN)(demo.demo)
app.command("compare", rich_help_panel=_COMPARE)(compare.compare)
app.command("reproduce", rich_help_panel=_COMPARE)(reproduce.reproduce)
app.command("mixers", rich_help_panel=_KNOW)(listing.mixers)
app.command("tasks", rich_help_panel=_KNOW)(listing.tasks)
app.command("papers", rich_help_panel=_KNOW)(listing.papers)
app.command("verify", rich_help_panel=_CHECK)(verify.verify)
app.command("bench", rich_help_panel=_CHECK)(bench.bench)
app.command("tune", rich_help_panel=_CHECK)(tune.tune)
