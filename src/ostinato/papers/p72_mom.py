"""Mixture of Memories (Du et al. 2025, arXiv 2502.13685): separate memories against interference in recall.

Associative recall with more pairs than a memory has room for. Every arm has the same width, depth and convolution; what
differs is how much state there is, and whether it is one memory or several. The controls widen the values of a single
memory until it holds as many numbers as the mixture activates, and as it has in all.
"""

from __future__ import annotations

from functools import partial
from statistics import mean
from typing import Any

import torch

import ostinato
from ostinato.analysis.state_collapse import state_size
from ostinato.layers.routing import choose
from ostinato.mixers.mom import MixtureOfMemories
from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.training.ensemble import fit_together
from ostinato.training.evaluate import evaluate
from ostinato.training.load_balance import load_balance, loads

claims = (
    Claim("recall", "separate memories raise recall over one memory of the same size", theirs="28.16 against 24.78"),
    Claim("activated", "and over one memory as large as what is activated", theirs="28.16 against 26.32"),
    Claim("whole", "over one memory as large as all memories together", theirs="not in the paper"),
    Claim("gla", "so with GLA: separate memories against one", theirs="23.53 against 21.71"),
    Claim("shared", "the shared memory raises recall", theirs="28.16 against 26.06"),
    Claim("router", "a learned router does better than a hash of the tokens", theirs="not in the paper"),
    Claim("balance", "a stronger balance loss raises recall", theirs="27.59 at 1e-2, 28.16 at 1e-3"),
    Claim("number", "more memories, half of them activated, raise recall", theirs="figure, 1 to 8 memories"),
    Claim("weight", "without a balance loss recall is lower", theirs="27.23 against 27.59 at 1e-2, 28.16 at 1e-3"),
    Claim("load", "the auxiliary loss keeps the load of every memory near top_k / memories", theirs="0.24–0.80 of 2"),
    Claim("forms", "the packed form is the form token by token", theirs="exact"),
    Claim("identities", "one memory is the base mixer; permuted memories give the same outputs", theirs="exact"),
    Claim("large", "hybrids, LongBench, language models of 380M and 1.3B", theirs="tables"),
)

_ARMS = {
    "one": "one memory",
    "mom": "MoM, 4 choose 2 + shared",
    "activated": "one memory, state as activated",
    "whole": "one memory, state as all",
    "no shared": "MoM without shared memory",
    "hash": "MoM, routed by a hash",
    "even": "MoM, balance loss × 10",
    "gla": "GLA, one memory",
    "gla mom": "MoM of GLA",
}
_RATE, _LOWER_RATE = 3e-3, 1e-3
_TWO_RATES = ("one", "mom", "activated")
"""The arms of the paper's own comparison: there the better of two learning rates counts, by the mean over seeds."""
_SMALL = {
    "2 choose 1": ("memories=2, top_k=1", 0.01),
    "4 choose 2": ("memories=4, top_k=2", 0.01),
    "8 choose 4": ("memories=8, top_k=4", 0.01),
    "weight 0.001": ("memories=4, top_k=2", 0.001),
    "weight 0": ("memories=4, top_k=2", 0.0),
}
"""Ablations at the processor's sizes: options of the mixture, and the weight of the balance loss."""
_ON_GPU = "trained in the gpu budget: there is no room for the arm on two cores"


