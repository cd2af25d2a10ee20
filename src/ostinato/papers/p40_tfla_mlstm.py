"""Tiled Flash Linear Attention (Beck et al. 2025, arXiv 2503.14376): the mLSTM with two gates, in chunks of tiles.

All forms of both cells against each other; what a chunk costs; what the gates let through; the two gates on text; and,
on a GPU, time and memory by the length of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato
from ostinato.analysis.gated_chunks import fastest_chunk, fewest_operations, gate_transfer_map, stored_states
from ostinato.errors import DivergenceError
from ostinato.models.token_classifier import TokenClassifier
from ostinato.ops.exponential_attention import exponential_attention
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.tiled_attention import tiled_attention
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.text import Text
from ostinato.timing import Timing, peak_bytes, time_together
from ostinato.training.ensemble import fit_seeds
from ostinato.training.evaluate import evaluate

claims = (
    Claim("exact", "loop, whole matrix, chunks and tiles give the same outputs and gradients", theirs="an identity"),
    Claim("fewest", "the chunk with the fewest operations, keys 256, values 512", theirs="13.03"),
    Claim("device", "on a GPU the best chunk is far longer, and grows as √(d · intensity)", theirs="figure, notes"),
    Claim("transfer", "after the norm, with a small epsilon, both cells let the same through", theirs="figure"),
    Claim("closed", "with epsilon 1e-6 closed input gates make the sigmoid cell's output vanish", theirs="figure"),
    Claim("gates", "sigmoid and exponential input gates reach the same loss", theirs="no visible difference"),
    Claim("chunks", "the fastest chunk is much longer than the one with the fewest operations", theirs="128 to 256"),
    Claim("states", "longer chunks store fewer states: less memory at first", theirs="13.2 GB at 64, 5.7 at 512"),
    Claim("faster", "the sigmoid cell is faster than the exponential one", theirs="19 against 21 ms; forward 30 %"),
    Claim("length", "time is linear in the length, that of softmax attention grows faster", theirs="table"),
    Claim(
        "tokens",
        "65,536 tokens take the same time in sequences of any length; attention's grows",
        theirs="18.7 to 19.6 ms, exponential 20.7 to 21.2, FlashAttention-3 12.7 to 227, at 512 to 65,536",
    ),
    Claim("bias", "an input gate's bias of about −10 is needed for stable training", theirs="notes"),
    Claim("large", "language models of 160M to 1.4B; time against FlashAttention-3 and Mamba-2", theirs="tables"),
)

_GPU = "timed on a GPU"
_INTENSITY = 989e12 / 3.35e12
"""Operations in bfloat16 while an H100 moves a byte."""
_PLANS = {"exponential": "mlstm(layers=4)", "sigmoid": "mlstm(layers=4, input_gate=sigmoid)"}


def experiment(run: Run) -> list[Measured]:
    """The exact statements, the maps, text; on a GPU, times and memory."""
    larger = Measured("large", "not measured", None, "larger than the budgets; our own kernels stand in the benchmarks")
    return [*_forms(run), *_costs(), *_maps(run), *_text(run), *_speeds(run), larger]


def _forms(run: Run) -> list[Measured]:
    time, dim = run.choose(smoke=(40, 8), cpu=(384, 32), gpu=(384, 32))
    errors: dict[str, float] = run.part("forms", _errors, time, dim, run.seed)
    run.sizes["forms"] = f"batch 2, heads 2, time {time}, keys and values of {dim}, float64"
    ours = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    note = "against the loop: largest error over largest magnitude of outputs, memory, all gradients; asked: 1e-9"
    return [Measured("exact", ours, max(errors.values()) <= 1e-9, note)]


def _draw(time: int, dim: int, seed: int) -> list[Tensor]:
    """Scaled queries, keys, values and the two gates' pre-activations."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, time, 2, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    i, f = (torch.randn(2, time, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return [q * dim**-0.5, k, v, 2 * i, 3 + f]


