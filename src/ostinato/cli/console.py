"""What the commands share: where they print, tables, JSON, progress bars, and how an error looks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ostinato.report import number

USER_ERROR = 2
"""The exit code for what the user can put right: a bad argument, a missing or damaged file."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

# A table is laid out for the window; into a pipe or a file it may be as wide as it needs.
out = Console(width=None if sys.stdout.isatty() else 240, soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def debugging() -> bool:
    """Whether errors keep their traceback: `ostinato --debug …`, or OSTINATO_DEBUG in the environment."""
    return bool(os.environ.get("OSTINATO_DEBUG"))


def explain(error: BaseException) -> None:
    """Print an error: one line, red, on standard error. A plan's error keeps its caret line."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    err.print(f"[bold red]error:[/] {escape(text or type(error).__name__)}")


def print_json(content: Any) -> None:
    """JSON on standard output, as programs read it."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table; columns of numbers are set to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        cells = [row[index] for row in rows if row[index] not in (None, "", "–")]
        numeric = bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(number(cell)) for cell in row))
    out.print(table, soft_wrap=False)


def progress_bar() -> Progress:
    """A progress bar on standard error, so that standard output holds results alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )
