"""What a task is: numbered batches, a loss, scores, and baselines measured on the same test set.

A batch is a pure function of (options, seed, step): any step can be asked for without the ones before it. That
is what lets a resumed run go on along the same curve, several processes share a batch, and a curriculum pick
freely. Data come from `numpy.random.default_rng([purpose, seed, step])`, never from the global generators.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ostinato.errors import ConfigurationError

Metrics = dict[str, float]
Tally = tuple[float, float]
"""The sum of a measure over some cases, and their number: tallies add up over batches."""

_TRAIN, _TEST = 0, 1


class Batch(NamedTuple):
    """What a model reads, and what it is asked."""

    inputs: Int[Tensor, "batch time"] | Float[Tensor, "batch time features"]
    """Token ids; vectors in a task that `reads_vectors`."""
    targets: Int[Tensor, "batch time"]
    """The token to be predicted at each position (anything where `mask` is False)."""
    mask: Bool[Tensor, "batch time"]
    """True where a prediction is scored."""
    reset: Bool[Tensor, "batch time"] | None = None
    """True at the first step of a new sequence; None when no sequence begins in this batch."""
    split: str = ""
    """Test batches may belong to a part of the test set that is also reported alone: "length 256"."""
    begins: Bool[Tensor, "batch time"] | None = None
    """True at the first step of an element, where one element is scored over several steps; None otherwise."""

    def to(self, device: Any) -> Batch:
        """The same batch on another device; to a GPU without waiting for what it is doing."""
        if torch.device(device).type != "cuda":
            return self.each(lambda tensor: tensor.to(device))
        host = self.each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)
        return host.each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences."""
        return self.each(lambda tensor: tensor[start:stop])

    def steps(self, start: int, stop: int) -> Batch:
        """Some of the time steps."""
        return self.each(lambda tensor: tensor[:, start:stop])

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        reset = None if self.reset is None else change(self.reset)
        begins = None if self.begins is None else change(self.begins)
        return Batch(change(self.inputs), change(self.targets), change(self.mask), reset, self.split, begins)


@dataclass
class Task(ABC):
    """A supply of batches with a metric, baselines and a seed.

    Subclasses are dataclasses: their fields are their options. They set the class attributes, and define
    `vocab_size`, `train_batch` and `test_batches`.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    """The key of the score that stands for the task."""
    higher_is_better: ClassVar[bool] = True
    carries_state: ClassVar[bool] = False
    """Whether each batch goes on where the one before it ended, row by row."""
    reads_vectors: ClassVar[bool] = False
    """Whether inputs are vectors, `vocab_size` wide, instead of token ids."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many different tokens there are: ids are 0 … vocab_size − 1."""

    @property
    def num_classes(self) -> int:
        """How many outputs a model needs. Answers are written in the vocabulary of the inputs."""
        return self.vocab_size

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing uniformly among the possible answers."""

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The training batch of one step."""

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """The test set, always the same."""

    def train_batches(self, batch_size: int = 32, seed: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The training batches from a step on, without end."""
        step = start_step
        while True:
            yield self.train_batch(step, batch_size, seed)
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.train_batches()

    def loss(self, logits: Float[Tensor, "batch time classes"], batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, over the scored positions; computed in float32 or better."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = batch.targets.masked_fill(~batch.mask, -100)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def score(self, logits: Float[Tensor, "batch time classes"], batch: Batch) -> dict[str, Tally]:
        """Tallies of one batch, by name; the mean over the test set is their summed totals over their counts.

        - `accuracy`: scored positions whose most likely token is right;
        - `scaled_accuracy`: (accuracy − chance) / (1 − chance), zero for guessing (arXiv 2411.12537, appendix);
        - `sequence_accuracy`: sequences with every scored position right;
        - `loss`: cross-entropy in nats.
        """
        right = (logits.argmax(-1) == batch.targets) & batch.mask
        count = float(batch.mask.sum())
        total = float(right.sum())
        asked = batch.mask.any(1)
        whole = ((right | ~batch.mask).all(1) & asked).sum()
        return {
            "accuracy": (total, count),
            "scaled_accuracy": ((total - count * self.chance) / (1 - self.chance), count),
            "sequence_accuracy": (float(whole), float(asked.sum())),
            "loss": (self.loss(logits, batch).item() * count, count),
        }

    def baselines(self) -> Metrics:
        """What simple methods score on the test set, in the task's metric; measured, not quoted.

        Here: always giving the most frequent answer of the test set (the best of all constant answers).
        """
        counts = torch.zeros(self.vocab_size, dtype=torch.long)
        batches = list(self.test_batches())
        for batch in batches:
            counts += torch.bincount(batch.targets[batch.mask], minlength=self.vocab_size)
        constant = functional.one_hot(counts.argmax(), self.vocab_size).float()
        total, count = 0.0, 0.0
        for batch in batches:
            more, cases = self.score(constant.expand(*batch.targets.shape, -1), batch)[self.metric]
            total, count = total + more, count + cases
        return {"most frequent answer": total / count}

    def options(self) -> dict[str, Any]:
        """The options as JSON-ready values: `ostinato.task(task.name, **task.options())` is the same task."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """A short digest of everything that decides the batches: a resumed run must find the same one."""
        content = json.dumps([self.name, self.options()], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class GeneratedTask(Task):
    """A task whose sequences are drawn by an exact generator: subclasses define `generate`."""

    seed: int = 0
    """Seed of the test set; training draws from its own streams."""
    test_size: int = 256
    """Test sequences of each length."""

    @property
    @abstractmethod
    def test_lengths(self) -> tuple[int, ...]:
        """The lengths at which the task is tested, each a split of its own."""

    @abstractmethod
    def generate(self, rng: np.random.Generator, rows: int, length: int | None = None) -> Batch:
        """`rows` random sequences: of training lengths, or all of one `length` (then for a test)."""

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The training batch of one step."""
        return self.generate(np.random.default_rng([_TRAIN, seed, step]), batch_size)

    def test_batches(self) -> Iterator[Batch]:
        """`test_size` sequences of each test length, in batches of at most 64."""
        for length in self.test_lengths:
            rng = np.random.default_rng([_TEST, self.seed, length])
            for start in range(0, self.test_size, 64):
                rows = min(64, self.test_size - start)
                yield self.generate(rng, rows, length)._replace(split=f"length {length}")


def as_batch(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Batch:
    """A batch of NumPy arrays."""
    return Batch(
        torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(mask, dtype=np.bool_)),
    )


def require(condition: bool, message: str) -> None:
    """Raise `ConfigurationError` with the message unless the condition holds."""
    if not condition:
        raise ConfigurationError(message)
