"""Speed on a CPU: every engine against its own loop, the best peers, and attention.

    python benchmarks/cpu.py                       # everything, a few minutes on two cores
    python benchmarks/cpu.py --only loop,streaming

All figures are ratios of medians; both sides of a ratio take turns in the same process. Peers that are not
installed (`pip install ostinato[peers]`) are left out and named. The table goes to
`results/benchmarks/cpu.json`.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ostinato
from ostinato import ops
from ostinato.files import write_json
from ostinato.timing import Timing, machine, peak_bytes, time_together

Row = dict[str, Any]


def training_step(
    function: Callable[..., Any], *arguments: Any, weights: tuple[Tensor, ...] = ()
) -> Callable[[], None]:
    """Forward and backward of `function`, with gradients for all arguments that ask for them."""
    wanted = [a for a in (*arguments, *weights) if isinstance(a, Tensor) and a.requires_grad]

    def call() -> None:
        out = function(*arguments)
        first = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(first, wanted, torch.ones_like(first), allow_unused=True)

    return call


def compare(
    name: str, ours: Callable[[], None], others: dict[str, Callable[[], None]], rounds: int = 9, memory: bool = True
) -> list[Row]:
    """One row for each of `others`: how many times longer it takes than ours, and its memory over ours."""
    timings: dict[str, Timing] = time_together({"ours": ours, **others}, rounds=rounds, warm_up=1, budget=30.0)
    held = peak_bytes(ours) if memory else 0
    rows = []
    for other, call in others.items():
        row: Row = {
            "call": name,
            "against": other,
            "times faster": round(timings["ours"].ratio_to(timings[other]), 2),
            "ours, milliseconds on this machine": round(timings["ours"].median * 1e3, 2),
            "quartiles of ours": [round(timings["ours"].low * 1e3, 2), round(timings["ours"].high * 1e3, 2)],
            "quartiles of theirs": [round(timings[other].low * 1e3, 2), round(timings[other].high * 1e3, 2)],
        }
        if memory:
            row["memory, times less"] = round(peak_bytes(call) / held, 2)
            row["our peak memory, MiB"] = round(held / 2**20, 1)
        rows.append(row)
        less = f"{row['memory, times less']:6.2f}x less memory" if memory else ""
        print(f"{name:58} {other:36} {row['times faster']:8.2f}x faster {less}", flush=True)
    return rows


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()


def log_decay(*shape: int) -> Tensor:
    return (-torch.rand(*shape) * 0.1).requires_grad_()


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for t in tensors)


def matrix_arguments(batch: int, time: int, heads: int, dim: int) -> dict[str, Tensor]:
    keys = F.normalize(torch.randn(batch, time, heads, dim), dim=-1).requires_grad_()
    return {
        "q": leaf(batch, time, heads, dim),
        "k": keys,
        "v": leaf(batch, time, heads, dim),
        "beta": torch.rand(batch, time, heads).requires_grad_(),
        "scalar": log_decay(batch, time, heads),
        "vector": log_decay(batch, time, heads, dim),
        "gate": leaf(batch, time, heads),
    }


def against_loop() -> list[Row]:
    """The parallel route against the reference loop, forward and backward: B4 T1024 H4 D64, float32."""
    rows = []
    a = matrix_arguments(4, 1024, 4, 64)
    transition = torch.rand(4, 1024, 4, 64).requires_grad_()
    calls = {
        "diagonal_scan": (ops.diagonal_scan, (transition, a["v"])),
        "linear_attention, no decay": (ops.linear_attention, (a["q"], a["k"], a["v"])),
        "linear_attention, scalar decay": (ops.linear_attention, (a["q"], a["k"], a["v"], a["scalar"])),
        "linear_attention, vector decay": (ops.linear_attention, (a["q"], a["k"], a["v"], a["vector"])),
        "exponential_attention": (
            ops.exponential_attention,
            (a["q"], a["k"], a["v"], a["gate"], F.logsigmoid(a["gate"]).detach().requires_grad_()),
        ),
        "delta_rule, no decay": (ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"])),
        "delta_rule, scalar decay": (ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"], a["scalar"])),
        "delta_rule, vector decay": (ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"], a["vector"])),
    }
    for name, (function, arguments) in calls.items():
        step = training_step(function, *arguments)

        def loop(step: Callable[[], None] = step) -> None:
            with ostinato.backend("reference"):
                step()

        rows += compare(f"{name}, B4 T1024 H4 D64", step, {"the loop": loop}, rounds=5, memory=False)

    from ostinato.ops.cells import ParaGRU

    cell = ParaGRU()
    width = 64
    weights = ((torch.randn(3, width) / width**0.5).requires_grad_(),)
    inputs = leaf(4, 4096, 3, width)

    def newton() -> tuple[Tensor, ...]:
        return ops.newton_scan(cell, weights, inputs, iterations=3)

    step = training_step(newton, weights=(*weights, inputs))

    def loop() -> None:
        with ostinato.backend("reference"):
            step()

    rows += compare(
        "newton_scan, ParaGRU, 3 iterations, B4 T4096 d64", step, {"the loop": loop}, rounds=5, memory=False
    )
    return rows


def against_attention() -> list[Row]:
    """Against torch's causal attention on the same shapes: B4 H4 D64, float32."""
    rows = []
    for length in (512, 1024, 2048, 4096):
        a = matrix_arguments(4, length, 4, 64)
        q, k, v = heads_first(a["q"], a["k"], a["v"])
        attention = training_step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
        calls = {
            "linear_attention, no decay": (ops.linear_attention, (a["q"], a["k"], a["v"])),
            "linear_attention, scalar decay": (ops.linear_attention, (a["q"], a["k"], a["v"], a["scalar"])),
            "linear_attention, vector decay": (ops.linear_attention, (a["q"], a["k"], a["v"], a["vector"])),
            "delta_rule, no decay": (ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"])),
            "delta_rule, scalar decay": (ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"], a["scalar"])),
        }
        for name, (function, arguments) in calls.items():
            rows += compare(
                f"{name}, B4 T{length} H4 D64",
                training_step(function, *arguments),
                {"torch causal attention": attention},
            )
    return rows


def against_peers() -> list[Row]:
    """Against the plain-PyTorch paths of Transformers, mlstm-kernels and pararnn."""
    rows: list[Row] = []
    batch, length, heads, dim = 2, 512, 4, 64
    a = matrix_arguments(batch, length, heads, dim)

    def skipped(peer: str, error: BaseException) -> None:
        print(f"left out: {peer} ({type(error).__name__}: {error})")

    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        # With flash-linear-attention installed Transformers hands this function to its GPU kernels.
        chunked = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)
        theirs = training_step(chunked, a["q"], a["k"], a["v"], a["scalar"], a["beta"])
        ours = training_step(ops.delta_rule, a["q"], a["k"], a["v"], a["beta"], a["scalar"])
        rows += compare("delta_rule, scalar decay, B2 T512 H4 D64", ours, {"transformers (gated delta rule)": theirs})
    except ImportError as error:
        skipped("transformers", error)
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=256,
            expand=1,
            num_heads=4,
            head_dim=64,
            state_size=64,
            n_groups=1,
            chunk_size=64,
            num_hidden_layers=1,
        )
        peer = Mamba2Mixer(config, layer_idx=0)
        mixer = ostinato.mixer("mamba2", 256, expand=1, heads=4, state_dim=64)
        x = leaf(batch, length, 256)
        theirs = training_step(peer, x, weights=tuple(peer.parameters()))
        ours = training_step(mixer, x, weights=tuple(mixer.parameters()))
        rows += compare("mamba2 mixer, B2 T512 d256", ours, {"transformers (Mamba-2)": theirs})
    except ImportError as error:
        skipped("transformers", error)
    try:
        from mlstm_kernels.torch.chunkwise.native import (
            mlstm_chunkwise__native_autograd,
            mlstm_chunkwise__native_custbw,
        )

        q, k, v, gate = heads_first(a["q"], a["k"], a["v"], a["gate"])
        forget = leaf(batch, heads, length)
        log_forget = F.logsigmoid(forget).detach().transpose(1, 2).contiguous().requires_grad_()
        ours = training_step(ops.exponential_attention, a["q"], a["k"], a["v"], a["gate"], log_forget)
        others = {
            "mlstm-kernels (native, autograd)": training_step(mlstm_chunkwise__native_autograd, q, k, v, gate, forget),
            "mlstm-kernels (native, own backward)": training_step(
                mlstm_chunkwise__native_custbw, q, k, v, gate, forget
            ),
        }
        rows += compare("exponential_attention, B2 T512 H4 D64", ours, others)
    except ImportError as error:
        skipped("mlstm-kernels", error)
    try:
        from pararnn import NewtonConfig, ParaGRU, ParaRNN

        for length, width in ((512, 256), (4096, 64)):
            x = leaf(batch, length, width)
            peer = ParaRNN(ParaGRU(width, width), config=NewtonConfig(max_iters=3, scan_backend="eager"))
            mixer = ostinato.mixer("para_gru", width, iterations=3)
            theirs = training_step(peer, x, weights=tuple(peer.parameters()))
            ours = training_step(mixer, x, weights=tuple(mixer.parameters()))
            rows += compare(f"para_gru mixer, 3 iterations, B2 T{length} d{width}", ours, {"pararnn (eager)": theirs})
    except ImportError as error:
        skipped("pararnn", error)
    x = leaf(batch, length, 256)
    lstm, mixer = nn.LSTM(256, 256, batch_first=True), ostinato.mixer("lstm", 256)
    theirs = training_step(lstm, x, weights=tuple(lstm.parameters()))
    ours = training_step(mixer, x, weights=tuple(mixer.parameters()))
    rows += compare("lstm mixer (the loop), B2 T512 d256", ours, {"torch.nn.LSTM": theirs}, rounds=5)
    return rows


