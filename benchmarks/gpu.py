"""Speed on a GPU: every kernel against the best public one, and against what the card could do.

    python benchmarks/gpu.py                         # everything; flash-linear-attention alone tunes for minutes
    python benchmarks/gpu.py --only speed --calls delta,slstm
    python benchmarks/gpu.py --no-peers

Both sides of a ratio take turns in the same process, on the same inputs; a time is the median of 20 calls
between events on the device, after warm-up: once alone, as a first call that the device waits for, and once queued
behind other work, as in training, where the host has the time to run ahead. The floor is the larger of two times: the
fewest bytes (each input read once, each output and gradient written once) over the bandwidth of a large copy, and the
fewest operations over the rate of a large bf16 matrix product, both measured in this run. Peers that are not installed
are left out and named. The table goes to `results/benchmarks/gpu.json`.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_calls import CALLS, Side, allow_fla_on_hopper, matrix_arguments
from torch import Tensor

import ostinato
from ostinato import ops
from ostinato.files import write_json
from ostinato.timing import machine, peak_bytes

Row = dict[str, Any]


def median_milliseconds(
    calls: dict[str, Callable[[], Any]], rounds: int = 20, queued: bool = False
) -> dict[str, float]:
    """The median time of each on the device; they take turns.

    `queued`: the device is given something to do first, so that the host has put the whole call in its queue before
    the time begins, as it has in a training run; otherwise the device waits for the host's launches, too.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if queued:
                torch.cuda._sleep(10_000_000)  # clock cycles: about 5 ms
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
        ways = {"forward": lambda side: side.forward, "training": lambda side: side.training}
        alone, queued = (
            {
                way: median_milliseconds({key: pick(side) for key, side in sides.items()}, queued=whether)
                for way, pick in ways.items()
            }
            for whether in (False, True)
        )
        bandwidth, rate = ceiling["copy, bytes a second"], ceiling["bf16 product, operations a second"]
        floors = {
            "forward": 1e3 * max(call.forward_bytes / bandwidth, call.forward_operations / rate),
            "training": 1e3 * max(call.training_bytes / bandwidth, call.training_operations / rate),
        }
        row: Row = {
            "call": call.name,
            "shape": call.shape,
            "floor, ms": [round(floors[way], 3) for way in ways],
            "fraction of the floor": [round(floors[way] / queued[way]["ours"], 3) for way in ways],
            "sides": {
                key: {
                    "queued, ms": [round(queued[way][key], 3) for way in ways],
                    "alone, ms": [round(alone[way][key], 3) for way in ways],
                    "times ours, queued": [round(queued[way][key] / queued[way]["ours"], 2) for way in ways],
                    "times ours, alone": [round(alone[way][key] / alone[way]["ours"], 2) for way in ways],
                    "peak memory, MiB": round(peak_bytes(side.training, torch.device("cuda")) / 2**20),
                }
                for key, side in sides.items()
            },
        }
        rows.append(row)
        print(f"{call.name}, {call.shape}; floor {floors['forward']:.2f} / {floors['training']:.2f} ms", flush=True)
        for key, side in row["sides"].items():
            times = "  ".join(f"{name} {' / '.join(map(str, value))}" for name, value in side.items() if name[0] != "p")
            print(f"    {key:28} {times}  {side['peak memory, MiB']} MiB", flush=True)
        del call, sides
        torch.cuda.empty_cache()
        save(rows)
    return rows


