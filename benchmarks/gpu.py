"""Speed on a GPU: every kernel against the best public one, and against what the card could do.

    python benchmarks/gpu.py                         # everything; flash-linear-attention alone tunes for minutes
    python benchmarks/gpu.py --only speed --calls delta,slstm
    python benchmarks/gpu.py --no-peers

Both sides of a ratio take turns in the same process, on the same inputs; a time is the median of 20 calls
between events on the device, after warm-up. The floor is the larger of two times: the fewest bytes (each
input read once, each output and gradient written once) over the bandwidth of a large copy, and the fewest
operations over the rate of a large bf16 matrix product, both measured in this run. Peers that are
not installed are left out and named. The table goes to `results/benchmarks/gpu.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import ostinato  # noqa: E402
from ostinato import ops  # noqa: E402
from ostinato.files import write_json  # noqa: E402
from ostinato.ops import cells  # noqa: E402
from ostinato.timing import machine, peak_bytes  # noqa: E402

Function = Callable[..., Any]
Row = dict[str, Any]


@dataclass
class Side:
    """One way to compute a call: a function, and what it takes."""

    function: Function
    arguments: tuple[Any, ...]

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(*self.arguments)

    def training(self) -> None:
        wanted = [a for a in self.arguments if isinstance(a, Tensor) and a.requires_grad]
        out = self.function(*self.arguments)
        first = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(first, wanted, self.cotangent(first), allow_unused=True)

    def cotangent(self, like: Tensor) -> Tensor:
        if getattr(self, "_cotangent", None) is None:
            self._cotangent = torch.randn_like(like)
        return self._cotangent


@dataclass
class Call:
    """A call of ours, the same call of the peers, and the least that any of them must move and compute."""

    name: str
    shape: str
    ours: Side
    peers: dict[str, Callable[[], Side]] = field(default_factory=dict)
    forward_bytes: int = 0
    training_bytes: int = 0
    forward_operations: float = 0.0
    training_operations: float = 0.0


def median_milliseconds(calls: dict[str, Callable[[], Any]], rounds: int = 20) -> dict[str, float]:
    """The median time of each on the device; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def ceilings() -> dict[str, float]:
    """Bytes and operations a second that this card does."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = median_milliseconds({"copy": lambda: target.copy_(source), "product": lambda: matrix @ matrix})
    return {
        "copy, bytes a second": 2 * source.numel() * 4 / found["copy"] * 1e3,
        "bf16 product, operations a second": 2 * 8192**3 / found["product"] * 1e3,
    }


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def log_decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, device="cuda") + 3).requires_grad_()


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad) for t in tensors)


B, T, H, D = 8, 4096, 16, 128
SHAPE = f"B{B} T{T} H{H} D{D} bf16"


def matrix_arguments(time: int = T, batch: int = B, micro: int = 1) -> dict[str, Tensor]:
    rows = time * micro
    found = {
        "q": leaf(batch, time, H, D),
        "k": F.normalize(torch.randn(batch, rows, H, D, device="cuda"), dim=-1).to(torch.bfloat16).requires_grad_(),
        "v": leaf(batch, rows, H, D),
        "beta": torch.rand(batch, rows, H, device="cuda").requires_grad_(),
        "gate": leaf(batch, time, H, dtype=torch.float32),
        "scalar": log_decay(batch, time, H),
    }
    with torch.no_grad():
        found["q"].mul_(D**-0.5)
    return found


def matrix_floor(call: Call, reads: list[Tensor], out: Tensor, products: int) -> Call:
    """Bytes: inputs and output once; then inputs, output's gradient and every input's. Products: D×D a token."""
    call.forward_bytes = size(*reads, out)
    call.training_bytes = call.forward_bytes + 2 * size(*reads) + size(out)
    tokens = reads[0].shape[0] * reads[1].shape[1] * H
    call.forward_operations = tokens * products * 2.0 * D * D
    call.training_operations = 3 * call.forward_operations
    return call


def attention_side(a: dict[str, Tensor]) -> Side:
    q, k, v = heads_first(a["q"], a["k"], a["v"])
    return Side(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))


def allow_fla_on_hopper() -> None:
    """Its gated backward refuses some versions of Triton, where it was once wrong: here only its time counts."""
    import fla.ops.common.chunk_o as module

    module.TRITON_ABOVE_3_4_0 = False


def delta(micro: int = 1) -> Call:
    a = matrix_arguments(micro=micro)
    a["q"], arguments = a["q"], (a["q"], a["k"], a["v"], a["beta"], a["scalar"])

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
        return ops.delta_rule(q, k, v, beta, g, normalize=True)

    def fla() -> Side:
        from fla.ops.gated_delta_product import chunk_gated_delta_product
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        allow_fla_on_hopper()

        def function(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
            if micro == 1:
                return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0, use_qk_l2norm_in_kernel=True)
            return chunk_gated_delta_product(
                q, k, v, g, beta, num_householder=micro, scale=1.0, use_qk_l2norm_in_kernel=True
            )

        return Side(function, arguments)

    name = "delta_rule, scalar decay" + (f", {micro} Householders" if micro > 1 else "")
    call = Call(name, SHAPE, Side(ours, arguments), {"flash-linear-attention": fla})
    return matrix_floor(call, list(arguments), a["q"], 3)


def linear(kind: str) -> Call:
    a = matrix_arguments()
    decay = {"none": None, "scalar": a["scalar"], "vector": None if kind != "vector" else log_decay(B, T, H, D)}[kind]
    arguments = (a["q"], a["k"], a["v"], decay)

    def fla() -> Side:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla

        allow_fla_on_hopper()
        function = chunk_gla if kind == "vector" else chunk_simple_gla
        return Side(lambda q, k, v, g: function(q, k, v, g, scale=1.0), arguments)

    peers: dict[str, Callable[[], Side]] = {"flash-linear-attention": fla, "torch attention": lambda: attention_side(a)}
    call = Call(f"linear_attention, {kind} decay", SHAPE, Side(ops.linear_attention, arguments), peers)
    return matrix_floor(call, [t for t in arguments if t is not None], a["q"], 2)


def mlstm_exponential() -> Call:
    a = matrix_arguments()
    forget = (torch.randn(B, T, H, device="cuda") + 3).requires_grad_()
    arguments = (a["q"], a["k"], a["v"], a["gate"], forget)

    def ours(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        return ops.exponential_attention(q, k, v, i, F.logsigmoid(f))

    def kernels() -> Side:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk")
        theirs = heads_first(*arguments)
        return Side(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=128), theirs)

    peers: dict[str, Callable[[], Side]] = {"mlstm-kernels": kernels, "torch attention": lambda: attention_side(a)}
    call = Call("exponential_attention (mLSTM)", SHAPE, Side(ours, arguments), peers)
    return matrix_floor(call, list(arguments), a["q"], 2)


def mlstm_sigmoid() -> Call:
    a = matrix_arguments()
    forget = (torch.randn(B, T, H, device="cuda") + 3).requires_grad_()
    arguments = (a["q"], a["k"], a["v"], a["gate"], forget)

    def ours(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
        return ops.linear_attention(q, k * torch.sigmoid(i).unsqueeze(-1).to(k.dtype), v, F.logsigmoid(f))

    def kernels() -> Side:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel("chunkwise--triton_xl_chunk_siging")
        theirs = heads_first(*arguments)
        return Side(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=128, normalize=False), theirs)

    peers: dict[str, Callable[[], Side]] = {"mlstm-kernels": kernels, "torch attention": lambda: attention_side(a)}
    call = Call("linear_attention with a sigmoid input gate (mLSTM)", SHAPE, Side(ours, arguments), peers)
    return matrix_floor(call, list(arguments), a["q"], 2)


def diagonal() -> Call:
    batch, channels, length = 8, 4096, 8192
    a = torch.rand(batch, length, channels, device="cuda").requires_grad_()
    b = leaf(batch, length, channels, dtype=torch.float32)

    def scan() -> Side:
        from accelerated_scan.scalar import scan

        turned = tuple(t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (a, b))
        return Side(scan, turned)

    call = Call("diagonal_scan", "B8 C4096 T8192 float32", Side(ops.diagonal_scan, (a, b)), {"accelerated-scan": scan})
    call.forward_bytes, call.training_bytes = size(a, b, b), 8 * size(b)
    return call


def headwise(name: str) -> Call:
    batch, length, heads, dim = 16, 1024, 12, 64
    cell = {"lstm": cells.LSTM, "slstm": cells.SLSTM, "gru": cells.GRU, "elman": cells.Elman}[name]()
    gates = cell.gates
    weight = leaf(gates, heads, dim, dim, scale=dim**-0.5)
    x = leaf(batch, length, gates, heads, dim)
    weights = (weight,) if name != "gru" else (weight, leaf(heads, dim))

    def ours(x: Tensor, *weights: Tensor) -> Any:
        return ops.recurrent_scan(cell, weights, x)

    def flash() -> Side:
        from flashrnn import flashrnn

        bias = leaf(gates, heads, dim)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return flashrnn(x, weight, bias, function=name, backend="triton_fused", dtype="bfloat16")[0][0]

        return Side(function, (x, weight, bias))

    peers = {"flashrnn (triton_fused)": flash} if name == "slstm" else {}
    call = Call(f"recurrent_scan, {name}", "B16 T1024 12×64 bf16", Side(ours, (x, *weights)), peers)
    out = x.numel() // gates * 2
    call.forward_bytes, call.training_bytes = size(x) + out, 3 * size(x) + 2 * out
    call.forward_operations = 2.0 * x.numel() * dim
    call.training_operations = 3 * call.forward_operations
    return call


def m2rnn() -> Call:
    batch, length, heads, key_dim, value_dim = 8, 2048, 84, 64, 16
    cell = cells.M2RNN()
    k = leaf(batch, length, heads, key_dim, scale=key_dim**-0.5)
    v = leaf(batch, length, heads, value_dim)
    forget = torch.rand(batch, length, heads, device="cuda").to(torch.bfloat16).requires_grad_()
    weight = leaf(heads, value_dim, value_dim, scale=value_dim**-0.5)

    def ours(k: Tensor, v: Tensor, forget: Tensor, weight: Tensor) -> Any:
        return ops.recurrent_scan(cell, (weight,), (k, v, forget))

    call = Call("recurrent_scan, m2rnn", "B8 T2048 84 heads K64 V16 bf16", Side(ours, (k, v, forget, weight)))
    states = 2 * k.numel() * value_dim
    call.forward_bytes = size(k, v, forget) + states
    call.training_bytes = 3 * size(k, v, forget) + 2 * states
    call.forward_operations = batch * length * heads * (2.0 * key_dim * value_dim * (value_dim + 2))
    call.training_operations = 3 * call.forward_operations
    return call


def newton(name: str) -> Call:
    batch, length, width = 8, 4096, 512
    mixer = ostinato.mixer(name, width, iterations=3).cuda()
    x = leaf(batch, length, width, dtype=torch.float32)

    def peer() -> Side:
        import pararnn

        cell = pararnn.ParaGRU if name == "para_gru" else pararnn.ParaLSTM
        module = pararnn.ParaRNN(cell(width, width), config=pararnn.NewtonConfig(max_iters=3)).cuda()
        return Side(lambda x, *_: module(x), (x, *module.parameters()))

    ours = Side(lambda x, *_: mixer(x), (x, *mixer.parameters()))
    gates = 3 if name == "para_gru" else 4
    call = Call(
        f"newton_scan, {name} with its input product, 3 iterations",
        "B8 T4096 d512 float32",
        ours,
        {"pararnn-torch": peer},
    )
    call.forward_bytes = (2 + 2 * gates) * size(x)
    call.training_bytes = (4 + 6 * gates) * size(x)
    call.forward_operations = 2.0 * batch * length * width * gates * width * 12  # float32 in full precision
    call.training_operations = 3 * call.forward_operations
    return call


CALLS: dict[str, Callable[[], Call]] = {
    "delta": delta,
    "delta2": lambda: delta(2),
    "linear": lambda: linear("none"),
    "linear_scalar": lambda: linear("scalar"),
    "linear_vector": lambda: linear("vector"),
    "mlstm": mlstm_exponential,
    "mlstm_sigmoid": mlstm_sigmoid,
    "diagonal": diagonal,
    "slstm": lambda: headwise("slstm"),
    "lstm": lambda: headwise("lstm"),
    "gru": lambda: headwise("gru"),
    "elman": lambda: headwise("elman"),
    "m2rnn": m2rnn,
    "para_gru": lambda: newton("para_gru"),
    "para_lstm": lambda: newton("para_lstm"),
}


def speed(
    names: list[str], peers: bool, tuned: set[str], ceiling: dict[str, float], save: Callable[[list[Row]], None]
) -> list[Row]:
    """Forward, and forward with backward: ours, the peers, the floor, and the peak memory of training."""
    rows: list[Row] = []
    for name in names:
        try:
            call = CALLS[name]()
            call.ours.training()
        except Exception as error:
            print(f"FAILED: {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            rows.append({"call": name, "failed": f"{type(error).__name__}: {error}"})
            continue
        sides = {"ours": call.ours}
        for peer, make in call.peers.items() if peers else ():
            if peer == "flash-linear-attention" and name not in tuned:
                continue
            try:
                side = make()
                side.training()
                sides[peer] = side
            except Exception as error:  # a peer that fails is named, and the table goes on
                print(f"left out: {peer} for {call.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        forward = median_milliseconds({key: side.forward for key, side in sides.items()})
        training = median_milliseconds({key: side.training for key, side in sides.items()})
        bandwidth, rate = ceiling["copy, bytes a second"], ceiling["bf16 product, operations a second"]
        floors = (
            1e3 * max(call.forward_bytes / bandwidth, call.forward_operations / rate),
            1e3 * max(call.training_bytes / bandwidth, call.training_operations / rate),
        )
        memory = {key: peak_bytes(side.training, torch.device("cuda")) for key, side in sides.items()}
        row: Row = {
            "call": call.name,
            "shape": call.shape,
            "floor, ms": [round(floor, 3) for floor in floors],
            "fraction of the floor": [round(floors[0] / forward["ours"], 3), round(floors[1] / training["ours"], 3)],
            "sides": {
                key: {
                    "forward, ms": round(forward[key], 3),
                    "forward and backward, ms": round(training[key], 3),
                    "peak memory, MiB": round(memory[key] / 2**20),
                    "times slower than ours": [
                        round(forward[key] / forward["ours"], 2),
                        round(training[key] / training["ours"], 2),
                    ],
                }
                for key in sides
            },
        }
        rows.append(row)
        print(f"{call.name}, {call.shape}; floor {floors[0]:.2f} / {floors[1]:.2f} ms", flush=True)
        for key in sides:
            print(
                f"    {key:28} {forward[key]:8.3f} / {training[key]:8.3f} ms  "
                f"{forward[key] / forward['ours']:6.2f}x / {training[key] / training['ours']:6.2f}x  "
                f"{memory[key] / 2**20:8.0f} MiB",
                flush=True,
            )
        del call, sides
        torch.cuda.empty_cache()
        save(rows)
    return rows


def lengths() -> list[Row]:
    """Microseconds a token, forward and backward, of 65 536 tokens in sequences of 1k to 64k."""
    rows = []
    for length in (1024, 4096, 16384, 65536):
        batch = max(1, 65536 // length)
        a = matrix_arguments(length, batch)
        sides = {
            "delta_rule": Side(ops.delta_rule, (a["q"], a["k"], a["v"], a["beta"], a["scalar"])),
            "linear_attention": Side(ops.linear_attention, (a["q"], a["k"], a["v"], a["scalar"])),
            "exponential_attention": Side(ops.exponential_attention, (a["q"], a["k"], a["v"], a["gate"], a["scalar"])),
        }
        for key, side in sides.items():
            taken = median_milliseconds({key: side.training}, rounds=7)[key]
            rows.append({"call": key, "length": length, "batch": batch, "µs a token": taken * 1e3 / (batch * length)})
            print(
                f"{key:24} T{length:6} B{batch:3}: {taken:8.3f} ms, {rows[-1]['µs a token']:.4f} µs a token", flush=True
            )
    return rows


def first_results(names: list[str]) -> list[Row]:
    """Seconds from the start of a process, with no cache of compiled kernels, to the first gradient of each call."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            command = [sys.executable, __file__, "--first", name]
            done = subprocess.run(
                command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, timeout=120
            )
            seconds = time.perf_counter() - start
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        rows.append({"call": name, "seconds": round(seconds, 1)})
        print(f"first result of {name:20} {seconds:6.1f} s after the start of its process", flush=True)
    return rows


