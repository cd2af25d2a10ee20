"""DeltaProduct (Siems et al. 2025, arXiv 2502.10297): word problems of groups, and what a product of reflections is.

A group's word problem is trained on one length and tested on four times that. The score at a length is the share of
sequences with every answer right up to there.
"""

from __future__ import annotations

from itertools import permutations
from statistics import mean
from typing import Any

import torch

import ostinato
from ostinato.analysis.positions import accuracy_by_position
from ostinato.models.token_classifier import TokenClassifier
from ostinato.ops.delta_rule import delta_rule
from ostinato.papers.runner import Claim, Measured, Run
from ostinato.report import Series
from ostinato.tasks.groups import WordProblem
from ostinato.theory import expressivity, householder
from ostinato.theory.interleaved import interleaved_delta_rule
from ostinato.theory.rotation_groups import rotation_group
from ostinato.training.ensemble import fit_together

claims = (
    Claim("S3", "one layer, n = 2, [−1, 1] follows S3 to four times the trained length", theirs="converges"),
    Claim("S3 others", "n = 1 with either range, and n = 2 with [0, 1], do not at the trained length", theirs="do not"),
    Claim("forms", "recurrent, chunked and interleaved forms agree to 1e-4 (float32) and 1e-10 (float64)", theirs="="),
    Claim("stable", "‖A‖ ≤ 1 for β in [0, 2] and any n; n = 1 is symmetric with one eigenvalue 1 − β", theirs="proof"),
    Claim("rotation", "n = 2, β = 2: a rotation by twice the angle of the keys", theirs="proof"),
    Claim("real", "n = 2, β ≤ 1: eigenvalues real, in [0, 1]; n = 3: complex ones occur", theirs="proof"),
    Claim("permutations", "a permutation with c cycles is n − c reflections: S5 by four writes", theirs="proof"),
    Claim("solids", "S4 and A5 are rotations of space: two writes follow them", theirs="n = 2"),
    Claim("S4", "trained, n = 2 follows S4, n = 1 does not", theirs="2"),
    Claim("S4 keys", "for S4 the trained keys lie in three dimensions, with β near 2", theirs="> 95% of variance"),
    Claim("S5", "trained, n = 4 follows S5 at the trained length, n = 2 does not", theirs="≈ 1, 0"),
    Claim("depth", "S5 with n = 1 fails with up to 10 layers", theirs="fails"),
    Claim("language", "length extrapolation on code improves with n (loss at 32k tokens)", theirs="3.37, 3.05, 2.97"),
    Claim("scale", "language models of 213M to 1.3B: quality, throughput, rank of the state", theirs="better with n"),
)

_RANGES = {"[0, 1]": False, "[−1, 1]": True}


def experiment(run: Run) -> list[Measured]:
    """The computable statements, and S3; before them, on a GPU, S4 and S5."""
    large = {group: _arms(run, group) for group in _LARGE} if run.budget == "gpu" else {}
    rows = _statements(run)
    rows += _symmetric_group_of_three(run)
    rows += _larger_groups(run, large) if large else [_unmeasured(key, _NEEDS_GPU) for key in _TRAINED_LARGE]
    rows.append(_unmeasured("depth", "ten layers, trained for as many steps as n = 4 is, take ten times its time"))
    rows.append(_unmeasured("language", "needs a language model trained on code at 4096 tokens"))
    rows.append(_unmeasured("scale", "needs language models trained for days"))
    return rows


_TRAINED_LARGE = ("S4", "S4 keys", "S5")
_NEEDS_GPU = "trained in the gpu budget: hours on two cores"


def _unmeasured(key: str, why: str) -> Measured:
    return Measured(key, "not measured", None, why)


# --------------------------------------------------------------------------------------------------
# Trained.


