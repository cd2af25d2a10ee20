"""A cache of fixed capacity: the model's own steps, with nothing that grows."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import ConfigurationError
from ostinato.models.captured import CapturedStep
from ostinato.models.fixed_cache import FixedCacheDecoder
from ostinato.models.language import LanguageModel


def model(plan: str = "attention(heads=4, key_value_heads=2, base=500.0)") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(d_model=32, plan=plan, depth=3).double().eval()


@pytest.mark.parametrize(
    "plan", ["attention(heads=4, key_value_heads=2, base=500.0)", "attention(heads=2, rope=False)"]
)
@torch.no_grad()
def test_its_steps_are_the_models(plan: str) -> None:
    source = model(plan)
    tokens = torch.randint(256, (2, 300), generator=torch.Generator().manual_seed(1))
    together, _ = source(tokens)
    decoder = FixedCacheDecoder(source, 280)
    assert decoder.capacity == 512
    state = decoder.initial_state(2)
    for t in range(tokens.shape[1]):
        logits, state = decoder.step(tokens[:, t], state)
        torch.testing.assert_close(logits, together[:, t], atol=1e-9, rtol=1e-9)
    assert state.filled.tolist() == [300, 300] and state.keys[0].shape[2] == 512


def test_a_full_cache_keeps_its_size() -> None:
    decoder = FixedCacheDecoder(model(), 1)
    state = decoder.initial_state(1)
    for _ in range(258):
        logits, state = decoder.step(torch.zeros(1, dtype=torch.long), state)
    assert logits.isfinite().all() and state.filled.tolist() == [256]


@pytest.mark.parametrize("plan", ["min_gru", "attention(window=4)", "liger"])
def test_other_models_are_refused(plan: str) -> None:
    with pytest.raises(ConfigurationError, match="full attention alone"):
        FixedCacheDecoder(model(plan), 4)
    with pytest.raises(ConfigurationError, match="must be positive"):
        FixedCacheDecoder(model(), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_as_a_cuda_graph() -> None:
    source = model().float().cuda()
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1)).cuda()
    together, _ = source(tokens)
    decoder = FixedCacheDecoder(source, 64)
    step = CapturedStep(decoder, decoder.initial_state())
    for t in range(tokens.shape[1]):
        torch.testing.assert_close(step(tokens[:, t]), together[:, t], atol=1e-4, rtol=1e-4)
