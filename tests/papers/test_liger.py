"""The small part of paper 66: its verdicts from losses, and which weights its arms learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ostinato.papers import p66_liger
from ostinato.papers.runner import Measured


def rows(**changed: list[float]) -> dict[str, Measured]:
    """Of losses of 2 everywhere but in ours, the teacher's, random weights', and what is changed."""
    losses = {name: [2.0] for name in p66_liger._ARMS}
    losses |= {"Liger-GLA": [1.1, 1.2, 1.3], "teacher": [1.0], "random weights": [3.0]}
    losses |= {name.replace("_", " "): each for name, each in changed.items()}
    found = {name: [{"converted": 4.0, "adapted": loss} for loss in each] for name, each in losses.items()}
    return {row.key: row for row in p66_liger._rows(found)}


def test_verdicts() -> None:
    found = rows()
    assert set(found) == {"recovers", *p66_liger._CONTROLS} and all(row.holds for row in found.values())
    assert found["recovers"].ours == "0.900" and "Liger-GLA 1.200" in found["recovers"].note
    # A control of one seed stands beside the first of ours.
    assert found["low rank"].ours == "+0.9000 nats with full fine-tuning"
    found = rows(fresh_gate=[1.2, 1.3, 1.3], recurrence_alone=[1.3, 1.4, 1.39])
    assert found["gate"].holds is False and found["gate"].ours == "+0.0667 nats with fresh gate"
    assert found["window"].holds is False and "at least 0.1" in found["window"].note
    assert not rows(random_weights=[1.4])["recovers"].holds


@pytest.mark.parametrize(
    ("arm", "learned"),
    [
        ("Liger-GLA", {"lora_a", "lora_b"}),
        ("learned features", {"lora_a", "lora_b", "query_features", "key_features"}),
        ("fresh gate", {"lora_a", "lora_b", "to_gate.weight"}),
        ("LoLCATs", {"lora_a", "lora_b"}),
        ("full fine-tuning", {"weight"}),
    ],
)
def test_what_an_arm_learns(arm: str, learned: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p66_liger._teach(tmp_path, 16, 32, 1, 0)
    shown: set[str] = set()
    fit = p66_liger.fit

    def watched(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        shown.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return fit(model, *arguments, **options)

    monkeypatch.setattr(p66_liger, "fit", watched)
    found = p66_liger._adapt(tmp_path, arm, 32, 2, 0)
    assert found["adapted"] != found["converted"]
    kinds = {next((kind for kind in sorted(learned) if name.endswith(kind)), name) for name in shown}
    assert kinds == learned
