"""Prompts read twice, prompts made as long as the prefix, and models that find their prompt in the tokens."""

from __future__ import annotations

import pytest
import torch

import ostinato
from ostinato.errors import ConfigurationError
from ostinato.models.jrt import PromptClassifier, fill_prefix, jrt_prompt
from ostinato.models.token_classifier import TokenClassifier


def test_a_prompt_is_read_twice() -> None:
    assert jrt_prompt("D", "Q") == "D\nD\nQ"
    assert jrt_prompt("D", "Q", "Q'", repeats=3, separator=" ") == "Q' D D D Q"
    assert jrt_prompt("D", "Q", repeats=1) == "D\nQ"
    with pytest.raises(ConfigurationError, match="at least once"):
        jrt_prompt("D", "Q", repeats=0)
    model = ostinato.LanguageModel(d_model=16, plan="gla", depth=1)
    state = model.read(jrt_prompt("a b", "a", "about a"))
    assert ostinato.state.batch_size(state) == 1


def test_short_prompts_are_filled() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    padded, keep = fill_prefix(tokens, 5)
    assert padded.tolist() == [[32, 32, 1, 2, 3]] and keep.tolist() == [[False, False, True, True, True]]
    again, keep = fill_prefix(tokens, 8, "repeat")
    assert again.tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]] and keep.all()
    with pytest.raises(ConfigurationError, match="nothing to fill"):
        fill_prefix(tokens, 2)
    with pytest.raises(ConfigurationError, match="mode is one of"):
        fill_prefix(tokens, 5, "right_pad")


def test_the_prompt_is_found_in_the_tokens() -> None:
    plan = "prefix_linear_attention(heads=2, feature_dim=2)"
    model = PromptClassifier(10, 8, plan, start=1, ask=3).double()
    tokens = torch.tensor([[1, 5, 6, 2, 7, 3]])
    prefix = torch.tensor([[True, True, True, True, True, False]])
    wanted, _ = TokenClassifier.forward(model, tokens, prefix=prefix)
    assert torch.allclose(model(tokens)[0], wanted)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    assert torch.allclose(model(padded)[0][:, 3:], wanted)
    model.whole = False
    assert torch.allclose(model(tokens)[0], TokenClassifier.forward(model, tokens)[0])
    assert not torch.allclose(model(tokens)[0], wanted)
