"""Finding mixers by name, and registering one from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ostinato
from ostinato.errors import ConfigurationError, LawError, UnknownNameError
from ostinato.mixers import registry
from ostinato.mixers.base import Mixer, Traits
from ostinato.ops.routes import ENGINES


class Leaky(Mixer):
    """h_t = ½ h_{t−1} + W x_t: small, and lawful."""

    traits = Traits(engine="diagonal_scan", transition="fixed scalar")

    def __init__(self, d_model: int, keep: float = 0.5) -> None:
        super().__init__(d_model)
        self.keep = keep
        self.linear = nn.Linear(d_model, d_model)

    def initial_state(self, batch_size: int) -> tuple[Tensor]:
        return (self.zeros(batch_size, self.d_model),)

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        hidden, outputs = state[0], []
        for t in range(x.shape[1]):
            if reset is not None:
                hidden = hidden.masked_fill(reset[:, t, None], 0)
            hidden = self.keep * hidden + self.linear(x[:, t])
            outputs.append(hidden)
        return torch.stack(outputs, 1).to(x.dtype), (hidden,)


class Unlawful(Leaky):
    """Forgets that there was a state."""

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, _ = super().mix(x, state, reset)
        return y, (torch.zeros_like(y[:, -1]),)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.mark.parametrize("name", registry.mixers())
def test_every_mixer_is_what_it_says(name: str) -> None:
    cls = registry.mixer_class(name)
    mixer = registry.mixer(name, 16)
    assert isinstance(mixer, cls) and mixer.d_model == 16
    assert cls.__doc__ and (cls.traits.engine in ENGINES)
    assert cls.traits.paper and cls.traits.transition and cls.traits.state
    parameters = {part for path, _ in mixer.named_parameters() for part in (path, path.split(".")[-1])}
    # A parameter that only another option has is None here.
    parameters |= {part for part in cls.no_weight_decay if getattr(mixer, part, mixer) is None}
    assert set(cls.no_weight_decay) <= parameters, "no_weight_decay names a parameter that is not there"
    assert set(cls.learning_rate_cap) <= parameters, "learning_rate_cap names a parameter that is not there"
    assert registry.mixer(name, 64)(torch.randn(1, 2, 64))[0].shape == (1, 2, 64)


def test_names_are_sorted() -> None:
    assert registry.mixers() == sorted(registry.mixers()) and "min_gru" in registry.mixers()


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'min_gru'"):
        ostinato.mixer("mingru", 16)


def test_an_unknown_option_names_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"min_gru has no option 'heads'; it has expand"):
        ostinato.mixer("min_gru", 16, heads=2)


def test_an_impossible_width_is_said() -> None:
    with pytest.raises(ConfigurationError, match="d_model must be positive, got 0"):
        ostinato.mixer("min_gru", 0)


@pytest.mark.usefixtures("clean_registry")
def test_a_lawful_mixer_registers_from_outside() -> None:
    ostinato.register("leaky", Leaky)
    assert "leaky" in registry.mixers()
    assert registry.mixer_class("leaky") is Leaky
    assert ostinato.mixer("leaky", 8, keep=0.25).keep == 0.25
    registry.unregister("leaky")
    assert "leaky" not in registry.mixers()
    with pytest.raises(UnknownNameError, match="leaky"):
        registry.unregister("leaky")


@pytest.mark.usefixtures("clean_registry")
def test_an_unlawful_mixer_is_refused() -> None:
    with pytest.raises(LawError, match="split: outputs"):
        ostinato.register("unlawful", Unlawful)
    assert "unlawful" not in registry.mixers()
    ostinato.register("unlawful", Unlawful, check=False)
    assert "unlawful" in registry.mixers()


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("leaky", nn.Linear, "not a subclass"),
        ("leaky", Leaky(4), "not a subclass"),
        ("min_gru", Leaky, "built-in"),
        ("my mixer", Leaky, "identifier"),
        ("", Leaky, "identifier"),
    ],
)
def test_what_cannot_be_registered_is_said(name: str, cls: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ostinato.register(name, cls)
    assert name not in registry._registered


def test_verify_walks_the_mixers_that_are_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    from ostinato.mixers.whole_attention import WholeAttention
    from ostinato.testing import verify

    monkeypatch.setattr(registry, "mixers", lambda: ["min_gru"])
    report = verify(device="cpu", quick=True)
    checks = {name: {row.check for row in report.rows if row.mixer == name} for name in registry.whole_mixers()}
    assert report.ok and {row.mixer for row in report.rows} == {"min_gru", *registry.prefix_mixers(), *checks}
    for found in checks.values():
        # What they keep of the law, and nothing that they cannot keep.
        assert found >= {"whole: outputs", "whole: gradient of parameters", "packing: gradient", "padding", "no state"}
        assert not any(check.startswith(("split", "step", "causal")) for check in found)
    assert any(row.check == "step by step: state" for row in report.rows if row.mixer == "prefix_linear_attention")
    whole = verify(["whole_attention"], device="cpu", dtypes=(torch.float64,))
    assert whole.ok and {row.route for row in whole.rows} > {"free"}
    assert any(row.check == "torch.compile" for row in whole.rows)

    once = WholeAttention.mix_whole
    monkeypatch.setattr(WholeAttention, "mix_whole", lambda self, x, reset: once(self, x, None))
    leaking = verify(["whole_attention", "min_gru"], device="cpu", quick=True)
    assert {row.mixer for row in leaking.broken} == {"whole_attention"}
    assert "packing: outputs" in {row.check for row in leaking.broken}


@pytest.mark.usefixtures("clean_registry")
def test_verify_walks_registered_mixers_too() -> None:
    from ostinato.testing import verify

    ostinato.register("leaky", Leaky, check=False)
    ostinato.register("unlawful", Unlawful, check=False)
    seen: list[str] = []
    report = verify(["leaky", "unlawful", "min_gru"], device="cpu", quick=True, progress=seen.append)
    assert seen == ["leaky", "unlawful", "min_gru"]
    assert not report.ok and {row.mixer for row in report.broken} == {"unlawful"}
    text = report.summary()
    assert "THE LAW IS BROKEN" in text and torch.__version__ in text and "device cpu" in text
    assert report.as_dict()["ok"] is False
    assert "the law holds" in verify(["leaky"], device="cpu", quick=True).summary()
    with pytest.raises(UnknownNameError, match="did you mean"):
        verify(["leeky"])
