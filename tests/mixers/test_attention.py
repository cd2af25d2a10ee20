"""The attention mixer: options, positions, its growing state, an independent implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ostinato
from ostinato.errors import ConfigurationError, StateError
from ostinato.mixers.attention import Attention

OPTIONS = [
    {},
    {"window": 5},
    {"window": 1},
    {"key_value_heads": 2, "qk_norm": True},
    {"rope": False},
    {"heads": 1, "key_value_heads": 1, "window": 3, "base": 100.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_law_for_every_option(options: dict) -> None:
    mixer = ostinato.mixer("attention", 16, **options).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    reset = torch.rand(2, 12) < 0.2
    whole, last = mixer(x, reset=reset)
    first, state = mixer(x[:, :5], reset=reset[:, :5])
    second, state = mixer(x[:, 5:], state, reset=reset[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=0)
    state, outputs = mixer.initial_state(2), []
    plain, _ = mixer(x)
    for t in range(12):
        output, state = mixer.step(x[:, t], state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, dim=1), plain, atol=1e-12, rtol=0)


def test_equals_torch_multihead_attention() -> None:
    mixer = Attention(16, rope=False)
    peer = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([mixer.to_query.weight, mixer.to_key.weight, mixer.to_value.weight]))
        peer.out_proj.weight.copy_(mixer.to_output.weight)
    x = torch.randn(2, 9, 16)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected, _ = peer(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_equals_llama_attention_with_grouped_heads_and_rotation() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    peer = LlamaAttention(config, layer_idx=0)
    mixer = Attention(32, heads=4, key_value_heads=2)
    with torch.no_grad():
        for own, other in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            getattr(mixer, f"to_{own}").weight.copy_(getattr(peer, f"{other}_proj").weight)
    x = torch.randn(2, 11, 32)
    rotation = LlamaRotaryEmbedding(config)(x, torch.arange(11).unsqueeze(0))
    mask = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = peer(x, position_embeddings=rotation, attention_mask=mask)[0]
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-5, rtol=1e-4)


def test_positions_start_again_at_a_reset() -> None:
    mixer = Attention(16)
    reset = torch.zeros(1, 8, dtype=torch.bool)
    reset[0, 3] = True
    _, state = mixer(torch.randn(1, 8, 16), reset=reset)
    assert state.position.tolist() == [5]
    _, state = mixer(torch.randn(1, 2, 16), state)
    assert state.position.tolist() == [7]


def test_full_attention_grows_and_a_window_does_not() -> None:
    full, window = Attention(16), Attention(16, window=4)
    sizes = []
    for mixer in (full, window):
        state = mixer.initial_state(1)
        for length in (5, 20):
            _, state = mixer(torch.randn(1, length, 16), state)
            sizes.append(ostinato.state.num_bytes(state))
    assert sizes[1] > 4 * sizes[0]
    assert sizes[2] == sizes[3] == ostinato.state.num_bytes(window.initial_state(1))


def test_states_that_do_not_fit() -> None:
    full, window, x = Attention(16), Attention(16, window=4), torch.randn(2, 5, 16)
    _, cache = full(x)
    with pytest.raises(StateError, match="batch size 1"):
        full(x[:1], cache)
    with pytest.raises(StateError, match="wanted"):
        window(x, cache)
    with pytest.raises(StateError, match="wanted"):
        Attention(16, heads=2)(x, cache)
    with pytest.raises(StateError, match="wanted"):
        full(x, cache._replace(valid=cache.valid[:, :2]))
    with pytest.raises(StateError, match="wanted"):
        full(x, ostinato.mixer("min_gru", 16).initial_state(2))


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match="divisible"):
        Attention(18)
    with pytest.raises(ConfigurationError, match="heads=4 is not divisible"):
        Attention(16, key_value_heads=3)
    with pytest.raises(ConfigurationError, match="even"):
        Attention(12, heads=4)
    with pytest.raises(ConfigurationError, match="window"):
        Attention(16, window=0)
    assert Attention(12, heads=4, rope=False)(torch.randn(1, 2, 12))[0].shape == (1, 2, 12)


def test_step_exports() -> None:
    mixer = Attention(16, window=4).eval()

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, x: torch.Tensor, state: object) -> object:
            return self.mixer.step(x, state)

    x, state = torch.randn(1, 16), mixer.initial_state(1)
    exported = torch.export.export(Step(), (x, state)).module()
    torch.testing.assert_close(exported(x, state)[0], mixer.step(x, state)[0])


def test_bfloat16_stays_near_float32() -> None:
    mixer = Attention(32, qk_norm=True)
    x = torch.randn(2, 20, 32)
    exact, _ = mixer(x)
    half, state = mixer.bfloat16()(x.bfloat16())
    assert half.dtype == state.keys.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), exact.flatten(), dim=0) > 0.999
