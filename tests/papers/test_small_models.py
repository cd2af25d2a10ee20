"""What experiments share: seeds trained as a part, differences by seed, and the error of one form against another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ostinato.models.token_classifier import TokenClassifier
from ostinato.papers.catalogue import system
from ostinato.papers.forms import relative_error, with_gradients
from ostinato.papers.runner import Run
from ostinato.papers.small_models import gaps, listed, scores, signed, train_arms, train_seeds
from ostinato.tasks.recall import MultiQueryRecall
from ostinato.tasks.text import Text


def test_a_part_has_every_seed_and_every_score(tmp_path: Path) -> None:
    run = Run(system(41), "smoke", 0, tmp_path)
    task = MultiQueryRecall(vocabulary=16, length=16, pairs=2, test_size=8)
    part = train_seeds("gla(heads=2)", 1, 8, task, [0, 1], 4, 20, 1e-3, run, channel_mixer=None)
    assert len(part["members"]) == 2 and [len(values) for values in part["losses"]] == [2] * 10
    model = TokenClassifier(16, 8, "gla(heads=2)", 1, channel_mixer=None)
    for member in part["members"]:
        assert set(member) == {"accuracy", "scaled_accuracy", "sequence_accuracy", "loss", "parameters", "state"}
        assert member["parameters"] == sum(value.numel() for value in model.parameters())
        assert member["state"] == 2 * 2 * 4  # heads × keys × values
    assert part["members"][0]["loss"] != part["members"][1]["loss"]
    assert scores(part, "loss") == [member["loss"] for member in part["members"]]
    again = train_seeds("gla(heads=2)", 1, 8, task, [0, 1], 4, 20, 1e-3, run, channel_mixer=None)
    assert again == part


def test_every_arm_is_a_part_of_its_own(tmp_path: Path) -> None:
    run = Run(system(41), "smoke", 0, tmp_path)
    task = MultiQueryRecall(vocabulary=16, length=16, pairs=2, test_size=8)
    plans = {"per channel": "gla(heads=2)", "none": "gla(heads=2, decay=off)"}
    arms = train_arms(run, "recall", plans, 1, 8, task, [0], 4, 1, 1e-3, channel_mixer=None)
    assert list(arms) == list(plans) and list(run.seconds) == ["recall per channel", "recall none"]
    for arm, plan in plans.items():
        assert arms[arm] == train_seeds(plan, 1, 8, task, [0], 4, 1, 1e-3, run, channel_mixer=None)
    assert arms["none"] != arms["per channel"]


def test_text_is_also_read_along_positions(tmp_path: Path) -> None:
    run = Run(system(41), "smoke", 0, tmp_path)
    task = Text(window=8, carry=False, max_bytes=2000)
    part = train_seeds("gla(heads=2)", 1, 8, task, [0], 2, 1, 1e-3, run, bins=[0, 4, 8, 16])
    (along,) = scores(part, "along")
    # Hardly trained: near the uniform guess everywhere.
    assert len(along) == 3 and all(4 < loss < 8 for loss in along)


def test_differences() -> None:
    assert gaps([1.0, 2.0], [1.5, 1.0]) == [0.5, -1.0]
    assert listed([0.12345, 1.0]) == "0.123, 1.000" and signed([0.5, -0.25]) == "+0.500, -0.250"
    with pytest.raises(ValueError, match="zip"):
        gaps([1.0], [1.0, 2.0])


def test_the_error_of_a_form() -> None:
    def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, y.sum(0)

    def off(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, 1.5 * y.sum(0)

    drawn = [torch.randn(3, 2, dtype=torch.float64) for _ in range(2)]
    wanted = with_gradients(plain, drawn)
    assert len(wanted) == 4 and relative_error(wanted, wanted) == 0
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    torch.testing.assert_close(wanted[2], weights * drawn[1])
    torch.testing.assert_close(wanted[3], weights * drawn[0] + 1)
    assert relative_error(with_gradients(off, drawn)[:2], wanted[:2]) == pytest.approx(0.5)
    assert relative_error([wanted[0].float()], wanted[:1]) < 1e-6
