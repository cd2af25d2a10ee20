"""`ostinato train`: train a recurrent language model on text files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import INTERRUPTED, err, out, print_table
from ostinato.errors import CheckpointError, ConfigurationError

PLAN = "gated_delta_net*3, attention(window=64)"


@dataclass
class Settings:
    """What a run is made of; a resumed run reads them from its folder."""

    files: list[str]
    model: dict[str, Any]
    window: int
    batch: int
    steps: int
    learning_rate: float
    seed: int
    binary: bool
    mixed_precision: str
    compile: bool
    capture: bool


def train(
    files: Annotated[list[Path] | None, typer.Argument(help="Text files (UTF-8), read in order.")] = None,
    plan: Annotated[str, typer.Option(help="Which mixers; `ostinato mixers` lists them.")] = PLAN,
    d_model: Annotated[int, typer.Option(help="Width.")] = 256,
    depth: Annotated[int | None, typer.Option(help="Layers; the plan is repeated and cut to it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates in all; 1000, or those of the resumed run.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences in one update.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens of each sequence in one update.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    out_folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/text"),
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, along its curve.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps; a tenth of the run by default.")] = None,
    tokenizer: Annotated[str, typer.Option(help="bytes, or the name or path of a Hugging Face tokenizer.")] = "bytes",
    binary: Annotated[bool, typer.Option("--binary", help="Take the files as raw bytes, whatever they hold.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks first: slower to start.")] = False,
    capture: Annotated[bool, typer.Option("--capture", help="On a GPU, launch a step as one CUDA graph.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu to stay there; the best there is by default.")] = None,
) -> None:
    """Train a language model on text, with bits per byte on the held-out tenth.

    A checkpoint is written every so often, and on Ctrl-C; --resume goes on along the same curve.

    [bold]Examples[/]

      ostinato train book.txt --out run

      ostinato train *.txt --plan "mamba2*3, attention(window=128)" --d-model 128 --steps 4000 --out run

      ostinato train --resume run

      ostinato train --resume run --steps 8000
    """
    if resume is not None:
        asked = _resumed(resume, files, steps, compile, capture)
    else:
        if not files:
            raise ConfigurationError("name at least one text file, or a run to go on with: --resume RUN")
        model = {"d_model": d_model, "plan": plan, "depth": depth, "tokenizer": tokenizer}
        asked = Settings(
            [str(file) for file in files],
            model,
            window,
            batch,
            steps or 1000,
            learning_rate,
            seed,
            binary,
            mixed_precision,
            compile,
            capture,
        )
    _run(asked, resume or out_folder, resume is not None, checkpoint_every, device)


def _resumed(folder: Path, files: list[Path] | None, steps: int | None, compile: bool, capture: bool) -> Settings:
    """The settings that a run was started with."""
    from ostinato.files import check_version, read_json

    path = folder / "run.json"
    if not path.is_file():
        raise CheckpointError(f"there is no run in {folder} to resume: it has no run.json")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "run" or not isinstance(found.get("model"), dict):
        raise CheckpointError(f"{path} is not the record of a run of a language model")
    check_version(path, found.get("format"), found.get("version"))
    options, training = found["task"]["options"], found["training"]
    return Settings(
        [str(file) for file in files] if files else options["files"],
        found["model"],
        options["window"],
        training["batch_size"],
        steps or training["steps"],
        training["learning_rate"],
        training["seed"],
        options["binary"],
        training["mixed_precision"],
        compile or bool(training.get("compile", False)),
        capture or bool(training.get("capture", False)),
    )


def _run(asked: Settings, folder: Path, resume: bool, checkpoint_every: int | None, device: str | None) -> None:
    import torch

    from ostinato.models.language import LanguageModel
    from ostinato.tasks.text import Text
    from ostinato.training.checkpoints import last_checkpoint
    from ostinato.training.evaluate import evaluate
    from ostinato.training.fit import fit

    if not resume and last_checkpoint(folder) is not None:
        raise ConfigurationError(f"{folder} holds a run already: go on with --resume {folder}, or name another --out")
    torch.manual_seed(asked.seed)
    model = LanguageModel(**asked.model)
    own = None if model.tokenizer.name == "bytes" else model.tokenizer
    task = Text(files=tuple(asked.files), window=asked.window, binary=asked.binary, tokenizer=own)
    err.print(
        f"{len(task.train_bytes):,} bytes to train on, {len(task.test_bytes):,} held out; {model.backbone.plan}, "
        f"{model.backbone.depth} layers of width {model.backbone.d_model}, {model.num_parameters():,} parameters"
    )
    history = fit(
        model,
        task,
        steps=asked.steps,
        batch_size=asked.batch,
        learning_rate=asked.learning_rate,
        seed=asked.seed,
        directory=folder,
        resume=resume,
        evaluation_batches=16,
        checkpoint_every=checkpoint_every,
        mixed_precision=asked.mixed_precision,
        compile=asked.compile,
        capture=asked.capture,
        device=device,
    )
    if history.interrupted:
        err.print(f"stopped and saved; go on with: [bold]ostinato train --resume {folder}[/]")
        raise typer.Exit(INTERRUPTED)
    err.print("[dim]reading the whole held-out text, and measuring the baselines[/]")
    ours = evaluate(model, task)["bits_per_byte"]
    history.baselines = task.baselines()
    rows = [["this model", ours], *history.baselines.items()]
    print_table(["on the held-out text", "bits per byte"], sorted(rows, key=lambda row: float(row[1])))
    page = _page(asked, history, rows)
    page.save(folder / "index.html")
    out.print(f"\nthe curves: {folder / 'index.html'}\nnow: ostinato generate {folder} --prompt …")


def curves(history: Any) -> list[Any]:
    """The figures of a run on text: held-out bits per byte beside the baselines, and the training loss."""
    from ostinato.report import Figure, Series
    from ostinato.training.history import smooth

    scores = [each.metrics["bits_per_byte"] for each in history.evaluations]
    held_out = Series("this model", [each.step for each in history.evaluations], scores)
    # A curve of thousands of steps is thinned to some hundreds of points.
    every = max(1, len(history.steps) // 400)
    loss = Series("training loss", history.steps[::every], smooth(history.losses)[::every])
    return [
        Figure("Bits per byte of held-out text", [held_out], "step", "bits per byte", levels=history.baselines),
        Figure("Training loss", [loss], "step", "nats per token"),
    ]


def _page(asked: Settings, history: Any, rows: list[Any]) -> Any:
    from ostinato.report import Page, provenance

    page = Page("A language model", ", ".join(asked.files))
    page.table(["on the held-out text", "bits per byte"], sorted(rows, key=lambda row: float(row[1])))
    for figure in curves(history):
        page.figure(figure)
    page.heading("How it was had")
    facts = {**asked.model, "steps": asked.steps, "batch": asked.batch, "window": asked.window}
    facts |= {"learning rate": asked.learning_rate, "seed": asked.seed, "tokens seen": history.tokens}
    if history.seconds:
        facts["seconds"] = round(history.seconds[-1], 1)
    page.table(["what", "value"], [[key, str(value)] for key, value in {**facts, **provenance()}.items()])
    return page