def experiment(run: Run) -> list[Measured]:
    """Recall of all arms, the loads of the routers, and the exact statements."""
    names = ("vocabulary", "length", "pairs", "width", "head", "batch", "steps", "test")
    sizes = run.choose(
        smoke=(16, 16, 4, 8, 4, 4, 2, 8),
        cpu=(64, 32, 8, 64, 8, 32, 1000, 512),
        gpu=(512, 256, 48, 64, 16, 32, 2000, 1024),
    )
    size: dict[str, int] = dict(zip(names, sizes, strict=True))
    seeds = [run.seed + index for index in range(run.choose(smoke=1, cpu=3, gpu=3))]
    arms = run.choose(smoke=tuple(_ARMS), cpu=("one", "mom", "activated"), gpu=tuple(_ARMS))
    run.sizes.update({**size, "heads": 2, "layers": 2, "learning rate": _RATE, "seeds": seeds})
    run.sizes["arms"] = {name: _plan(name, size["head"], size["width"]) for name in arms}
    # On a GPU the seeds are one batch; on a processor that would gain nothing, and be one long part.
    groups = [seeds] if run.budget == "gpu" else [[seed] for seed in seeds]
    parts = {arm: [run.part(f"{arm} seeds {group}", _train, arm, size, group, run) for group in groups] for arm in arms}
    lower = {
        arm: run.part(f"{arm} at {_LOWER_RATE:g} seeds {seeds}", _train, arm, size, seeds, run, _LOWER_RATE)
        for arm in _TWO_RATES
        if run.budget == "gpu"
    }
    small = _small_arms(run, seeds)
    exact: dict[str, float] = run.part("exact", _exactness, run.choose(smoke=20, cpu=64, gpu=256))
    found = {arm: [one for group in values for one in group] for arm, values in parts.items()}
    if lower:
        run.sizes["learning rate"] = f"{_RATE:g}; of {', '.join(_TWO_RATES)} also {_LOWER_RATE:g}"
    run.figure(
        f"Loss in training (mean of {len(seeds)} seeds)",
        [
            Series(
                _ARMS[arm],
                [(i + 1) * size["steps"] / len(found[arm][0]["losses"]) for i in range(len(found[arm][0]["losses"]))],
                [mean(values) for values in zip(*(one["losses"] for one in found[arm]), strict=True)],
            )
            for arm in arms
        ],
        x_label="step",
        y_label="cross-entropy (nats)",
    )
    rows = [*_judge(run, found, lower), *_ablations(run, small), *_loads(run, found), *_exact_rows(exact)]
    return [*rows, _unmeasured("large", _LARGE)]


_LARGE = "language models of 380M and 1.3B trained on 15B and 100B tokens; the layers, options and loss are there"


def _unmeasured(key: str, why: str) -> Measured:
    return Measured(key, "not measured", None, why)


def _plan(arm: str, head: int, width: int) -> str:
    """The arm's mixer: two heads with keys and values of width `head`."""
    share = 2 * head / width
    base = f"heads=2, expand_k={share}, expand_v={share}"
    wider = {"one": 1, "activated": 3, "whole": 5}
    if arm in wider:
        return f"gated_delta_net(heads=2, expand_k={share}, expand_v={share * wider[arm]})"
    if arm in _SMALL:
        return f"mom({base}, conv=4, {_SMALL[arm][0]})"
    return {
        "mom": f"mom({base}, conv=4)",
        "even": f"mom({base}, conv=4)",
        "no shared": f"mom({base}, conv=4, shared_memory=False)",
        "hash": f"mom({base}, conv=4, router=hash)",
        "gla": f"gla({base}, conv=4)",
        "gla mom": f"mom(base=gla, {base}, conv=4)",
    }[arm]


def _train(arm: str, size: dict[str, int], seeds: list[int], run: Run, rate: float = _RATE) -> list[dict[str, Any]]:
    task = MultiQueryRecall(
        vocabulary=size["vocabulary"], length=size["length"], pairs=size["pairs"], test_size=size["test"]
    )
    plan = _plan(arm, size["head"], size["width"])
    routed = plan.startswith("mom") and arm != "hash"
    weight = _SMALL[arm][1] if arm in _SMALL else 0.1 if arm == "even" else 0.01
    ensemble = fit_together(
        lambda _: TokenClassifier(task.vocab_size, size["width"], plan, 2, channel_mixer=None),
        task,
        seeds,
        steps=size["steps"],
        batch_size=size["batch"],
        learning_rate=rate,
        weight_decay=0.1,
        warmup=min(100, size["steps"]),
        added_loss=partial(load_balance, weight=weight) if routed else None,
        say=run.say,
    )
    members = []
    for index, model in enumerate(ensemble):
        tokens = torch.cat([batch.inputs for batch in task.test_batches()])[:64].to(next(model.parameters()).device)
        state = [leaf for layer in model.initial_state(1) for leaf in ostinato.state.leaves(layer)]  # type: ignore[operator]
        members.append(
            {
                "accuracy": evaluate(model, task)["accuracy"],
                "losses": [losses[index] for losses in ensemble.losses],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "memory": sum(leaf.numel() for path, leaf in state if path.endswith("memory")),
                "state": state_size(model),
                "loads": loads(model, tokens) if routed else [],
            }
        )
    return members


