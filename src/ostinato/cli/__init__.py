"""The command line: `ostinato COMMAND --help` explains each command, with examples.

One file per group of commands; PyTorch is imported inside the commands that compute, so that help and
listings answer at once. Errors that the user can act on are one line and exit code 2.
"""

from __future__ import annotations


def main() -> None:
    """The entry point of `ostinato`."""
    from ostinato.cli.app import app

    app()
