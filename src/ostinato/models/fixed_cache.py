"""Full attention with a cache of fixed capacity, allocated beforehand: the usual way to decode with a Transformer.

A `LanguageModel`'s own state grows by one entry a step, and every step copies it. Here keys and values are written in
place, shapes never change, and a step can be a CUDA graph:

    decoder = FixedCacheDecoder(model, capacity=4096)
    step = CapturedStep(decoder, decoder.initial_state())
    logits = step(token)

Each step looks at the whole capacity, with what is not filled masked: its time is that of a full cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError
from ostinato.mixers.attention import Attention
from ostinato.models.language import LanguageModel

_SPLIT = 256


class FixedCache(NamedTuple):
    """Keys and values, first layer first, and how many entries are filled."""

    keys: tuple[Float[Tensor, "batch kv_heads capacity head_dim"], ...]
    values: tuple[Float[Tensor, "batch kv_heads capacity head_dim"], ...]
    filled: Int[Tensor, " batch"]


class FixedCacheDecoder(nn.Module):
    """The model's step over a `FixedCache`; it shares the model's parameters.

    Args:
        model: a language model whose every mixer is full attention.
        capacity: entries of the cache, rounded up to a multiple of 256.

    Raises `ConfigurationError` for a model with another mixer.
    """

    def __init__(self, model: LanguageModel, capacity: int) -> None:
        super().__init__()
        for mixer in model.backbone.mixers:
            if type(mixer) is not Attention or mixer.window is not None:
                raise ConfigurationError(
                    f"a fixed cache serves models of full attention alone, not the plan {model.config['plan']!r}"
                )
        if capacity < 1:
            raise ConfigurationError(f"the capacity of a cache must be positive, got {capacity}")
        self.model = model
        self.capacity = -(-capacity // _SPLIT) * _SPLIT

    def initial_state(self, batch_size: int = 1) -> FixedCache:
        """An empty cache, in the type of the parameters."""
        zeros = self.model.embedding.weight.new_zeros
        mixers: list[Any] = self.model.backbone.mixers
        shapes = [(batch_size, mixer.key_value_heads, self.capacity, mixer.head_dim) for mixer in mixers]
        keys, values = (tuple(zeros(shape) for shape in shapes) for _ in range(2))
        return FixedCache(keys, values, zeros(batch_size, dtype=torch.long))

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " batch"], state: FixedCache) -> tuple[Float[Tensor, "batch vocab"], FixedCache]:
        """The logits after one more token a row. The cache is changed in place; a full one overwrites its last entry.

        Without gradients. The softmax is in float32 for half precision, the products are in its own type.
        """
        model = self.model
        x = model.embedding(tokens.unsqueeze(1))
        place = state.filled.clamp(max=self.capacity - 1)
        visible = torch.arange(self.capacity, device=x.device) <= place.unsqueeze(1)
        blocks: list[Any] = list(model.backbone.blocks)
        for layer, block in enumerate(blocks):
            mixed = self._attend(block.mixer, block.norm(x), layer, state, place, visible)
            if block.channel_mixer is None:
                x = x + mixed
            else:
                x, normed = block.channel_norm.behind_sum(x, mixed)
                x = x + block.channel_mixer(normed)
        x = model.backbone.norm(x).squeeze(1)
        logits = torch.nn.functional.linear(x, model.embedding.weight) if model.head is None else model.head(x)
        state.filled.add_(1).clamp_(max=self.capacity)
        return logits, state

    def _attend(
        self, mixer: Attention, x: Tensor, layer: int, state: FixedCache, place: Tensor, visible: Tensor
    ) -> Tensor:
        all_keys, all_values = state.keys[layer], state.values[layer]
        queries, keys, values = mixer.project(x)
        queries, keys, _ = mixer.place(queries, keys, state.filled, None)
        rows = torch.arange(len(place), device=x.device)
        all_keys[rows, :, place] = keys[:, 0]
        all_values[rows, :, place] = values[:, 0]
        # The heads that share a head of keys are rows of one product: nothing is repeated.
        grouped = queries[:, 0].unflatten(1, (mixer.key_value_heads, -1))
        scores = (grouped * mixer.head_dim**-0.5) @ all_keys.transpose(-1, -2)
        scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).to(x.dtype)
        # One long sum over the capacity would keep a few cores of a GPU busy: it is cut, and the parts are summed.
        cut = all_values.unflatten(2, (-1, _SPLIT))
        parts = weights.unflatten(-1, (-1, _SPLIT)).transpose(-2, -3) @ cut
        return mixer.to_output(parts.sum(2).flatten(1).unsqueeze(1))
