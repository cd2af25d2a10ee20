"""The language model: an embedding, a backbone, a head; it reads and streams in constant memory.

model = LanguageModel(d_model=256, plan="gated_delta_net*3, attention(window=128)", depth=4)
logits, state = model(tokens)
state = model.read("Call me Ishmael.")
for piece in model.stream(" Some years ago", state=state, temperature=0.8):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import ConfigurationError, DataError, DtypeError, ShapeError, StateError
from ostinato.models import checkpoint
from ostinato.models.backbone import Backbone
from ostinato.models.generation import TextStream, check_sampling
from ostinato.models.plan import Plan
from ostinato.models.tokenizers import get_tokenizer


class LanguageState(NamedTuple):
    """Everything that a language model knows of the text so far."""

    layers: tuple[Any, ...]
    """The mixers' states, first layer first."""
    output: Float[Tensor, "batch d_model"]
    """The backbone's last output: with it a stream can go on from a state alone, without a prompt."""


class LanguageModel(nn.Module):
    """Token ids (batch, time) -> logits (batch, time, vocab) that carries a state.

    Args:
        vocab_size: number of tokens; None takes the tokenizer's (256 for bytes).
        d_model: width.
        plan: which mixers, e.g. "gated_delta_net*3, attention" (see `ostinato.models.plan`).
        depth: number of layers; the plan is repeated and cut to it. None takes the plan once.
        tokenizer: "bytes", or the name or path of a Hugging Face tokenizer.
        tie_embeddings: let the head be the embedding's transpose.
        channel_mixer: "swiglu" or None.
        hidden: the channel mixer's inner width; None takes its own default.
        dropout: probability, on every branch and on the embedding.
        eps: of the norms.

    Embedding and head start at N(0, 1 / d_model), so that the logits of normed outputs start with variance 1 at
    every width; mixers and channel mixers initialise themselves; output projections are scaled by depth (see
    `Backbone`).

    Raises `PlanError`, `UnknownNameError`, `ConfigurationError` for arguments that make no model.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        d_model: int = 256,
        plan: str | Plan = "gated_delta_net*3, attention",
        depth: int | None = 4,
        *,
        tokenizer: str = "bytes",
        tie_embeddings: bool = True,
        channel_mixer: str | None = "swiglu",
        hidden: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.tokenizer = get_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size if vocab_size is None else vocab_size
        if self.vocab_size < self.tokenizer.vocab_size:
            raise ConfigurationError(
                f"vocab_size={vocab_size} is less than the {self.tokenizer.vocab_size} tokens of the tokenizer "
                f"{tokenizer!r}; leave it out to take the tokenizer's"
            )
        self.embedding = nn.Embedding(self.vocab_size, d_model)
        self.backbone = Backbone(
            d_model, plan, depth, channel_mixer=channel_mixer, hidden=hidden, dropout=dropout, eps=eps
        )
        if ahead := sorted({type(mixer).__name__ for mixer in self.backbone.mixers if not mixer.causal}):
            raise ConfigurationError(f"a language model predicts what comes next, and {', '.join(ahead)} would see it")
        self.dropout = nn.Dropout(dropout)
        self.head = None if tie_embeddings else nn.Linear(d_model, self.vocab_size, bias=False)
        self.config: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "d_model": d_model,
            "plan": str(self.backbone.plan),
            "depth": self.backbone.depth,
            "tokenizer": self.tokenizer.name,
            "tie_embeddings": tie_embeddings,
            "channel_mixer": channel_mixer,
            "hidden": hidden,
            "dropout": dropout,
            "eps": eps,
        }
        for projection in (self.embedding, self.head):
            if projection is not None:
                nn.init.normal_(projection.weight, std=d_model**-0.5)

    # ----------------------------------------------------------------------------------------------
    # The map.

    def initial_state(self, batch_size: int = 1) -> LanguageState:
        """The state before the first token."""
        return LanguageState(
            self.backbone.initial_state(batch_size),
            self.embedding.weight.new_zeros(batch_size, self.backbone.d_model),
        )

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: LanguageState | None = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time vocab"], LanguageState]:
        """The logits of the token that follows each, and the state after the last.

        Args:
            tokens: ids, in [0, vocab_size).
            state: where to go on from; None starts anew.
            reset: True marks the first token of a new text: nothing from before it is seen.
            context: what mixers take besides, as `prefix` (see `Backbone.forward`).

        Raises:
            ShapeError, DtypeError: tokens or reset does not fit.
            DataError: a token is not in the vocabulary (on the CPU; a GPU says so in its own way).
            StateError: the state is of another model or batch size.
        """
        hidden, state = self._hidden(tokens, state, reset, **context)
        return self._logits(hidden), state

    def step(
        self, tokens: Int[Tensor, " batch"], state: LanguageState
    ) -> tuple[Float[Tensor, "batch vocab"], LanguageState]:
        """One token a row."""
        logits, state = self(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state

    def _hidden(
        self, tokens: Tensor, state: LanguageState | None, reset: Tensor | None = None, **context: Any
    ) -> tuple[Tensor, LanguageState]:
        if tokens.dtype not in (torch.long, torch.int):
            raise DtypeError(f"tokens must be integers (torch.long), got {tokens.dtype}")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ShapeError(f"tokens must be (batch, time), neither of them empty, got shape {tuple(tokens.shape)}")
        if state is not None and not isinstance(state, LanguageState):
            raise StateError(f"the state of a language model is a LanguageState, got {type(state).__name__}")
        x = self.dropout(self._embedded(tokens))
        y, layers = self.backbone(x, None if state is None else state.layers, reset=reset, tokens=tokens, **context)
        # A copy: a view of the last step would keep the whole sequence in memory.
        return y, LanguageState(layers, y[:, -1].clone())

    def _embedded(self, tokens: Tensor) -> Tensor:
        try:
            return self.embedding(tokens)
        except IndexError as error:  # Asked for beforehand, this would be a pass over the tokens at every step.
            low, high = int(tokens.min()), int(tokens.max())
            raise DataError(f"tokens must be in [0, {self.vocab_size}), got values from {low} to {high}") from error

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    # ----------------------------------------------------------------------------------------------
    # Text.

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device

    def num_parameters(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def advance(
        self, tokens: Int[Tensor, " batch"], state: LanguageState
    ) -> tuple[Float[Tensor, "batch vocab"], LanguageState]:
        """`step` for generation: without gradients, without dropout, tokens from any device."""
        with _evaluating(self):
            return self.step(tokens.to(self.device), state)

    @torch.no_grad()
    def read(
        self, text: str | Iterable[str], state: LanguageState | None = None, *, chunk: int = 1024
    ) -> LanguageState:
        """The state after a text, read in chunks of `chunk` tokens: memory does not grow with the text.

        Args:
            text: a string, or any iterable of strings (an open file, say), each tokenized by itself.
            state: where to go on from; None starts anew with a batch of one. With a larger batch every row
                reads the same text.
            chunk: tokens at a time; the result does not depend on it.

        Without gradients and without dropout. An empty text changes nothing.
        """
        if chunk < 1:
            raise ConfigurationError(f"chunk must be at least 1, got {chunk}")
        state = self.initial_state(1) if state is None else state
        rows = ostinato.state.batch_size(state)
        with _evaluating(self):
            parts = _parts(text, self.tokenizer.divisible)
            for tokens in _chunks((self.tokenizer.encode(part) for part in parts), chunk):
                ids = torch.tensor(tokens, device=self.device).expand(rows, -1)
                _, state = self._hidden(ids, state)
        # A copy: a mixer's state may be a view of the last step of its chunk, and would keep the chunk alive.
        return ostinato.state.clone(state)

    def stream(
        self,
        prompt: str = "",
        *,
        state: LanguageState | None = None,
        max_tokens: int | None = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> TextStream:
        """Go on with a text: an iterable of its pieces, with `.text`, `.tokens` and `.state`.

        Args:
            prompt: read first; not part of the stream's text. With neither prompt nor state the stream starts
                as after a newline (or after the tokenizer's begin token).
            state: where to go on from, of batch size 1 (`ostinato.state.select` takes a row); it is not changed.
            max_tokens: where to end; None never ends.
            temperature: 0 takes the likeliest token, 1 samples from the model, above flattens.
            top_k: sample from this many likeliest tokens only.
            top_p: sample from the likeliest tokens that make up this probability only.
            seed: makes the stream repeatable; None draws from torch's global generator.
            stop: a text, or several, at which to end; it is not part of the stream.

        Raises:
            ConfigurationError: an argument is out of range.
            StateError: the state is of another model, or its batch size is not 1.
        """
        check_sampling(temperature, top_k, top_p)
        if max_tokens is not None and max_tokens < 0:
            raise ConfigurationError(f"max_tokens must not be negative (None never ends), got {max_tokens}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ConfigurationError("an empty stop text would end every stream at once; leave it out")
        if state is not None and ostinato.state.batch_size(state) != 1:
            raise StateError(
                f"a stream goes on from a state of batch size 1, got {ostinato.state.batch_size(state)}; "
                "take one row: ostinato.state.select(state, 0)"
            )
        if state is None and not prompt:
            start = torch.tensor([self.tokenizer.start])
            _, state = self.advance(start, self.initial_state(1))
        state = self.read(prompt, state)
        with torch.no_grad():
            logits = self._logits(state.output)
        return TextStream(
            self,
            logits,
            state,
            max_tokens=max_tokens,
            stop=stops,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        )

    # ----------------------------------------------------------------------------------------------
    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to a folder, atomically: an old checkpoint survives a failure."""
        checkpoint.save(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> LanguageModel:
        """The model that `save_pretrained` wrote, in evaluation mode, in the types it was saved in.

        Raises `CheckpointError` for a folder that holds none of ours, a damaged one, one of a newer version, or
        one whose plan names a mixer that is not registered here.
        """
        return checkpoint.load(folder, cls).to(device).eval()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block runs."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _parts(text: str | Iterable[str], divisible: bool) -> Iterable[str]:
    """The strings to be tokenized one after the other; a long one is cut where the tokenizer allows it."""
    if not isinstance(text, str):
        return text
    size = 1 << 16 if divisible else max(len(text), 1)
    return (text[start : start + size] for start in range(0, len(text), size))


def _chunks(parts: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """Lists of `size` tokens (the last may be shorter) from lists of any length."""
    waiting: list[int] = []
    for part in parts:
        waiting.extend(part)
        whole = len(waiting) - len(waiting) % size
        for start in range(0, whole, size):
            yield waiting[start : start + size]
        waiting = waiting[whole:]
    if waiting:
        yield waiting