def _exponential(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    outputs, state = exponential_attention(q, k, v, i, F.logsigmoid(f), **options)
    return outputs, state.memory * state.maximum.exp()[..., None, None]


def _sigmoid(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_attention(q, k * torch.sigmoid(i).unsqueeze(-1), v, F.logsigmoid(f), **options)


def _whole(normalized: bool, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix, log D_ts = f_{s+1} + … + f_t + i_s, and no chunks."""
    forget, gate = F.logsigmoid(f).transpose(1, 2), (i if normalized else F.logsigmoid(i)).transpose(1, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    time = q.shape[-2]
    # Column s sums the rows below it: a sum for each entry, not a difference of two long ones.
    table = forget.unsqueeze(-1).expand(*forget.shape, time).tril(-1).cumsum(-2) + gate.unsqueeze(-2)
    above = torch.ones(time, time, dtype=torch.bool, device=q.device).triu(1)
    table = table.masked_fill(above, -torch.inf)
    # The state that is there at first, zero, has a maximum too: 0, carried by all forget gates.
    maximum = torch.maximum(table.amax(-1), forget.cumsum(-1)) if normalized else torch.zeros_like(gate)
    scores = (q @ k.mT) * (table - maximum.unsqueeze(-1)).exp()
    outputs = scores @ v
    if normalized:
        bound = torch.maximum(scores.sum(-1).abs(), (-maximum).exp()) + 1e-6
        outputs = outputs / bound.unsqueeze(-1)
    return outputs.transpose(1, 2), (k * table[..., -1, :].exp().unsqueeze(-1)).mT @ v


def _tiles(normalized: bool, tile: int, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    gate = i if normalized else F.logsigmoid(i)
    outputs, state = tiled_attention(
        q, k, v, gate, F.logsigmoid(f), normalized=normalized, chunk_size=128, query_tile=tile, key_tile=tile
    )
    return outputs, state.memory * state.maximum.exp()[..., None, None]


def _errors(time: int, dim: int, seed: int) -> dict[str, float]:
    """Relative errors of every form of both cells against the loop."""
    drawn = _draw(time, dim, seed)

    def found(call: Any, *first: Any, **options: Any) -> list[Tensor]:
        arguments = [argument.clone().requires_grad_() for argument in drawn]
        outputs, memory = call(*first, *arguments, **options)
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
        gradients = torch.autograd.grad((outputs * weights).sum() + memory.sum(), arguments)
        return [outputs.detach(), memory.detach(), *gradients]

    errors: dict[str, float] = {}
    for name, cell, normalized in (("exp", _exponential, True), ("sig", _sigmoid, False)):
        with ostinato.backend("reference"):
            wanted = found(cell)
        others = {"whole matrix": found(_whole, normalized)}
        with ostinato.backend("parallel"):
            others |= {f"chunks of {size}": found(cell, chunk_size=size) for size in (16, 64, 256)}
        others |= {f"tiles of {tile}": found(_tiles, normalized, tile) for tile in (16, 32)}
        for form, values in others.items():
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, wanted, strict=True))
            errors[f"{name}, {form}:"] = worst
    return errors


def _costs() -> list[Measured]:
    fewest = fewest_operations(256, 512)
    best = fastest_chunk(256, 512, _INTENSITY)
    wider, faster = fastest_chunk(1024, 2048, _INTENSITY) / best, fastest_chunk(256, 512, 4 * _INTENSITY) / best
    return [
        Measured("fewest", f"{fewest:.4f}", abs(fewest - 13.0344) < 1e-3, "the formula, F = 1"),
        Measured(
            "device",
            f"{best:.0f} on an H100 ({best / fewest:.0f} times as long); {wider:.3f} times that for heads 4 times as "
            f"wide, {faster:.3f} times at 4 times the intensity",
            best >= 4 * fewest and max(abs(wider - 2), abs(faster - 2)) <= 0.05,
            f"the runtime model with nothing overlapped, keys 256, values 512, float32 states, {_INTENSITY:.0f} "
            "operations a byte; asked: 4 times, and 2 within 0.05",
        ),
    ]


def _maps(run: Run) -> list[Measured]:
    points, time, dim = run.choose(smoke=(4, 16, 8), cpu=(40, 256, 128), gpu=(40, 256, 128))
    maps: dict[str, Any] = run.part("maps", _gains, points, time, dim, run.seed)
    run.sizes["maps"] = f"{points} × {points}, input gate −12 to 8, forget gate −5 to 12, time {time}, dimension {dim}"
    run.figure(
        "Gain after the norm, forget gate fully open",
        [Series(f"{name}, ε = {eps}", maps["inputs"], maps[name][eps]) for name in _PLANS for eps in ("1e-06", "0")],
        x_label="input gate (pre-activation)",
        y_label="gain",
    )
    closed, opened = maps["sigmoid"]["1e-06"][0], maps["sigmoid"]["1e-06"][-1]
    note = "float64; no normaliser in the sigmoid cell"
    judge = run.budget != "smoke"
    return [
        Measured(
            "transfer",
            f"largest relative difference {maps['difference 0']:.0e} with ε = 0, {maps['difference 1e-06']:.0e} with "
            "ε = 1e-6",
            maps["difference 0"] <= 1e-3 if judge else None,
            f"over the whole map; asked: 1e-3 with ε = 0; {note}",
        ),
        Measured(
            "closed",
            f"gain {closed:.4f} at −12, {opened:.3f} at 8; exponential cell "
            f"{maps['exponential']['1e-06'][0]:.4f}, {maps['exponential']['1e-06'][-1]:.3f}",
            closed <= 0.1 * opened if judge else None,
            f"forget gate 12; asked: a tenth; {note}",
        ),
    ]


def _gains(points: int, time: int, dim: int, seed: int) -> dict[str, Any]:
    """The maps' rows for the open forget gate, and the largest differences between the cells."""
    inputs = torch.linspace(-12, 8, points, dtype=torch.float64)
    forgets = torch.linspace(-5, 12, points, dtype=torch.float64)
    outcome: dict[str, Any] = {"inputs": inputs.tolist(), "exponential": {}, "sigmoid": {}}
    for eps in (1e-6, 0.0):
        maps = {}
        for name in _PLANS:
            options: dict[str, Any] = {"time": time, "dim": dim, "norm_eps": eps, "seed": seed}
            _, maps[name] = gate_transfer_map(inputs, forgets, exponential=name == "exponential", **options)
            outcome[name][f"{eps:g}"] = maps[name][:, -1].tolist()
        gap = (maps["exponential"] - maps["sigmoid"]).abs() / maps["exponential"].maximum(maps["sigmoid"])
        outcome[f"difference {eps:g}"] = float(gap.max())
    return outcome


def _text(run: Run) -> list[Measured]:
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    width, window, batch, steps = run.choose(smoke=(16, 16, 2, 1), cpu=(64, 128, 8, 500), gpu=(128, 256, 16, 1500))
    task = Text(window=window, carry=False, max_bytes=run.choose(smoke=2000, cpu=200_000, gpu=None))
    run.sizes["text"] = {"width": width, "layers": 4, "window": window, "batch": batch, "steps": steps, "seeds": seeds}
    run.sizes["text"] |= {"plans": _PLANS, "learning rate": 1e-3}
    found: dict[str, list[float]] = {}
    curves = []
    for name, plan in _PLANS.items():
        part = run.part(f"text {name}", _train, plan, width, task, seeds, batch, steps, run)
        found[name] = part["scores"]
        curve = part["losses"]
        curves.append(Series(name, [(i + 1) * steps / len(curve) for i in range(len(curve))], curve))
    run.figure(
        f"Loss in training on text (mean of {len(seeds)} seeds)", curves, x_label="step", y_label="nats per byte"
    )
    gap = mean(found["sigmoid"]) - mean(found["exponential"])
    each = "; ".join(f"{name} {', '.join(f'{loss:.3f}' for loss in losses)}" for name, losses in found.items())
    baselines = ", ".join(f"{name} {value:.2f}" for name, value in task.baselines().items())
    return [
        _bias(run, task, found, (width, batch, steps), seeds),
        Measured(
            "gates",
            f"sigmoid less exponential {gap:+.3f} nats",
            abs(gap) <= 0.03 if run.budget != "smoke" else None,
            f"nats per byte, held out: {each}; asked: 0.03 at most; bits per byte of the classics: {baselines}",
        ),
    ]


def _bias(
    run: Run, task: Text, found: dict[str, list[float]], sizes: tuple[int, int, int], seeds: list[int]
) -> Measured:
    """The same training with input gates that start half open (bias 0)."""
    if run.budget == "cpu":
        return Measured("bias", "not measured", None, "trained in the gpu budget: no room for it on two cores")
    width, batch, steps = sizes
    opened = {}
    for name, plan in _PLANS.items():
        plan = plan.replace(")", ", input_bias=0.0)")
        part = run.part(f"text {name}, bias 0", _train_or_diverge, plan, width, task, seeds, batch, steps, run)
        opened[name] = part["scores"]
    diverged = [name for name, scores in opened.items() if not scores]
    gaps = {name: mean(scores) - mean(found[name]) for name, scores in opened.items() if scores}
    needed = bool(diverged) or min(gaps.values()) > 0.03
    return Measured(
        "bias",
        "; ".join([*(f"{name} {gap:+.3f} nats" for name, gap in gaps.items()), *(f"{d} diverged" for d in diverged)]),
        needed if run.budget != "smoke" else None,
        "loss with a bias of 0 less with −10; needed: a run diverges, or both gates are worse by more than 0.03; "
        + "; ".join(f"{name} {', '.join(f'{loss:.3f}' for loss in losses)}" for name, losses in opened.items()),
    )


def _train_or_diverge(*arguments: Any) -> dict[str, Any]:
    """`_train`, or no scores where the gradient stopped being finite."""
    try:
        return _train(*arguments)
    except DivergenceError:
        return {"scores": [], "losses": []}


def _train(plan: str, width: int, task: Text, seeds: list[int], batch: int, steps: int, run: Run) -> dict[str, Any]:
    """The held-out loss of every seed, and the mean loss at every tenth of the training."""
    scores, losses = [], []
    trained = fit_seeds(
        lambda _: TokenClassifier(task.vocab_size, width, plan, 4),
        task,
        seeds,
        steps=steps,
        batch_size=batch,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup=min(100, steps),
        say=run.say,
    )
    for ensemble in trained:
        losses += list(zip(*ensemble.losses, strict=True))
        scores += [evaluate(model, task)["loss"] for model in ensemble]
    return {"scores": scores, "losses": [mean(values) for values in zip(*losses, strict=True)]}


def _speeds(run: Run) -> list[Measured]:
    if run.budget != "gpu" or not torch.cuda.is_available():
        keys = ("chunks", "states", "faster", "length", "tokens")
        return [Measured(key, "not measured", None, _GPU) for key in keys]
    chunks, lengths = (32, 64, 128, 256, 512, 1024), (2048, 4096, 8192, 16384)
    run.sizes["speed"] = "batch 2, heads 4, keys 256, values 512, bfloat16, forward and backward, plain PyTorch route"
    found: dict[str, Any] = run.timed_part("speed", _timed, chunks, lengths, 8192, "cuda")
    run.figure(
        "Forward and backward at 8192 tokens, plain route",
        [Series(name, list(chunks), [1e3 * value for value in found[name]]) for name in _PLANS],
        x_label="chunk",
        y_label="milliseconds",
        log_x=True,
        log_y=True,
    )

    def listed(values: list[float], scale: float) -> str:
        return ", ".join(f"{value * scale:.2f}" for value in values)

    rows = [_tokens(run)]
    best = chunks[found["sigmoid"].index(min(found["sigmoid"]))]
    bytes_ = found["bytes"]
    states = ", ".join(f"{2 * 4 * 4 * stored_states(8192, chunk, 256, 512) / 2**30:.2f}" for chunk in chunks)
    ratio = [b / a for a, b in zip(found["sigmoid"], found["exponential"], strict=True)]
    growth = {name: found["lengths"][name][-1] / found["lengths"][name][0] for name in found["lengths"]}
    where = f"chunks {', '.join(map(str, chunks))} at 8192 tokens; plain PyTorch route, not the tiled kernels"
    return [
        *rows,
        Measured("chunks", f"fastest {best}; ms {listed(found['sigmoid'], 1e3)}", 128 <= best <= 512, where),
        Measured(
            "states",
            f"GiB at the peak {listed(bytes_, 2**-30)}",
            bytes_[chunks.index(256)] < bytes_[chunks.index(64)],
            f"{where}, which keep a chunk's scores as well; the states alone, float32: {states} GiB; asked: less at "
            "256 than at 64",
        ),
        Measured("faster", f"exponential / sigmoid {listed(ratio, 1)}", min(ratio) > 1, where),
        Measured(
            "length",
            "; ".join(f"{name}: {value:.1f} times" for name, value in growth.items()),
            growth["sigmoid"] < 10 < growth["attention"],
            f"the time at {lengths[-1]} tokens over that at {lengths[0]}, {lengths[-1] // lengths[0]} times as many: "
            "asked: below 10 against above 10; free route",
        ),
    ]


def _tokens(run: Run) -> Measured:
    """The paper's table: one number of tokens in sequences of every length."""
    measured: dict[str, Any] = run.timed_part(
        "tokens", _timed_tokens, 65_536, (512, 2048, 8192, 32_768, 65_536), "cuda"
    )
    tokens, lengths, found = measured["tokens"], measured["lengths"], measured["seconds"]
    run.sizes["tokens"] = f"{tokens} in all, 8 heads, keys 256, values 512; attention 32 heads of 128; bfloat16"
    run.figure(
        f"Forward and backward of {tokens:,} tokens, free route",
        [Series(name, list(lengths), [1e3 * value for value in values]) for name, values in found.items()],
        x_label="length of a sequence",
        y_label="milliseconds",
        log_x=True,
        log_y=True,
    )
    flat = {name: max(values) / min(values) for name, values in found.items()}
    return Measured(
        "tokens",
        "; ".join(f"{name} {', '.join(f'{1e3 * value:.1f}' for value in values)} ms" for name, values in found.items()),
        max(flat["sigmoid"], flat["exponential"]) <= 1.25 and flat["attention"] >= 2,
        f"{tokens:,} tokens at lengths {', '.join(map(str, lengths))}; longest over shortest time "
        + ", ".join(f"{name} {value:.2f}" for name, value in flat.items())
        + "; asked: at most 1.25 for both cells, at least 2 for attention",
    )


def _timed_tokens(tokens: int, lengths: tuple[int, ...], on: str) -> dict[str, Any]:
    """Seconds of forward and backward of both cells and of attention, by the length; of half where memory ends."""
    device = torch.device(on)
    lengths = tuple(time for time in lengths if time <= tokens)
    found: dict[str, list[float]] = {name: [] for name in ("sigmoid", "exponential", "attention")}
    try:
        for time in lengths:
            for name, timing in _timed_length(tokens // time, time, device).items():
                found[name].append(timing.median)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _timed_tokens(tokens // 2, lengths, on)
    return {"tokens": tokens, "lengths": list(lengths), "seconds": found}


def _timed_length(batch: int, time: int, device: torch.device) -> dict[str, Timing]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    arguments = [drawn(time, 8, *size) for size in ((256,), (256,), (512,), (), ())]
    heads = [drawn(32, time, 128) for _ in range(3)]
    calls: dict[str, Callable[[], Any]] = {
        "sigmoid": partial(_pass, _gated, arguments),
        "exponential": partial(_pass, _stabilised, arguments),
        "attention": partial(_pass, partial(F.scaled_dot_product_attention, is_causal=True), heads),
    }
    return time_together(calls, rounds=5, warm_up=2, budget=15, device=device)


def _pass(cell: Any, arguments: list[Tensor]) -> None:
    """Forward and backward."""
    outputs = cell(*arguments)
    torch.autograd.grad(outputs.sum(), arguments)


def _gated(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    return linear_attention(q / 16, k * torch.sigmoid(i).unsqueeze(-1), v, F.logsigmoid(f.float()))[0]


def _stabilised(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    return exponential_attention(q / 16, k, v, i.float(), F.logsigmoid(f.float()))[0]


def _timed(chunks: tuple[int, ...], lengths: tuple[int, ...], longest: int, on: str) -> dict[str, Any]:
    """Seconds and peak bytes of forward and backward: by the chunk at `longest` tokens, and by the length."""
    device = torch.device(on)

    def drawn(time: int) -> list[Tensor]:
        sizes = ((256,), (256,), (512,), (), ())
        arguments = [torch.randn(2, time, 4, *size, device=device, dtype=torch.bfloat16) for size in sizes]
        arguments[0] = arguments[0] / 16
        return [argument.requires_grad_() for argument in arguments]

    def trained(cell: Any, arguments: list[Tensor], **options: Any) -> None:
        outputs, _ = cell(*arguments, **options)
        torch.autograd.grad(outputs.sum(), arguments)

    def attend(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v[..., : q.shape[-1]]))
        # The gates take no part; they are added so that their gradients exist.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum() + 0 * (i.sum() + f.sum()), q

    def gated(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return linear_attention(q, k * torch.sigmoid(i).unsqueeze(-1), v, F.logsigmoid(f.float()), **options)

    def exponential(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return exponential_attention(q, k, v, i.float(), F.logsigmoid(f.float()), **options)

    found: dict[str, Any] = {"exponential": [], "sigmoid": [], "bytes": [], "lengths": {"sigmoid": [], "attention": []}}
    arguments = drawn(longest)
    with ostinato.backend("parallel"):
        for chunk in chunks:
            calls: dict[str, Callable[[], Any]] = {
                "exponential": partial(trained, exponential, arguments, chunk_size=chunk),
                "sigmoid": partial(trained, gated, arguments, chunk_size=chunk),
            }
            for name, timing in time_together(calls, rounds=7, device=device).items():
                found[name].append(timing.median)
            found["bytes"].append(peak_bytes(calls["sigmoid"], device))
    for time in lengths:
        arguments = drawn(time)
        both: dict[str, Callable[[], Any]] = {
            "sigmoid": partial(trained, gated, arguments),
            "attention": partial(trained, attend, arguments),
        }
        for name, timing in time_together(both, rounds=7, device=device).items():
            found["lengths"][name].append(timing.median)
    return found