def _small_arms(run: Run, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """The number of memories and the weight of the balance loss, trained on a smaller task; not on a processor."""
    if run.budget == "cpu":
        return {}
    names = ("vocabulary", "length", "pairs", "width", "head", "batch", "steps", "test")
    sizes = run.choose(smoke=(16, 16, 4, 8, 4, 4, 1, 8), cpu=None, gpu=(64, 32, 8, 64, 8, 32, 1600, 1024))
    size = dict(zip(names, sizes, strict=True))
    run.sizes["ablations"] = {**size, "arms": {name: _plan(name, size["head"], size["width"]) for name in _SMALL}}
    return {name: run.part(f"small {name} seeds {seeds}", _train, name, size, seeds, run) for name in _SMALL}


def _ablations(run: Run, trained: dict[str, list[dict[str, Any]]]) -> list[Measured]:
    """What those arms recall."""
    if not trained:
        return [_unmeasured(key, _ON_GPU) for key in ("number", "weight")]
    found = {name: [one["accuracy"] for one in members] for name, members in trained.items()}
    means = {name: mean(values) for name, values in found.items()}
    by_number = [means[name] for name in ("2 choose 1", "4 choose 2", "8 choose 4")]
    judge = run.budget != "smoke"

    def told(names: tuple[str, ...]) -> str:
        return "; ".join(f"{name} {_list(found[name])}" for name in names)

    return [
        Measured(
            "number",
            told(("2 choose 1", "4 choose 2", "8 choose 4")),
            by_number == sorted(by_number) and by_number[-1] > by_number[0] if judge else None,
            "each with the shared memory, on 8 pairs in 32 tokens; asked: the means rise",
        ),
        Measured(
            "weight",
            f"0.01 {_list(found['4 choose 2'])}; 0.001 {_list(found['weight 0.001'])}; 0 {_list(found['weight 0'])}",
            means["weight 0"] < min(means["4 choose 2"], means["weight 0.001"]) if judge else None,
            "4 choose 2, on 8 pairs in 32 tokens; means are compared",
        ),
    ]


def _judge(run: Run, found: dict[str, list[dict[str, Any]]], lower: dict[str, list[dict[str, Any]]]) -> list[Measured]:
    accuracy = {arm: [one["accuracy"] for one in seeds] for arm, seeds in found.items()}
    other_rate = {arm: [one["accuracy"] for one in seeds] for arm, seeds in lower.items()}
    better = {arm: max(accuracy[arm], other_rate.get(arm, [0.0]), key=mean) for arm in accuracy}
    rates = "; ".join(f"{arm} {_list(accuracy[arm])} and {_list(values)}" for arm, values in other_rate.items())
    sizes = "; ".join(
        f"{_ARMS[arm]}: {one[0]['parameters']:,} parameters, memory {one[0]['memory']:,}" for arm, one in found.items()
    )
    pairs = {
        "recall": ("mom", "one", 0.10, f"asked: 0.10 more; {sizes}"),
        "activated": ("mom", "activated", 0.0, "no bound was set: the honest control"),
        "whole": ("mom", "whole", 0.0, "no bound was set: the honest control"),
        "gla": ("gla mom", "gla", 0.0, ""),
        "shared": ("mom", "no shared", 0.0, "without it there is less state, too"),
        "router": ("mom", "hash", 0.0, "the hash mixes with equal shares"),
        "balance": ("even", "mom", 0.0, "weight 0.1 against 0.01"),
    }
    rows = []
    for key, (ours, other, margin, note) in pairs.items():
        if ours not in accuracy or other not in accuracy:
            rows.append(_unmeasured(key, _ON_GPU))
            continue
        both = ours in lower and other in lower
        scores = better if both else accuracy
        if both:
            note += f"; the better of learning rates {_RATE:g} and {_LOWER_RATE:g}: {rates}"
        gap = [a - b for a, b in zip(scores[ours], scores[other], strict=True)]
        floor = (max(gap) - min(gap)) / 2
        rows.append(
            Measured(
                key,
                ours=f"{_list(scores[ours])} against {_list(scores[other])}",
                holds=None if run.budget == "smoke" else mean(gap) >= margin and min(gap) > 0,
                note=f"ahead by {mean(gap):.3f} ± {floor:.3f} (half the range over seeds; asked of every seed: ahead)"
                + (f"; {note}" if note else ""),
            )
        )
    return rows


def _loads(run: Run, found: dict[str, list[dict[str, Any]]]) -> list[Measured]:
    layers = [layer for arm in ("mom", "gla mom", "no shared") for one in found.get(arm, []) for layer in one["loads"]]
    low, high = min(map(min, layers)), max(map(max, layers))
    even = [layer for one in found.get("even", []) for layer in one["loads"]]
    tenfold = f"; with the loss × 10 {min(map(min, even)):.2f} to {max(map(max, even)):.2f}" if even else ""
    return [
        Measured(
            "load",
            ours=f"{low:.2f} to {high:.2f}",
            holds=None if run.budget == "smoke" else low >= 0.25 and high <= 0.75,
            note="shares of tokens per memory, all layers, seeds and arms with a learned router; 0.5 is balanced; "
            f"asked: between half and one and a half of it{tenfold}",
        )
    ]


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


@torch.no_grad()
def _exactness(time: int) -> dict[str, float]:
    """Errors of the packed form against the one by token (float32), of one memory against the base, of permutations."""
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, time, 32, generator=generator)
    for base in ("gated_delta_net", "gla", "linear_attention", "gated_slot_attention"):
        layer = _mixture(base=base)
        whole, _ = layer(x)
        state, outputs = layer.initial_state(2), []
        for t in range(time):
            y, state = layer.step(x[:, t], state)
            outputs.append(y)
        found[base] = float((torch.stack(outputs, 1) - whole).abs().max() / whole.abs().max())
    layer = _mixture()
    parameters = dict(layer.named_parameters())
    order = torch.tensor([2, 0, 3, 1, 4])
    before, _ = layer(x)
    for name in [f"memories.{name}" for name in layer.memories.stacked]:
        parameters[name].copy_(parameters[name][order])
    parameters["router.weight"].copy_(parameters["router.weight"][order[:4]])
    found["permuted"] = float((layer(x)[0] - before).abs().max())
    single = _mixture(memories=1, top_k=1, shared_memory=False)
    base_mixer = ostinato.mixer("gated_delta_net", 32)
    base_mixer.load_state_dict(single.base.state_dict())
    found["one memory"] = float((single(x)[0] - base_mixer(x)[0]).abs().max())
    shares, _ = choose(torch.randn(4, 9, 4, generator=generator), 2)
    found["shares"] = float((shares.sum(-1) - 1).abs().max())
    return found


def _mixture(**options: Any) -> MixtureOfMemories:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = ostinato.mixer("mom", 32, **options)
    assert isinstance(layer, MixtureOfMemories)
    return layer


def _exact_rows(exact: dict[str, float]) -> list[Measured]:
    forms = {name: exact[name] for name in ("gated_delta_net", "gla", "linear_attention", "gated_slot_attention")}
    return [
        Measured(
            "forms",
            ours="largest relative error " + ", ".join(f"{name} {error:.0e}" for name, error in forms.items()),
            holds=max(forms.values()) <= 1e-4,
            note="float32; the convolution has a window per memory in both",
        ),
        Measured(
            "identities",
            ours=f"one memory {exact['one memory']:.0e}, permuted {exact['permuted']:.0e}",
            holds=max(exact["one memory"], exact["permuted"]) <= 1e-5,
            note="float32, largest absolute error",
        ),
    ]
