"""`ostinato tune`: try other configurations of the GPU kernels on this card, and keep what is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import err, out, print_table
from ostinato.errors import BackendError, UnknownNameError

ENGINES = ("linear_attention", "linear_attention_vector", "delta_rule", "diagonal_scan")


def tune(
    engines: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(ENGINES)}; all by default.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 8,
    time: Annotated[int, typer.Option(help="Sequence length.")] = 4096,
    heads: Annotated[int, typer.Option(help="Heads.")] = 16,
    dim: Annotated[int, typer.Option(help="Width of a head's keys and values.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    out_file: Annotated[Path | None, typer.Option("--out", help="Where to write; the user's cache by default.")] = None,
) -> None:
    """Time warps and pipeline stages of the kernels for one shape, and write the best to a file that they read.

    Never needed: without it kernels choose by the card's size alone. It takes a minute or two an engine. The file
    is $OSTINATO_TUNED, or ostinato/tuned.json in the cache folder; delete it to go back.

    [bold]Examples[/]

      ostinato tune

      ostinato tune delta_rule --heads 32 --dim 64 --out tuned.json
    """
    import torch

    from ostinato.ops.kernels.triton import tuned

    for name in engines or ():
        if name not in ENGINES:
            raise UnknownNameError("engine", name, ENGINES)
    if not torch.cuda.is_available():
        raise BackendError("ostinato tune times kernels on a CUDA device, and there is none here")
    rows = []
    for name in engines or ENGINES:
        err.print(f"[dim]{name}[/]")
        call = _call(name, batch, time, heads, dim, getattr(torch, dtype))
        choices = tuned.tune(call, say=lambda line: err.print(f"[dim]  {line}[/]"))
        path = tuned.save(choices, out_file)
        rows += [
            [
                choice.name,
                ", ".join(f"{k}={v}" for k, v in choice.fields.items()),
                f"{choice.before / choice.after:.2f}×",
            ]
            for choice in choices
        ]
    if rows:
        print_table(["kernel and key", "configuration", "faster"], rows, "Tuned")
        out.print(f"\nwritten to {path}")
    else:
        out.print("nothing is faster than what the kernels choose by themselves")


def _call(name: str, batch: int, time: int, heads: int, dim: int, dtype: Any) -> Any:
    """Forward and backward of an engine on random inputs, as a function of nothing."""
    import torch
    import torch.nn.functional as F

    from ostinato import ops

    def leaf(*shape: int, kind: Any = dtype) -> Any:
        return torch.randn(*shape, device="cuda").to(kind).requires_grad_()

    wide = torch.float32
    q, k, v = (leaf(batch, time, heads, dim) for _ in range(3))
    gate = F.logsigmoid(torch.randn(batch, time, heads, device="cuda") + 3).requires_grad_()
    function: Any
    arguments: tuple[Any, ...]
    if name == "diagonal_scan":
        shape = (batch, time, heads * dim)
        function, arguments = (
            ops.diagonal_scan,
            (torch.rand(shape, device="cuda").requires_grad_(), leaf(*shape, kind=wide)),
        )
    elif name == "delta_rule":
        k = F.normalize(k.detach().float(), dim=-1).to(dtype).requires_grad_()
        beta = torch.rand(batch, time, heads, device="cuda").requires_grad_()
        function, arguments = ops.delta_rule, (q, k, v, beta, gate)
    else:
        decay = gate
        if name.endswith("vector"):
            decay = F.logsigmoid(torch.randn(batch, time, heads, dim, device="cuda") + 3).requires_grad_()
        function, arguments = ops.linear_attention, (q, k, v, decay)

    def call() -> list[Any]:
        outputs = function(*arguments)[0]
        return [outputs.detach(), *torch.autograd.grad(outputs, arguments, torch.ones_like(outputs))]

    return call