LAYERS, WIDTH = 12, 768
PLAN = "gated_delta_net(heads=6, expand_k=1, expand_v=1)"


def language_model() -> Any:
    torch.manual_seed(0)
    return ostinato.LanguageModel(d_model=WIDTH, plan=PLAN, depth=LAYERS).cuda()


def with_fla_layers(model: Any) -> Any:
    """The same model, its mixers replaced by flash-linear-attention's of the same sizes."""
    from fla.layers import GatedDeltaNet

    from ostinato.mixers.base import Mixer

    allow_fla_on_hopper()

    class Theirs(Mixer):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__(WIDTH)
            self.layer = layer

        def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
            return self.layer(x)[0], state

        def initial_state(self, batch_size: int) -> Tensor:
            return self.zeros(batch_size, 1)

    for index, block in enumerate(model.backbone.blocks):
        layer = GatedDeltaNet(hidden_size=WIDTH, expand_v=1, head_dim=WIDTH // 6, num_heads=6, layer_idx=index)
        block.mixer = Theirs(layer).cuda()
    return model


def training(peers: bool, compiled: bool, steps: int = 16, batch: int = 8, window: int = 2048) -> list[Row]:
    """Tokens a second of `fit`, bf16, 12 layers of width 768, ours and the same model on the peer's layers."""

    task = ostinato.task("text", corpus="stdlib", window=window, carry=False, max_bytes=4_000_000)
    makers = {"ours": language_model}
    if peers:
        makers["flash-linear-attention layers"] = lambda: with_fla_layers(language_model())
    if compiled:
        makers |= {f"{name}, compiled": make for name, make in makers.items()}
    rows = []
    for name, make in makers.items():
        try:
            model = make()
            if "compiled" in name:
                for block in model.backbone.blocks:
                    block.compile()
            ends: list[float] = []

            def note(report: Any, ends: list[float] = ends) -> None:
                torch.cuda.synchronize()
                ends.append(time.perf_counter())

            history = ostinato.fit(
                model, task, steps=steps, batch_size=batch, learning_rate=1e-3, mixed_precision="bf16",
                evaluate_every=0, evaluation_batches=1, progress=False, callbacks=[note],
            )  # fmt: skip
            taken = [after - before for before, after in pairwise(ends[4:])]
            rate = batch * window / statistics.median(taken)
            peak = torch.cuda.max_memory_allocated() / 2**30
            row = {
                "model": f"{LAYERS} layers of {PLAN}, d{WIDTH}, B{batch} T{window}, bf16, ours by `fit`",
                "side": name,
                "tokens a second": round(rate),
                "peak memory, GiB": round(peak, 2),
                "loss at the last step": round(history.losses[-1], 4),
            }
            rows.append(row)
            print(
                f"training, {name:42} {rate:12,.0f} tokens/s  {peak:6.2f} GiB  loss {history.losses[-1]:.3f}",
                flush=True,
            )
        except Exception as error:
            print(f"left out: training, {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return rows


def streaming(compiled: bool) -> list[Row]:
    """Microseconds for one token, batch 1, of the same model in bf16: plain, as a CUDA graph, compiled."""
    from ostinato.models.captured import CapturedStep

    rows = []
    model = language_model().to(torch.bfloat16).eval()
    state = model.read("Once upon a time")
    token = torch.tensor([5], device="cuda")
    bytes_read = sum(p.numel() * 2 for p in model.parameters()) + 2 * ostinato.state.num_bytes(state)
    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "plain": lambda: lambda: model.advance(token, state),
        "CUDA graph": lambda: (lambda step: lambda: step(token))(CapturedStep(model, state)),
        "CUDA graph, compiled": lambda: (lambda step: lambda: step(token))(CapturedStep(model, state, compile=True)),
    }
    for name, make in ways.items():
        if "compiled" in name and not compiled:
            continue
        try:
            call = make()
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                call()
            torch.cuda.synchronize()
            microseconds = (time.perf_counter() - begin) * 1e4
        except Exception as error:
            print(f"left out: streaming, {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows.append({"way": name, "µs a token": round(microseconds, 1), "bytes a token": bytes_read})
        print(f"streaming, {name:24} {microseconds:10.1f} µs a token", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="speed,training,streaming,compiled,lengths,first", help="which parts, separated by commas"
    )
    parser.add_argument("--calls", default=",".join(CALLS), help="which calls, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="time only ours")
    parser.add_argument(
        "--fla",
        default=",".join(CALLS),
        help="calls for which flash-linear-attention is timed, too: it tunes for minutes",
    )
    parser.add_argument("--first", help="run one call once and stop: what the part `first` starts")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; benchmarks/cpu.py is for a CPU")
    torch.manual_seed(0)
    if options.first:
        CALLS[options.first]().ours.training()
        torch.cuda.synchronize()
        return
    names, parts = options.calls.split(","), options.only.split(",")
    ceiling = ceilings()
    print({key: f"{value:.3e}" for key, value in ceiling.items()}, flush=True)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "ostinato": ostinato.__version__,
        "ceilings": ceiling,
    }

    def save(part: str, found: Any) -> None:
        report[part] = found
        write_json(options.out, report)

    peers = not options.no_peers
    if "speed" in parts:
        tuned = set(options.fla.split(","))
        save("speed", speed(names, peers, tuned, ceiling, lambda rows: save("speed", rows)))
    if "training" in parts:
        save("training", training(peers=peers, compiled="compiled" in parts))
    if "streaming" in parts:
        save("streaming", streaming(compiled="compiled" in parts))
    if "lengths" in parts:
        save("lengths", lengths())
    if "first" in parts:
        save("first result", first_results(names))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