def _symmetric_group_of_three(run: Run) -> list[Measured]:
    steps = run.choose(smoke=3, cpu=750, gpu=1000)
    seeds = [run.seed + index for index in range(3 if run.budget != "smoke" else 1)]
    sizes = {"d_model": 64, "heads": 4, "length": run.choose(smoke=8, cpu=32, gpu=32), "batch": 64, "rate": 5e-3}
    run.sizes.update({f"S3 {name}": value for name, value in sizes.items()} | {"S3 steps": steps, "seeds": seeds})
    arms = {
        f"n = {n} {label}": f"delta_product(heads=4, householders={n}, conv=None, negative_eigenvalues={symmetric})"
        for n in (1, 2)
        for label, symmetric in _RANGES.items()
    } | {"LSTM": "lstm"}
    found = {name: run.part(f"S3 {name}", _follow, "S3", plan, steps, seeds, sizes, run) for name, plan in arms.items()}
    _draw(run, "S3", found, sizes["length"])
    length = sizes["length"]
    far = {name: [curve[4 * length - 1] for curve in arm["curves"]] for name, arm in found.items()}
    near = {name: [curve[length - 1] for curve in arm["curves"]] for name, arm in found.items()}
    best = "n = 2 [−1, 1]"
    others = {name: values for name, values in near.items() if name not in (best, "LSTM")}
    smoke = run.budget == "smoke"
    baseline = f"LSTM: {_list(near['LSTM'])} at {length}, {_list(far['LSTM'])} at {4 * length}; chance 0"
    return [
        Measured(
            "S3",
            ours=f"{_list(far[best])} at {4 * length}",
            holds=None if smoke else mean(far[best]) >= 0.85,
            note=f"at {length}: {_list(near[best])}; {baseline}",
        ),
        Measured(
            "S3 others",
            ours="; ".join(f"{name}: {_list(values)}" for name, values in others.items()),
            holds=None if smoke else max(mean(values) for values in others.values()) <= 0.1,
            note=f"sequence accuracy at {length}",
        ),
    ]


def _follow(
    group: str, plan: str, steps: int, seeds: list[int], sizes: dict[str, Any], run: Run
) -> dict[str, list[list[float]]]:
    """Sequence accuracy at lengths 1 … 4 × the trained one, for every seed; and what its keys are like."""
    length = sizes["length"]
    task = WordProblem(group=group, length=length, tested_lengths=(4 * length,))
    task.test_size = run.choose(smoke=16, cpu=512, gpu=2048)
    test = list(task.test_batches())
    ensemble = fit_together(
        lambda seed: TokenClassifier(task.vocab_size, sizes["d_model"], plan),
        task,
        seeds,
        steps=steps,
        batch_size=sizes["batch"],
        learning_rate=sizes["rate"],
        warmup=min(50, steps),
        say=run.say,
    )
    curves, keys = [], []
    for model in ensemble:
        curves.append(accuracy_by_position(model, test).so_far)
        if "delta_product" in plan:
            keys.append(_keys(model))
    return {"curves": curves, "keys": keys}


@torch.no_grad()
def _keys(model: Any) -> list[float]:
    """Of the head whose keys come nearest to three dimensions: their share of variance there; and its mean β."""
    block = model.backbone.blocks[0]
    mixer = block.mixer
    # Every element once, as a batch of words of one letter.
    x = block.norm(model.embedding.weight[1:].unsqueeze(1))
    _, keys, _, _ = mixer.project(x, None, None)
    keys = torch.nn.functional.normalize(torch.nn.functional.silu(keys), dim=-1).flatten(0, 1)
    variance = torch.linalg.svdvals(keys.transpose(0, 1)).square()
    shares = variance[:, :3].sum(1) / variance.sum(1)
    head = int(shares.argmax())
    return [float(shares[head]), float(mixer.beta(x)[..., head].mean())]


def _draw(run: Run, group: str, found: dict[str, Any], length: int) -> None:
    lengths = list(range(1, 4 * length + 1))
    run.figure(
        f"{group}: every answer right up to a length, trained on {length}",
        [
            Series(name, lengths, [mean(values) for values in zip(*arm["curves"], strict=True)])
            for name, arm in found.items()
        ],
        x_label="length",
        y_label="sequence accuracy",
    )


_LARGE = {
    "S4": {"d_model": 128, "heads": 8, "length": 64, "batch": 256, "rate": 2e-3, "steps": 1000, "seeds": 3},
    "S5": {"d_model": 128, "heads": 8, "length": 32, "batch": 512, "rate": 2e-3, "steps": 4000, "seeds": 1},
}
_WRITES = {"S4": (2, 1), "S5": (4, 2, 1)}
"""The numbers of writes for each group, the one that is to follow it first."""


def _large(run: Run, group: str, name: str, plan: str) -> dict[str, Any]:
    sizes = _LARGE[group]
    seeds = [run.seed + index for index in range(int(sizes["seeds"]))]
    return run.part(f"{group} {name}", _follow, group, plan, int(sizes["steps"]), seeds, sizes, run)


def _arms(run: Run, group: str) -> dict[str, Any]:
    plan = "delta_product(heads=8, householders={}, expand_k=2, expand_v=2, conv=None, negative_eigenvalues=True)"
    return {f"n = {n}": _large(run, group, f"n = {n}", plan.format(n)) for n in _WRITES[group]}