def streaming(tokens: int = 100_000) -> list[Row]:
    """Microseconds per token and layer of `step` at d=256, batch 1, near token 10 and near the last."""
    rows = []
    for name in ("min_gru", "lstm", "mamba2", "gla", "gated_delta_net", "mlstm"):
        mixer = ostinato.mixer(name, 256).eval()
        with torch.inference_mode():
            _, state = stream(mixer, mixer.initial_state(1), 10)
            early, state = stream(mixer, state, 1000)
            held = ostinato.state.num_bytes(state)
            _, state = stream(mixer, state, tokens - 2010)
            late, state = stream(mixer, state, 1000)
        row = {
            "call": f"step, {name}, d256",
            "microseconds early": round(early * 1e6, 1),
            "microseconds late": round(late * 1e6, 1),
            "late over early": round(late / early, 3),
            "state bytes early": held,
            "state bytes late": ostinato.state.num_bytes(state),
        }
        rows.append(row)
        print(f"{row['call']:30} {early * 1e6:8.1f} µs, at token {tokens} {late * 1e6:8.1f} µs; state {held} bytes")
    return rows


def stream(mixer: ostinato.Mixer, state: Any, count: int) -> tuple[float, Any]:
    """The median seconds of `count` steps, and the state after them."""
    x, taken = torch.randn(1, mixer.d_model), []
    for _ in range(count):
        start = time.perf_counter()
        _, state = mixer.step(x, state)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2], state


PARTS = {"loop": against_loop, "attention": against_attention, "peers": against_peers, "streaming": streaming}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/cpu.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    found = {part: PARTS[part]() for part in options.only.split(",")}
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "ostinato": ostinato.__version__,
        "figures": found,
    }
    write_json(options.out, report)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
