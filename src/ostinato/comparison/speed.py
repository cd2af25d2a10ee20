"""How fast mixers are: tokens a second in training and in streaming, each in turns with attention in the same run."""

from __future__ import annotations

from typing import Any, NamedTuple

REFERENCE = "attention"


class Load(NamedTuple):
    """What is timed: a network of `depth` layers, forward and backward over `batch` sequences of `length` tokens."""

    d_model: int
    depth: int
    batch: int
    length: int
    half: bool = False
    """Parameters in bfloat16."""


CPU_LOAD = Load(128, 2, 2, 256)
CUDA_LOAD = Load(512, 2, 8, 2048, half=True)


def measure_speed(plan: str, load: Load, device: str = "cpu", *, threads: int = 2, rounds: int = 5) -> dict[str, float]:
    """Tokens a second of one plan, and of attention measured in turns with it.

    Args:
        plan: of the network, without channel mixers: what is timed is the mixer.
        load: see `Load`.
        device: "cpu" or "cuda".
        threads: of PyTorch, on the CPU.
        rounds: calls of each side, after two that do not count.

    Returns:
        `training` and `streaming` tokens a second, `attention training` measured beside it, and `times attention`,
        the ratio of the two (above 1: faster than attention). Streaming is one sequence, a token at a time, after 64.
    """
    import torch

    from ostinato.models.backbone import Backbone
    from ostinato.timing import time_together

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    where = torch.device(device)
    try:
        calls: dict[str, Any] = {}
        networks = {}
        for name in dict.fromkeys((plan, REFERENCE)):
            torch.manual_seed(0)
            network = Backbone(load.d_model, name, load.depth, channel_mixer=None).to(where)
            networks[name] = network.to(torch.bfloat16) if load.half else network
            calls[name] = _both_ways(networks[name], load, where)
        timings = time_together(calls, rounds=rounds, budget=20.0, device=where)
        tokens = load.batch * load.length
        found = {
            "training": tokens / timings[plan].median,
            "attention training": tokens / timings[REFERENCE].median,
            "times attention": timings[plan].ratio_to(timings[REFERENCE]),
            "streaming": _streaming(networks[plan], load, where),
        }
    finally:
        torch.set_num_threads(before)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _both_ways(network: Any, load: Load, where: Any) -> Any:
    import torch

    x = torch.randn(load.batch, load.length, load.d_model, device=where)
    x = x.to(torch.bfloat16) if load.half else x
    parameters = list(network.parameters())

    def call() -> None:
        y, _ = network(x)
        torch.autograd.grad(y.float().square().mean(), parameters, allow_unused=True)

    return call


def _streaming(network: Any, load: Load, where: Any, tokens: int = 32) -> float:
    import statistics
    import time

    import torch

    with torch.no_grad():
        x = torch.randn(1, 64, load.d_model, device=where, dtype=next(network.parameters()).dtype)
        _, state = network(x)
        taken = []
        for _ in range(tokens):
            start = time.perf_counter()
            y, state = network.step(x[:, 0], state)
            y.sum().item()  # waits for an accelerator
            taken.append(time.perf_counter() - start)
    return 1 / statistics.median(taken)