def profile(names: list[str]) -> list[Row]:
    """Where the device's time of a training call goes: our kernels, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    rows = []
    for name in names:
        side = CALLS[name]().ours
        side.training()
        with recorded(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(5):
                side.training()
            torch.cuda.synchronize()
        kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        kernels = [event for event in kernels if event.self_device_time_total > 0][:12]
        print(
            f"{name}: "
            + ", ".join(f"{e.key[:48]} {e.count / 5:g}x {e.self_device_time_total / 5:.0f}" for e in kernels)
        )
        rows += [
            {
                "call": name,
                "kernel": e.key[:80],
                "launches": e.count / 5,
                "µs a call": round(e.self_device_time_total / 5),
            }
            for e in kernels
        ]
        torch.cuda.empty_cache()
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
            command = [sys.executable, __file__, "--first", name, "--since", str(time.monotonic())]
            done = subprocess.run(
                command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, timeout=120
            )
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        imported, first = (round(float(seconds), 1) for seconds in done.stdout.split())
        rows.append({"call": name, "seconds": first, "of these until torch and all else is imported": imported})
        print(
            f"first result of {name:20} {first:6.1f} s after its process started, imported {imported:.1f}", flush=True
        )
    return rows


LAYERS, WIDTH = 12, 768
PLAN = "gated_delta_net(heads=6, expand_k=1, expand_v=1)"


def language_model() -> Any:
    torch.manual_seed(0)
    return ostinato.LanguageModel(d_model=WIDTH, plan=PLAN, depth=LAYERS).cuda()


def fla_weights(mixer: Any) -> dict[str, Tensor]:
    """The weights of our gated_delta_net under the names of flash-linear-attention's layer."""
    ours = mixer.state_dict()
    names = {
        "project.to_queries.weight": "q_proj.weight",
        "project.to_keys.weight": "k_proj.weight",
        "project.to_values.weight": "v_proj.weight",
        "to_steps.weight": "a_proj.weight",
        "to_beta.weight": "b_proj.weight",
        "to_gate.weight": "g_proj.weight",
        "to_output.weight": "o_proj.weight",
        "norm.norm.weight": "o_norm.weight",
        "log_rate": "A_log",
        "step_bias": "dt_bias",
    }
    taps = ours["project.convolution.weight"]  # ours from the newest step on, theirs from the oldest
    convolutions = taps.flip(0).T.unsqueeze(1).chunk(3)
    theirs = {f"{name}_conv1d.weight": part for name, part in zip("qkv", convolutions, strict=True)}
    return theirs | {names[name]: value for name, value in ours.items() if name in names}


def with_fla_layers(model: Any) -> Any:
    """The same model with the same weights, its mixers replaced by flash-linear-attention's."""
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
        layer.load_state_dict(fla_weights(block.mixer))
        block.mixer = Theirs(layer).cuda()
    return model


def training(peers: bool, compiled: bool, steps: int = 16, batch: int = 8, window: int = 2048) -> list[Row]:
    """Tokens a second of `fit`, bf16, 12 layers of width 768, ours and the same model on the peer's layers.

    `captured`: with `capture=True`, so that the device does not wait for the host; both sides.
    """

    task = ostinato.task("text", corpus="stdlib", window=window, carry=False, max_bytes=4_000_000)
    makers = {"ours": language_model}
    if peers:
        makers["flash-linear-attention layers"] = lambda: with_fla_layers(language_model())
    ways = ["", ", captured", *((", compiled", ", compiled and captured") if compiled else ())]
    makers = {name + way: make for way in ways for name, make in makers.items()}
    rows = []
    for name, make in makers.items():
        try:
            model = make()
            ends: list[float] = []

            def note(report: Any, ends: list[float] = ends) -> None:
                torch.cuda.synchronize()
                ends.append(time.perf_counter())

            history = ostinato.fit(
                model, task, steps=steps, batch_size=batch, learning_rate=1e-3, mixed_precision="bf16",
                evaluate_every=0, evaluation_batches=1, progress=False, callbacks=[note],
                compile="compiled" in name, capture="captured" in name,
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
    """Microseconds for one token, batch 1, of the same model in bf16: plain, as a CUDA graph, of fewer kernels."""
    from ostinato.models.captured import CapturedStep

    rows = []
    model = language_model().to(torch.bfloat16).eval()
    state = model.read("Once upon a time")
    token = torch.tensor([5], device="cuda")
    bytes_read = sum(p.numel() * 2 for p in model.parameters()) + 2 * ostinato.state.num_bytes(state)
    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "plain": lambda: lambda: model.advance(token, state),
        "CUDA graph": lambda: (lambda step: lambda: step(token))(CapturedStep(model, state)),
        "CUDA graph, fused": lambda: (lambda step: lambda: step(token))(CapturedStep(model, state, fused=True)),
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
    imported = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        default="speed,profile,training,streaming,compiled,lengths,first",
        help="which parts, separated by commas",
    )
    parser.add_argument("--calls", default=",".join(CALLS), help="which calls, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="time only ours")
    parser.add_argument(
        "--fla",
        default=",".join(CALLS),
        help="calls for which flash-linear-attention is timed, too: it tunes for minutes",
    )
    parser.add_argument("--first", help="run one call once and stop: what the part `first` starts")
    parser.add_argument("--since", type=float, default=0.0, help="with --first: the clock's time at its start")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; benchmarks/cpu.py is for a CPU")
    torch.manual_seed(0)
    if options.first:
        CALLS[options.first]().ours.learn()
        torch.cuda.synchronize()
        print(imported - options.since, time.monotonic() - options.since)
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
    if "profile" in parts:
        save("kernels of a training call", profile(names))
    if "lengths" in parts:
        save("lengths", lengths())
    if "first" in parts:
        save("first result", first_results(names))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