def _larger_groups(run: Run, large: dict[str, dict[str, Any]]) -> list[Measured]:
    """The verdicts on S4 and S5; an LSTM beside them, last because it goes step by step."""
    rows = []
    for group, sizes in _LARGE.items():
        run.sizes.update({f"{group} {name}": value for name, value in sizes.items()})
        length, found = int(sizes["length"]), large[group]
        near = {name: [curve[length - 1] for curve in arm["curves"]] for name, arm in found.items()}
        first, *others = found
        lstm = _large(run, group, "LSTM", "lstm")
        _draw(run, group, {**found, "LSTM": lstm}, length)
        baseline = _list([curve[length - 1] for curve in lstm["curves"]])
        far = [curve[-1] for curve in found[first]["curves"]]
        rows.append(
            Measured(
                group,
                ours="; ".join(f"{name}: {_list(values)} at {length}" for name, values in near.items()),
                holds=mean(near[first]) >= 0.85 and max(mean(near[name]) for name in others) <= 0.1,
                note=f"{first} at {4 * length}: {_list(far)}; trained on {length} (128 there), {sizes['steps']} steps "
                f"of {sizes['batch']}, seeds: {sizes['seeds']}; LSTM {baseline} at {length}; chance 0",
            )
        )
        if group == "S4":
            rows.append(_keys_row(found[first]["keys"], near[first]))
    return rows


def _keys_row(keys: list[list[float]], scores: list[float]) -> Measured:
    # Keys of a layer that did not learn the group say nothing of it.
    learned = [key for key, score in zip(keys, scores, strict=True) if score >= 0.85]
    shown = "; ".join(f"{share:.1%}, mean β {beta:.2f}" for share, beta in keys)
    return Measured(
        "S4 keys",
        ours=f"variance in three dimensions, by seed: {shown}",
        holds=all(share > 0.95 and beta > 1.8 for share, beta in learned) if learned else None,
        note=f"the head that comes nearest, n = 2; 48 keys of 32 dimensions; {len(learned)} of {len(keys)} "
        "seeds learned the group and are judged",
    )


# --------------------------------------------------------------------------------------------------
# Computed.


def _statements(run: Run) -> list[Measured]:
    count = run.choose(smoke=50, cpu=2000, gpu=2000)
    found: dict[str, Any] = run.part("statements", _compute_statements, count, run.choose(smoke=64, cpu=512, gpu=2048))
    forms = run.part("forms", _compare_forms)
    words = found["words"]
    return [
        Measured(
            "forms",
            ours=f"largest difference {forms['float32']:.1e} and {forms['float64']:.1e}",
            holds=forms["float32"] <= 1e-4 and forms["float64"] <= 1e-10,
            note="n = 1 to 4, with and without decay; T = 300, 2 heads of 16 × 24; outputs and states",
        ),
        Measured(
            "stable",
            ours=f"largest ‖A‖ − 1: {found['norm'] - 1:.1e}; n = 1: {found['symmetric']:.1e} from its eigenvalues",
            holds=found["norm"] <= 1 + 1e-12 and found["symmetric"] <= 1e-12,
            note=f"{count} random products for each n of 1 … 6, 6 dimensions",
        ),
        Measured(
            "rotation",
            ours=f"largest error of e^±2iθ {found['rotation']:.1e}",
            holds=found["rotation"] < 1e-6,
        ),
        Measured(
            "real",
            ours=f"n = 2: outside [0, 1] by {found['outside']:.1e}; n = 3: imaginary part up to {found['complex']:.2f}",
            holds=found["outside"] < 1e-6 and found["complex"] > 1e-2,
        ),
        Measured(
            "permutations",
            ours=f"error {found['permutation error']:.0e}, all with n − c: {found['fewest']}; words {words['S5']:.4g}",
            holds=found["permutation error"] < 1e-12 and found["fewest"] and words["S5"] == 1,
            note="by construction; words: share of right answers in float32",
        ),
        Measured(
            "solids",
            ours=f"error {found['solid error']:.0e}; words of S4 {words['S4']:.4g}, of A5 {words['A5']:.4g}",
            holds=found["solid error"] < 1e-10 and words["S4"] == words["A5"] == 1,
            note="by construction, two reflections an element; words: share of right answers in float32",
        ),
    ]


