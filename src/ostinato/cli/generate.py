"""`ostinato generate`: stream text from a trained model, in constant memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ostinato.cli.console import INTERRUPTED, err


def generate(
    run: Annotated[Path, typer.Argument(help="A folder that `ostinato train` wrote, or a saved model.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with; - reads it from standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(help="How many tokens (bytes, by default) to write.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, 1 samples as the model says.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="A file with the state: go on from it if it is there, and leave it there.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Stream text: each piece is printed as it comes, and the state never grows unless a mixer's does.

    With --state, a second call goes on where the first one stopped; copy the file to fork the text.

    [bold]Examples[/]

      ostinato generate run --prompt "Once upon a time"

      ostinato generate run --prompt - --temperature 0.5 --top-p 0.9 < chapter.txt

      ostinato generate run --prompt "ACT I" --state act.safetensors --seed 1
    """
    import ostinato.state
    from ostinato.cli.runs import model_folder
    from ostinato.models.language import LanguageModel

    model = LanguageModel.from_pretrained(model_folder(run), device=device)
    before = None
    if state is not None and state.exists():
        before = ostinato.state.load(state, model.initial_state(1))
    text = sys.stdin.read() if prompt == "-" else prompt
    stream = model.stream(
        text,
        state=before,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    stopped = False
    try:
        if text and prompt != "-":
            sys.stdout.write(text)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    sys.stdout.write("\n")
    if state is not None:
        ostinato.state.save(stream.state, state)
        held = ostinato.state.num_bytes(stream.state)
        err.print(f"[dim]the state, {held:,} bytes, is in {state}[/]")
    if stopped:
        raise typer.Exit(INTERRUPTED)
