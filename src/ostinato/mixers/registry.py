"""The mixers by name. Adding one to the package is one line in `_BUILT_IN`; from outside, `ostinato.register`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.mixers.base import Mixer

# name -> "module:class", imported when first asked for.
_BUILT_IN = {
    "attention": "attention:Attention",
    "delta_net": "delta_net:DeltaNet",
    "delta_product": "delta_product:DeltaProduct",
    "elman": "elman:ElmanRNN",
    "gated_delta_net": "gated_delta_net:GatedDeltaNet",
    "gated_delta_product": "delta_product:GatedDeltaProduct",
    "gated_slot_attention": "gated_slot_attention:GatedSlotAttention",
    "gated_convolution": "gated_convolution:GatedConvolution",
    "gla": "gla:GLA",
    "gru": "gru:GRU",
    "hgrn2": "hgrn2:HGRN2",
    "kimi_delta_attention": "kimi_delta_attention:KimiDeltaAttention",
    "liger": "liger:Liger",
    "lightnet": "lightnet:LightNet",
    "linear_attention": "linear_attention:LinearAttention",
    "lolcats": "lolcats:LoLCATs",
    "lru": "lru:LRU",
    "lstm": "lstm:LSTM",
    "m2rnn": "m2rnn:M2RNN",
    "mamba": "mamba:Mamba",
    "mamba2": "mamba2:Mamba2",
    "min_gru": "minimal:MinGRU",
    "min_lstm": "minimal:MinLSTM",
    "mlstm": "mlstm:MLSTM",
    "mom": "mom:MixtureOfMemories",
    "para_gru": "para:ParaGRU",
    "para_lstm": "para:ParaLSTM",
    "retnet": "retnet:RetNet",
    "rg_lru": "rg_lru:RGLRU",
    "rwkv6": "rwkv6:RWKV6",
    "rwkv7": "rwkv7:RWKV7",
    "s4": "s4:S4",
    "s4d": "s4d:S4D",
    "s5": "s5:S5",
    "slstm": "slstm:SLSTM",
}

# Mixers that are not causal (`ostinato.mixers.whole`): found by name like the others, but not listed among them, since
# they keep a part of the law alone.
_WHOLE: dict[str, str] = {
    "hydra": "hydra:Hydra",
    "matrix_mixer": "matrix_mixer:MatrixMixer",
    "multi_scan_gla": "multi_scan_gla:MultiScanGLA",
    "whole_attention": "whole_attention:WholeAttention",
    "whole_lightnet": "lightnet:WholeLightNet",
}

# Causal but for a prompt that is read in one piece: the whole law without one, a part of it with one.
_PREFIX = {
    "prefix_linear_attention": "prefix_linear_attention:PrefixLinearAttention",
}

_registered: dict[str, type[Mixer]] = {}


def mixers() -> list[str]:
    """The names of all causal mixers, built in and registered, in alphabetical order."""
    return sorted({*_BUILT_IN, *_registered})


def whole_mixers() -> list[str]:
    """The names of the mixers that read whole sequences and are not causal, in alphabetical order."""
    return sorted(_WHOLE)


def prefix_mixers() -> list[str]:
    """The names of the mixers that read a prompt in one piece, in alphabetical order."""
    return sorted(_PREFIX)


def mixer_class(name: str) -> type[Mixer]:
    """The class of a name; raises `UnknownNameError`, which names the nearest."""
    if name in _registered:
        return _registered[name]
    built_in = _BUILT_IN | _WHOLE | _PREFIX
    if name not in built_in:
        raise UnknownNameError("mixer", name, [*mixers(), *whole_mixers(), *prefix_mixers()])
    module, _, attribute = built_in[name].partition(":")
    return getattr(import_module(f"ostinato.mixers.{module}"), attribute)


def mixer(name: str, d_model: int, **options: Any) -> Mixer:
    """Build a mixer by name: `mixer("gated_delta_net", d_model=256, heads=4)`.

    Raises `UnknownNameError` for the name and `ConfigurationError` for an option that the mixer lacks.
    """
    import inspect

    cls = mixer_class(name)
    known = [p for p in inspect.signature(cls).parameters if p != "d_model"]
    for option in options:
        if option not in known:
            raise ConfigurationError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return cls(d_model, **options)


def register(name: str, cls: type[Mixer], *, check: bool = True) -> None:
    """Make a mixer of your own available under `name`: to plans, the command line, `verify`.

    With `check` (the default) the law is tried on a small instance first, in float64 on the CPU; a mixer
    that breaks it raises `LawError` and is not registered. The class must build from
    `cls(d_model)` alone.
    """
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise ConfigurationError(f"{cls!r} is not a subclass of ostinato.Mixer")
    if name in _BUILT_IN or name in _WHOLE or name in _PREFIX:
        raise ConfigurationError(f"{name!r} is a built-in mixer; choose another name")
    if not name.isidentifier():
        raise ConfigurationError(f"a mixer's name is an identifier such as my_mixer, got {name!r}")
    if check:
        from ostinato.testing import check_mixer

        check_mixer(cls(16))
    _registered[name] = cls


def unregister(name: str) -> None:
    """Forget a mixer that `register` added."""
    if name not in _registered:
        raise UnknownNameError("registered mixer", name, _registered)
    del _registered[name]
