"""Small models trained from several seeds, with their scores: what experiments that compare mixers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ostinato.analysis.state_collapse import loss_by_position, state_size
from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.runner import Measured, Run
from ostinato.tasks.base import Task
from ostinato.tasks.text import Text
from ostinato.training.ensemble import fit_seeds
from ostinato.training.evaluate import evaluate

Rows = Callable[[], list[Measured]]
"""What a section of an experiment makes of its parts, when all sections have asked for theirs: until then, another
process may be computing them."""


def train_seeds(
    plan: str,
    depth: int,
    width: int,
    task: Task,
    seeds: Sequence[int],
    batch: int,
    steps: int,
    rate: float,
    run: Run,
    *,
    bins: Sequence[int] = (),
    channel_mixer: str | None = "swiglu",
    model: Callable[..., nn.Module] = TokenClassifier,
) -> dict[str, Any]:
    """A part of an experiment: one model for each seed, trained on the task and tested on it.

    Args:
        plan, depth, width, channel_mixer: of the model.
        task: what it is trained and tested on.
        seeds: one member each.
        batch, steps, rate: of the training, by AdamW with a weight decay of 0.1, a warm-up of at most 100 steps and a
            cosine.
        run: told the losses.
        bins: for `Text`, edges of positions: the members also read held-out pieces as long as the last edge, which
            begin one window apart, so that all bins hold nearly the same bytes.
        model: what is built, `model(vocab_size, width, plan, depth, channel_mixer=…)`.

    Returns:
        "members", one of each seed: every score of the whole test set, "parameters", "state" (how many numbers), and
        with `bins` "along", the loss in each. "losses": at each tenth of the training, those of all seeds.
    """
    members: list[dict[str, Any]] = []
    losses = []
    trained = fit_seeds(
        lambda _: model(task.vocab_size, width, plan, depth, channel_mixer=channel_mixer),
        task,
        seeds,
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        weight_decay=0.1,
        warmup=min(100, steps),
        say=run.say,
    )
    pieces = list(task.pieces(bins[-1], task.window)) if bins and isinstance(task, Text) else []
    for ensemble in trained:
        losses.append(ensemble.losses)
        for member in ensemble:
            found: dict[str, Any] = {name: v for name, v in evaluate(member, task).items() if "/" not in name}
            found["parameters"] = sum(value.numel() for value in member.parameters())
            found["state"] = state_size(member)
            if pieces:
                found["along"] = [part["loss"] for part in loss_by_position(member, pieces, bins)]
            members.append(found)
    return {
        "members": members,
        "losses": [[one for group in values for one in group] for values in zip(*losses, strict=True)],
    }


def train_arms(
    run: Run,
    label: str,
    plans: Mapping[str, str],
    depth: int,
    width: int,
    task: Task,
    seeds: Sequence[int],
    batch: int,
    steps: int,
    rate: float,
    **options: Any,
) -> dict[str, Any]:
    """`train_seeds` of every plan, each a part of the run, "label arm"; by the names of the arms.

    All arguments are those of `train_seeds`, `options` its own by keyword.
    """
    arguments = (depth, width, task, seeds, batch, steps, rate, run)
    return {arm: run.part(f"{label} {arm}", train_seeds, plan, *arguments, **options) for arm, plan in plans.items()}


def scores(part: dict[str, Any], name: str) -> list[Any]:
    """One entry of every member of a part, in the order of the seeds."""
    return [member[name] for member in part["members"]]


def gaps(lower: Sequence[float], higher: Sequence[float]) -> list[float]:
    """higher − lower, seed by seed."""
    return [b - a for a, b in zip(lower, higher, strict=True)]


def listed(values: Sequence[float]) -> str:
    """Three digits each."""
    return ", ".join(f"{value:.3f}" for value in values)


def signed(values: Sequence[float]) -> str:
    """Three digits each, with signs."""
    return ", ".join(f"{value:+.3f}" for value in values)
