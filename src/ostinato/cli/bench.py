"""`ostinato bench`: how fast the engines are here, each against its own loop, and how fast mixers stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato.cli.console import err, out, print_json, print_table


def bench(
    time: Annotated[int, typer.Option(help="Sequence length.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads; what PyTorch chooses by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mixers: Annotated[str, typer.Option(help="Which mixers to stream from, by commas; none with ''.")] = (
        "gru,mamba,mamba2,gla,gated_delta_net,attention"
    ),
    out_file: Annotated[Path | None, typer.Option("--out", help="Also write the figures to a JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the engines, forward and backward, against the plain loop, and streaming per token and layer.

    Both sides of a ratio take turns in one process. Against other packages: benchmarks/cpu.py in the repository.

    [bold]Examples[/]

      ostinato bench

      ostinato bench --time 256 --batch 1 --mixers gru,gla

      ostinato bench --device cuda --out bench.json
    """
    import torch

    from ostinato.files import write_json
    from ostinato.report import provenance

    if threads is not None:
        torch.set_num_threads(threads)
    names = [name.strip() for name in mixers.split(",") if name.strip()]
    content: dict[str, Any] = {
        "machine": provenance(),
        "engines": _engines(batch, time, heads, dim, torch.device(device)),
        "streaming": [_streaming(name, heads * dim, torch.device(device)) for name in names],
    }
    if out_file is not None:
        write_json(out_file, content)
    if json:
        return print_json(content)
    print_table(list(content["engines"][0]), [list(row.values()) for row in content["engines"]], "Engines")
    if content["streaming"]:
        out.print()
        print_table(list(content["streaming"][0]), [list(row.values()) for row in content["streaming"]], "Streaming")
    out.print("\n" + ", ".join(f"{key} {value}" for key, value in content["machine"].items()))


def _engines(batch: int, time: int, heads: int, dim: int, device: Any) -> list[dict[str, Any]]:
    import torch
    import torch.nn.functional as F

    import ostinato
    from ostinato import ops
    from ostinato.timing import peak_bytes, time_together

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device=device).requires_grad_()

    def uniform(*shape: int) -> Any:
        return torch.rand(*shape, device=device).requires_grad_()

    q, v = draw(batch, time, heads, dim), draw(batch, time, heads, dim)
    k = F.normalize(draw(batch, time, heads, dim), dim=-1).detach().requires_grad_()
    beta, a = uniform(batch, time, heads), uniform(batch, time, heads, dim)
    g = (-0.1 * uniform(batch, time, heads)).detach().requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "diagonal_scan": lambda: ops.diagonal_scan(a, v),
        "linear_attention": lambda: ops.linear_attention(q, k, v, g),
        "delta_rule": lambda: ops.delta_rule(q, k, v, beta, g),
    }
    leaves = [q, k, v, beta, g, a]

    def both_ways(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            outputs, _ = call()
            torch.autograd.grad(outputs, leaves, torch.ones_like(outputs), allow_unused=True)

        return run

    def as_loop(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with ostinato.backend("reference"):
                step()

        return run

    rows = []
    for name, call in calls.items():
        err.print(f"[dim]{name}[/]")
        step = both_ways(call)
        where = device if device.type == "cuda" else None
        timing = time_together({"ours": step, "loop": as_loop(step)}, rounds=5, warm_up=1, budget=10.0, device=where)
        rows.append(
            {
                "engine": name,
                "milliseconds": round(timing["ours"].median * 1e3, 2),
                "loop, milliseconds": round(timing["loop"].median * 1e3, 2),
                "times faster": round(timing["ours"].ratio_to(timing["loop"]), 1),
                "peak megabytes": round(peak_bytes(step, where) / 1e6, 1),
            }
        )
    return rows


def _streaming(name: str, d_model: int, device: Any, tokens: int = 64) -> dict[str, Any]:
    import time

    import torch

    import ostinato
    import ostinato.state

    err.print(f"[dim]{name}[/]")
    mixer = ostinato.mixer(name, d_model).to(device).eval()
    row: dict[str, Any] = {"mixer": name}
    with torch.no_grad():
        for length in (10, 2000):
            _, state = mixer(torch.randn(1, length, d_model, device=device))
            x = torch.randn(1, d_model, device=device)
            taken = []
            for _ in range(tokens):
                start = time.perf_counter()
                y, state = mixer.step(x, state)
                y.sum().item()  # waits for an accelerator
                taken.append(time.perf_counter() - start)
            row[f"µs per token after {length}"] = round(sorted(taken)[tokens // 2] * 1e6, 1)
            row[f"state bytes after {length}"] = ostinato.state.num_bytes(state)
    return row