def _compute_statements(count: int, time: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(n: int, largest: float, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.randn(count, n, dim, generator=generator, dtype=torch.float64)
        betas = torch.rand(count, n, generator=generator, dtype=torch.float64) * largest
        return torch.nn.functional.normalize(keys, dim=-1), betas

    norm = max(float(torch.linalg.matrix_norm(householder.product(*random(n, 2)), 2).max()) for n in range(1, 7))
    keys, betas = random(1, 2)
    single = householder.product(keys, betas)
    wanted = torch.cat([1 - betas, torch.ones(count, 5).double()], dim=1).sort(1).values
    symmetric = (torch.linalg.eigvalsh(single) - wanted).abs().max() + (single - single.mT).abs().max()

    keys, _ = random(2, 2, dim=2)
    angle = torch.arccos((keys[:, 0] * keys[:, 1]).sum(-1).clamp(-1, 1))
    turned = householder.product(keys).diagonal(dim1=1, dim2=2).sum(1) / 2
    rotation = (turned - torch.cos(2 * angle)).abs().max()

    two = torch.linalg.eigvals(householder.product(*random(2, 1)))
    outside = torch.stack([two.imag.abs().max(), (two.real - 1).max(), -two.real.min()]).max()
    # Keys 60° apart in the plane: as β grows from 0 to 1 the trace goes from 2 below 0, and the determinant stays > 0.
    angles = torch.arange(3).double() * (torch.pi / 3)
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1).expand(count, 3, 2)
    three = torch.linalg.eigvals(
        householder.product(keys, torch.linspace(0, 1, count).double().view(-1, 1).repeat(1, 3))
    )

    elements = list(permutations(range(5)))
    factors = [householder.permutation_factors(element) for element in elements]
    matrices = torch.zeros(len(elements), 5, 5, dtype=torch.float64)
    for matrix, element in zip(matrices, elements, strict=True):
        matrix[list(element), range(5)] = 1
    products = torch.stack([householder.product(*pair) for pair in factors])
    ranks = torch.linalg.matrix_rank(matrices - torch.eye(5).double())
    words, solid = {"S5": _words(*householder.padded(factors), time)}, 0.0
    for name in ("S4", "A5"):
        rotations = rotation_group(name).matrices
        pairs = [householder.rotation_factors(matrix) for matrix in rotations]
        solid = max(solid, float((torch.stack([householder.product(*p) for p in pairs]) - rotations).abs().max()))
        words[name] = _words(*householder.padded(pairs, 2), time)
    return {
        "norm": norm,
        "symmetric": float(symmetric),
        "rotation": float(rotation),
        "outside": float(outside),
        "complex": float(three.imag.abs().max()),
        "permutation error": float((products - matrices).abs().max()),
        "fewest": ranks.tolist() == [len(betas) for _, betas in factors],
        "solid error": solid,
        "words": words,
    }


def _words(keys: torch.Tensor, betas: torch.Tensor, time: int) -> float:
    """The share of right answers to random words, by the layer in float32; right is what the matrices multiply to."""
    matrices = householder.product(keys, betas)
    words = torch.randint(0, len(matrices), (4, time), generator=torch.Generator().manual_seed(1))
    products = torch.cdist((matrices.unsqueeze(1) @ matrices).flatten(2).flatten(0, 1), matrices.flatten(1))
    table = products.argmin(1).view(len(matrices), len(matrices))
    right = words.clone()
    for t in range(1, time):
        right[:, t] = table[right[:, t - 1], words[:, t]]
    return float((expressivity.follow_words(keys.float(), betas.float(), words) == right).double().mean())


def _compare_forms() -> dict[str, float]:
    """The largest difference between the three forms, by type."""
    return {name: _difference(getattr(torch, name)) for name in ("float32", "float64")}


def _difference(dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    difference = 0.0
    for writes in range(1, 5):
        steps = 300 * writes
        queries, keys = (torch.nn.functional.normalize(normal(2, length, 2, 16), dim=-1) for length in (300, steps))
        values, betas, decay = normal(2, steps, 2, 24), 2 * normal(2, steps, 2).sigmoid(), -normal(2, 300, 2).exp()
        for log_decay in (None, decay / 10):
            with ostinato.backend("reference"):
                truth = delta_rule(queries, keys, values, betas, log_decay)
            for form in (delta_rule, interleaved_delta_rule):
                with ostinato.backend("parallel"):
                    found = form(queries, keys, values, betas, log_decay)
                for ours, wanted in zip(found, truth, strict=True):
                    difference = max(difference, float((ours - wanted).abs().max()))
    return difference


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
