"""Handwritten digits: an image of 8 × 8 as a sequence of 64 numbers, or of 8 lines; which digit was it?

The 1797 images are those that scikit-learn carries (test part of the UCI set of Alpaydin and Kaynak). Their file is
read where the package keeps it; the package itself is not imported.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ostinato.errors import DataError
from ostinato.tasks.base import _TRAIN, Batch, Metrics, Task, require

ORDERS = ("rows", "permuted", "lines")


@functools.cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 64) pixels of 0 … 16, row after row, and (1797,) digits.

    Raises `DataError` if scikit-learn is not installed.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if path is None or not path.is_file():
        raise DataError("the digits are scikit-learn's: pip install scikit-learn")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


@dataclass(kw_only=True)
class Digits(Task):
    """One pixel (or line) a step, scaled to [−1, 1]; only the last step is scored. No token ids: it `reads_vectors`.

    In the order "permuted", one fixed permutation of the 64 places is applied to every image, so that neighbours in
    the image lie far apart. In the order "lines" a step is a whole row of the image, a vector of 8. Training goes
    through the shuffled images again and again.

    Source: sequential and permuted MNIST (arXiv 1504.00941), on smaller images.
    """

    name: ClassVar[str] = "digits"
    reads_vectors: ClassVar[bool] = True

    order: str = "rows"
    """"rows" (pixel by pixel, row after row), "permuted" (pixel by pixel) or "lines" (a row at a time)."""
    seed: int = 0
    """Seed of the split and of the permutation."""
    test_size: int = 360
    """Images held out."""

    def __post_init__(self) -> None:
        require(self.order in ORDERS, f"order is one of {', '.join(ORDERS)}, got {self.order!r}")
        require(1 <= self.test_size <= 1500, f"test_size must lie in 1 … 1500, got {self.test_size}")

    @property
    def vocab_size(self) -> int:
        """The width of a step: 1, or the 8 pixels of a line."""
        return 8 if self.order == "lines" else 1

    @property
    def num_classes(self) -> int:
        """10."""
        return 10

    @property
    def chance(self) -> float:
        """1 / 10."""
        return 0.1

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The next images of the shuffled ones: each once before any comes again."""
        pixels, digits = self._images()
        count = len(digits) - self.test_size
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        index = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(places // count):
            shuffled = np.random.default_rng([_TRAIN, seed, epoch]).permutation(count)
            here = places // count == epoch
            index[here] = shuffled[places[here] % count]
        return _batch(pixels[index], digits[index], self.vocab_size)

    def test_batches(self) -> Iterator[Batch]:
        """The images held out, in batches of at most 120."""
        pixels, digits = self._images()
        first = len(digits) - self.test_size
        for start in range(first, len(digits), 120):
            yield _batch(pixels[start : start + 120], digits[start : start + 120], self.vocab_size)

    def baselines(self) -> Metrics:
        """Beside the constant answer: the digit of the nearest training image, and a linear map of the pixels (ridge).

        Both see the whole image at once; the order of pixels is nothing to them.
        """
        pixels, digits = self._images()
        split = len(digits) - self.test_size
        known, asked = pixels[:split], pixels[split:]
        distance = (known**2).sum(1) - 2 * asked @ known.T
        known = np.concatenate([known, np.ones((split, 1))], 1)
        asked = np.concatenate([asked, np.ones((self.test_size, 1))], 1)
        weights = np.linalg.solve(known.T @ known + np.eye(known.shape[1]), known.T @ np.eye(10)[digits[:split]])
        answers = {
            "most frequent answer": np.full(self.test_size, np.bincount(digits[split:]).argmax()),
            "nearest image": digits[:split][distance.argmin(1)],
            "linear map of the pixels": (asked @ weights).argmax(1),
        }
        return {name: float((answer == digits[split:]).mean()) for name, answer in answers.items()}

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """All images, those held out last, in the order asked for."""
        pixels, digits = read_digits()
        rng = np.random.default_rng(self.seed)
        shuffled, places = rng.permutation(len(digits)), rng.permutation(pixels.shape[1])
        pixels = pixels[shuffled] / 8 - 1
        return (pixels[:, places] if self.order == "permuted" else pixels), digits[shuffled]


def _batch(pixels: np.ndarray, digits: np.ndarray, width: int) -> Batch:
    inputs = torch.from_numpy(pixels.astype(np.float32)).unflatten(1, (-1, width))
    targets = torch.zeros(inputs.shape[:2], dtype=torch.long)
    targets[:, -1] = torch.from_numpy(digits)
    mask = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    mask[:, -1] = True
    return Batch(inputs, targets, mask)
