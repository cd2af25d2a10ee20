"""Just read twice: prompts that are repeated, for any model; and models that read a prompt as a whole.

    P = D ‖ Q                     the prompt as it is
    P = Q' ‖ D ‖ D ‖ Q            read twice, told beforehand what will be asked

Source: Just read twice (arXiv 2407.05483), sections 3.2 (JRT-Prompt) and 4.2 (prompts shorter than the prefix).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.models.token_classifier import TokenClassifier

FILLS = ("left_pad", "repeat")


def jrt_prompt(context: str, question: str, intro: str | None = None, repeats: int = 2, separator: str = "\n") -> str:
    """[intro +] context, `repeats` times, + question: a prompt for `LanguageModel.read` or `stream`, of any model.

    Args:
        context: D, the document.
        question: Q, what the model goes on from.
        intro: Q', a plain statement of the question ("Information about <key>."); the released prompts have one.
        repeats: how often the document is read; 1 is the ordinary prompt.
        separator: between the parts.

    Raises `ConfigurationError` for repeats below 1.
    """
    if repeats < 1:
        raise ConfigurationError(f"a prompt is read at least once, got repeats {repeats}")
    parts = [] if intro is None else [intro]
    return separator.join([*parts, *[context] * repeats, question])


def fill_prefix(
    tokens: Int[Tensor, "batch time"], length: int, mode: str = "left_pad", pad: int = 32
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """A prompt that is shorter than the prefix that a model was trained on, made as long; and which tokens to keep.

    Args:
        tokens: the prompt.
        length: of the prefix in training.
        mode: "left_pad" puts `pad` before it, which the mask leaves out; "repeat" reads the prompt again and again, its
            beginning cut off so that it ends where it ends.
        pad: the token that is put; 32 is a space in bytes.

    Returns:
        The tokens, and `keep` for `PrefixLinearAttention`. (A third way, to read the prompt anew with every token that
        is said, needs no filling.)

    Raises `ConfigurationError` for a prompt longer than the prefix, or an unknown mode.
    """
    batch, time = tokens.shape
    if mode not in FILLS:
        raise ConfigurationError(f"mode is one of {', '.join(FILLS)}, got {mode!r}")
    if time > length:
        raise ConfigurationError(f"the prompt has {time} tokens, the prefix {length}: there is nothing to fill")
    missing = length - time
    keep = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if mode == "repeat":
        return tokens.repeat(1, -(-length // time))[:, -length:], keep
    keep[:, :missing] = False
    return torch.cat([tokens.new_full((batch, missing), pad), tokens], dim=1), keep


class PromptClassifier(TokenClassifier):
    """A token classifier that knows its prompt by its tokens: from `start` on, up to (and without) `ask`.

    What stands before `start` is padding, and is not written. With `whole` false it reads the prompt as a recurrence
    does, and the layers are the same.

    Args:
        start, ask: token ids.
        whole: whether the prompt is the prefix of `PrefixLinearAttention`.
        arguments: of `TokenClassifier`.
    """

    def __init__(self, *arguments: Any, start: int, ask: int, whole: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.start, self.ask, self.whole = start, ask, whole

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: Any = None,
        *,
        reset: Bool[Tensor, "batch time"] | None = None,
        **context: Any,
    ) -> tuple[Float[Tensor, "batch time classes"], tuple[Any, ...]]:
        """As a token classifier's; `keep` and `prefix` come from the tokens."""
        keep = (tokens == self.start).cumsum(1) > 0
        if self.whole:
            context = {**context, "prefix": keep & ((tokens == self.ask).cumsum(1) == 0)}
        return super().forward(tokens, state, reset=reset, keep=keep, **context)
