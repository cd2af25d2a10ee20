"""Generation: choosing the next token, and the stream of text that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ostinato.errors import ConfigurationError, NonFiniteError

if TYPE_CHECKING:
    from ostinato.models.language import LanguageModel


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `ConfigurationError` unless temperature ≥ 0, top_k ≥ 1 and 0 < top_p ≤ 1."""
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigurationError(f"top_k must be at least 1 (None keeps all), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p is a probability in (0, 1] (None keeps all), got {top_p}")


def token_probabilities(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "batch vocab"]:
    """softmax(logits / temperature), cut to the `top_k` likeliest tokens and then to the nucleus `top_p`.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to at least `top_p`
    (Holtzman et al. 2020, arXiv 1904.09751, section 3.1). Temperature 0 is all mass on the likeliest token,
    the first of equals. In float32 at least.

    Raises:
        ConfigurationError: an argument is out of range.
        NonFiniteError: the logits hold NaN: the model has diverged.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.isnan().any():
        raise NonFiniteError("the model's logits hold NaN, so no token can be chosen; look at its training")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.zeros_like(wide).scatter(-1, wide.argmax(-1, keepdim=True), 1.0)
    # The largest logit is taken off first, so that a tiny temperature cannot overflow.
    scaled = (wide - wide.amax(-1, keepdim=True)) / temperature
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        # A token stays if those before it have not reached top_p yet: the first always does.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def sample(
    logits: Float[Tensor, "batch vocab"], generator: torch.Generator | None = None, **sampling: Any
) -> Int[Tensor, " batch"]:
    """One token a row, drawn from `token_probabilities(logits, **sampling)`.

    Drawn on the CPU, so that a seed gives the same tokens on every device (as far as the logits agree).
    """
    return torch.multinomial(token_probabilities(logits.cpu(), **sampling), 1, generator=generator).squeeze(-1)


class TextStream:
    """Text from a language model, piece by piece: iterate over it; made by `LanguageModel.stream`.

    A piece is never half a character: bytes of an incomplete one are held back (and dropped if the stream ends
    there). Between any two pieces, `state` is the model's state after all of `tokens`, so that
    `model.stream(state=stream.state)` goes on from there; `text` is all text so far. Iterating again
    goes on where the last loop broke off; a finished stream yields nothing more.
    """

    def __init__(
        self,
        model: LanguageModel,
        logits: Float[Tensor, "1 vocab"],
        state: Any,
        *,
        max_tokens: int | None,
        stop: Sequence[str],
        generator: torch.Generator | None,
        sampling: dict[str, Any],
    ) -> None:
        self.state = state
        self.text = ""
        self.tokens: list[int] = []
        self._model, self._logits = model, logits
        self._max_tokens, self._stop = max_tokens, tuple(stop)
        self._generator, self._sampling = generator, sampling
        self._decoder = model.tokenizer.decoder()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def read(self) -> str:
        """Run to the end and return all the text."""
        for _ in self:
            pass
        return self.text

    def _run(self) -> Iterator[str]:
        waiting = ""
        while self._max_tokens is None or len(self.tokens) < self._max_tokens:
            token = sample(self._logits, self._generator, **self._sampling)
            if int(token) == self._model.tokenizer.end:
                break
            self._logits, self.state = self._model.advance(token, self.state)
            self.tokens.append(int(token))
            waiting += self._decoder.feed(int(token))
            found = [place for place in (waiting.find(stop) for stop in self._stop) if place >= 0]
            held = len(waiting) - min(found) if found else self._held_back(waiting)
            piece, waiting = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
            if piece:
                self.text += piece
                yield piece
            if found:
                return
        if waiting:
            self.text += waiting
            yield waiting

    def _held_back(self, waiting: str) -> int:
        """How many last characters may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(longest - 1, len(waiting)), 0, -1):
            if any(stop.startswith(waiting[-size:]) for stop in self._stop):
                return size
        return 0
