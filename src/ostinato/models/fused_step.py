"""A model's step in few launches: what stands between two matrix products is done by the products' own kernels.

    step = fused_step(model)
    logits, state = step(token, state)      # the state is changed in place

A layer of a delta-rule mixer and a SwiGLU is five launches: norm, projections and short convolution; the memory's step
with its gates; gated norm, output map and sum; norm and SwiGLU's inner half; its output map and sum. Of other mixers
with a matrix memory per head the last three are known; what is not known here (another mixer, an adapted map, a
module with hooks) computes as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ostinato.state
from ostinato.layers.rms_norm import RMSNorm
from ostinato.layers.swiglu import SwiGLU
from ostinato.mixers.base import Mixer
from ostinato.mixers.delta_net import DeltaNet, DeltaRuleMixer
from ostinato.mixers.delta_product import DeltaProduct, GatedDeltaProduct
from ostinato.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaRuleMixer
from ostinato.mixers.heads import KeyValueMixer, MatrixState
from ostinato.mixers.parts import GatedNorm
from ostinato.models.backbone import Backbone, Block
from ostinato.models.language import LanguageModel, LanguageState
from ostinato.ops.chained import chained
from ostinato.ops.delta_rule import delta_rule
from ostinato.ops.delta_step import delta_step
from ostinato.ops.linear_step import Window, linear_step, projections_step, swiglu_step

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def fused_step(model: nn.Module) -> Step:
    """`model.step` with as few launches as are known, for generation.

    Args:
        model: a language model or a backbone; of any other module it is the module's own `step`. It is looked at when
            the step is made: what is replaced or adapted later is not seen, new values of parameters are.

    Returns a function of the input of one step and the state, which returns the output and the state. Where a layer is
    known the state given is changed in place and returned; where it is not, its state is a new one. Without gradients
    and without dropout; the state's layout, and the results up to rounding, are those of `step`.
    """
    if type(model) is LanguageModel and _unwatched(model.embedding, model.backbone, model.backbone.norm, model.head):
        return _generating(_language_step(model))
    if type(model) is Backbone and _unwatched(model.norm):
        layers = _layers(model)

        def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            x, state = layers(x, state, {})
            return model.norm(x), state

        return _generating(step)
    return model.step  # type: ignore[return-value]


def _generating(step: Step) -> Step:
    """Without gradients, each launch started before the one before it is done: no layer writes the next one's state."""

    def generating(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        with torch.no_grad(), chained():
            return step(x, state)

    return generating


def _language_step(model: LanguageModel) -> Step:
    layers = _layers(model.backbone)
    norm = model.backbone.norm
    plain_head = model.head is None or _plain(model.head)

    def step(tokens: Tensor, state: LanguageState) -> tuple[Tensor, LanguageState]:
        x, after = layers(model.embedding(tokens), state.layers, {"tokens": tokens.unsqueeze(1)})
        if plain_head:
            weight = model.embedding.weight if model.head is None else model.head.weight
            logits = linear_step(x, weight, norm=norm.weight, eps=_eps(norm), entered=state.output)
            return logits, LanguageState(after, state.output)
        output = norm(x)
        return model._logits(output), LanguageState(after, output)

    return step


def _layers(backbone: Backbone) -> Callable[[Tensor, Any, dict[str, Any]], tuple[Tensor, Any]]:
    blocks = [_layer(block) for block in backbone.blocks]  # type: ignore[arg-type]

    def layers(x: Tensor, states: Any, context: dict[str, Any]) -> tuple[Tensor, Any]:
        after = []
        for block, state in zip(blocks, states, strict=True):
            x, state = block(x, state, context)
            after.append(state)
        return x, tuple(after)

    return layers


def _layer(block: Block) -> Callable[[Tensor, Any, dict[str, Any]], tuple[Tensor, Any]]:
    """The two halves of a block, each by its fused step where it is known."""
    mixer, channels = block.mixer, block.channel_mixer
    known_delta, known_reading, known_channels = _known_delta(block), _known_reading(block), _known_channels(block)

    def as_ever(x: Tensor, state: Any, context: dict[str, Any]) -> tuple[Tensor, Any]:
        y, state = block(x.unsqueeze(1), state, None, context)
        return y.squeeze(1), state

    known = known_delta or known_reading or known_channels
    if not known or not _unwatched(block, block.norm, block.channel_norm):
        return as_ever

    def layer(x: Tensor, state: Any, context: dict[str, Any]) -> tuple[Tensor, Any]:
        if known_delta:
            x, state = _delta_layer(mixer, x, block.norm, state)  # type: ignore[arg-type]
        elif known_reading:
            x, state = _reading_layer(mixer, x, block.norm, state)  # type: ignore[arg-type]
        else:
            mixed, state = block.mix(x.unsqueeze(1), state, None, context)
            x = x + mixed.squeeze(1)
        if known_channels:
            x = _swiglu_layer(channels, x, block.channel_norm)  # type: ignore[arg-type]
        elif channels is not None and block.channel_norm is not None:
            x = x + channels(block.channel_norm(x.unsqueeze(1))).squeeze(1)
        return x, state

    return layer


# ------------------------------------------------------------------------------------------------------
# What is known.

_DELTA: tuple[type[Mixer], ...] = (DeltaNet, GatedDeltaNet, DeltaProduct, GatedDeltaProduct)


def _unwatched(*modules: nn.Module | None) -> bool:
    """Whether nobody wants to see what goes through these modules, or changes it."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules if m is not None)


def _plain(*maps: nn.Module) -> bool:
    """Whether each of these is a matrix and nothing more."""
    return all(type(each) is nn.Linear and each.bias is None for each in maps) and _unwatched(*maps)


def _eps(norm: nn.RMSNorm) -> float:
    """Of torch's module, whose None is the type's own."""
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


def _known_reading(block: Block) -> bool:
    """Whether `_reading_layer` is what this block's mixer does."""
    mixer = block.mixer
    if not isinstance(mixer, KeyValueMixer) or mixer.needs or mixer.takes:
        return False
    steps = "mix", "forward", "read_out"
    if any(name in vars(mixer) or getattr(type(mixer), name) is not getattr(KeyValueMixer, name) for name in steps):
        return False  # the class, or this one, has its own way
    return (
        type(block.norm) is RMSNorm
        and type(mixer.norm) is GatedNorm
        and _plain(mixer.to_output)
        and _unwatched(mixer, mixer.norm, mixer.norm.norm)
    )


def _known_delta(block: Block) -> bool:
    """Whether `_delta_layer` is what this block's mixer does."""
    mixer = block.mixer
    if type(mixer) not in _DELTA or not isinstance(mixer, DeltaRuleMixer) or not _known_reading(block):
        return False
    project = mixer.project
    maps = [project.to_queries, project.to_keys, project.to_values, mixer.to_beta]
    maps += [each for each in (mixer.to_gate, getattr(mixer, "to_steps", None)) if each is not None]
    return (
        _plain(*maps)
        and _unwatched(*mixer.modules())
        and mixer.scan is delta_rule
        and (mixer.qk_activation, mixer.qk_norm) == ("silu", "l2")
    )


def _known_channels(block: Block) -> bool:
    """Whether `_swiglu_layer` is what this block's channel mixer does."""
    channels = block.channel_mixer
    return (
        type(channels) is SwiGLU
        and type(block.channel_norm) is RMSNorm
        and _plain(channels.to_gate, channels.to_value, channels.to_output)
        and _unwatched(channels)
    )


# ------------------------------------------------------------------------------------------------------
# The steps.


def _delta_layer(mixer: DeltaRuleMixer, x: Tensor, norm: RMSNorm, state: MatrixState) -> tuple[Tensor, MatrixState]:
    """x + mixer(norm(x)) in three launches; the state in place."""
    project, heads, writes = mixer.project, mixer.heads, mixer.writes
    # The narrow maps last: what comes before them stays aligned.
    maps: list[Any] = [project.to_queries, project.to_keys, project.to_values]
    maps += [mixer.to_gate] if mixer.to_gate is not None else []
    maps += [mixer.to_beta]
    maps += [mixer.to_steps] if isinstance(mixer, GatedDeltaRuleMixer) else []
    window = None
    if project.convolution is not None and state.window is not None:
        window = Window(project.convolution.weight, project.convolution.bias, state.window)
    queries, keys, values, *others = projections_step(
        x,
        [each.weight for each in maps],
        norm=norm.weight,
        eps=_eps(norm),
        convolution=window,
        silu=[place < 3 for place in range(len(maps))],
    )
    gate = others.pop(0) if mixer.to_gate is not None else None
    steps, log_rate, step_bias = None, None, None
    if isinstance(mixer, GatedDeltaRuleMixer):
        steps, log_rate, step_bias = others[1], mixer.log_rate, mixer.step_bias
    outputs = delta_step(
        queries.unflatten(1, (heads, -1)),
        keys.unflatten(1, (writes, heads, -1)),
        values.unflatten(1, (writes, heads, -1)),
        others[0].unflatten(1, (writes, heads)),
        steps,
        log_rate,
        step_bias,
        state.memory,
        largest_rate=2.0 if mixer.negative_eigenvalues else 1.0,
        scale=mixer.key_dim**-0.5,
    )
    return _read_out(mixer, outputs, gate, x), state


def _reading_layer(mixer: KeyValueMixer, x: Tensor, norm: RMSNorm, state: Any) -> tuple[Tensor, Any]:
    """x + mixer(norm(x)), from what is read of the memory on in one launch; the state is a new one."""
    normed = norm(x).unsqueeze(1)
    outputs, state = mixer.remember(normed, state, None)
    gate = None if mixer.to_gate is None else mixer.to_gate(normed).squeeze(1)
    return _read_out(mixer, outputs.squeeze(1), gate, x), ostinato.state.compact(state)


def _read_out(mixer: KeyValueMixer, outputs: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
    """x + W_o [RMSNorm(o) ⊙ act(gate)]."""
    norm: Any = mixer.norm
    return linear_step(
        outputs.flatten(1),
        mixer.to_output.weight,
        norm=norm.norm.weight,
        gate=None if norm.gate is None else gate,
        residual=x,
        eps=norm.eps,
        activation=norm.gate or "silu",
        gate_first=norm.gate_first,
    )


def _swiglu_layer(channels: SwiGLU, x: Tensor, norm: RMSNorm) -> Tensor:
    """x + channels(norm(x)) in two launches."""
    hidden = swiglu_step(x, channels.to_gate.weight, channels.to_value.weight, norm=norm.weight, eps=_eps(norm))
    return linear_step(hidden, channels.to_output.weight, residual=x)
