"""Digits pixel by pixel: the images, the orders, the split, the baselines."""

from __future__ import annotations

import pytest
import torch

import ostinato.tasks.digits as digits
from ostinato.errors import ConfigurationError, DataError
from ostinato.tasks.digits import Digits, read_digits

pytest.importorskip("sklearn", reason="the images are scikit-learn's")


def test_the_images_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = read_digits()
    wanted = load_digits()
    assert (pixels == wanted.data).all() and (labels == wanted.target).all()


def test_the_permuted_order_moves_every_image_alike() -> None:
    rows, permuted = (Digits(order=order).train_batch(0, 40, seed=0) for order in ("rows", "permuted"))
    assert rows.inputs.shape == (40, 64, 1) and rows.inputs.min() == -1 and rows.inputs.max() == 1
    assert torch.equal(rows.targets, permuted.targets) and not torch.equal(rows.inputs, permuted.inputs)
    # The same places: columns over images agree as sets, and places that always agree are found again.
    columns = {tuple(column.tolist()) for column in rows.inputs[..., 0].T}
    assert columns == {tuple(column.tolist()) for column in permuted.inputs[..., 0].T}
    assert rows.mask.sum(1).eq(1).all() and rows.mask[:, -1].all()


def test_lines_are_the_rows_of_the_image() -> None:
    rows, lines = (Digits(order=order).train_batch(0, 40, seed=0) for order in ("rows", "lines"))
    assert lines.inputs.shape == (40, 8, 8) and lines.mask.sum(1).eq(1).all() and lines.mask[:, -1].all()
    assert torch.equal(lines.inputs.flatten(1), rows.inputs.flatten(1))
    assert torch.equal(lines.targets[:, -1], rows.targets[:, -1]) and Digits(order="lines").vocab_size == 8


def test_every_image_once_before_any_again() -> None:
    task = Digits()
    epoch = torch.cat([task.train_batch(step, 479, seed=3).inputs[..., 0] for step in range(3)])
    tests = torch.cat([batch.inputs[..., 0] for batch in task.test_batches()])
    assert len(epoch) == 1437 and len(tests) == 360
    everything = torch.cat([epoch, tests])
    wanted = torch.from_numpy(read_digits()[0] / 8 - 1).float()
    assert torch.equal(everything[_order(everything)], wanted[_order(wanted)])


def _order(images: torch.Tensor) -> torch.Tensor:
    rows = images.tolist()
    return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))


def test_a_batch_may_lie_in_two_epochs() -> None:
    task = Digits()
    whole = torch.cat([task.train_batch(step, 100, seed=1).targets[:, -1] for step in range(20)])
    parts = torch.cat([task.train_batch(step, 250, seed=1).targets[:, -1] for step in range(8)])
    assert torch.equal(whole, parts)


def test_baselines_do_not_depend_on_the_order() -> None:
    rows, permuted = (Digits(order=order).baselines() for order in ("rows", "permuted"))
    assert rows == pytest.approx(permuted)
    assert rows["nearest image"] > 0.96 and 0.9 < rows["linear map of the pixels"] < rows["nearest image"]
    assert rows["most frequent answer"] < 0.2


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="rows, permuted"):
        Digits(order="columns")
    with pytest.raises(ConfigurationError, match="test_size"):
        Digits(test_size=0)
    read_digits.cache_clear()
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits().train_batch(0, 1, seed=0)
