"""Mixers that are wrong on purpose: each breaks one thing, and the law must name it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ostinato.errors import BackendError, ConfigurationError, LawError
from ostinato.mixers.base import Mixer, Traits
from ostinato.mixers.parts import ShortConvolution
from ostinato.ops.diagonal_scan import diagonal_scan
from ostinato.ops.routes import ENGINES, Engine
from ostinato.testing import FREE, check_mixer


class Pair(NamedTuple):
    """The inputs that the convolution needs, and the hidden vector."""

    taps: Tensor
    hidden: Tensor


class Honest(Mixer):
    """A short convolution, then a gated diagonal recurrence: right in everything."""

    traits = Traits(engine="diagonal_scan", transition="data vector")

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.convolution = ShortConvolution(d_model, 3)
        self.to_decay = nn.Linear(d_model, d_model)
        self.to_output = nn.Linear(d_model, d_model)

    def initial_state(self, batch_size: int) -> Pair:
        return Pair(self.convolution.initial_state(batch_size), self.zeros(batch_size, self.d_model))

    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        u, taps = self.convolution(x, state.taps, reset)
        hidden, last = diagonal_scan(torch.sigmoid(self.to_decay(x)), u, state.hidden, reset=reset)
        return self.to_output(torch.tanh(hidden)), Pair(taps, last)


class ForgetsALeaf(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, last = super().mix(x, state, reset)
        return y, Pair(torch.zeros_like(last.taps), last.hidden)


class IgnoresResetInConvolution(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        u, taps = self.convolution(x, state.taps)
        hidden, last = diagonal_scan(torch.sigmoid(self.to_decay(x)), u, state.hidden, reset=reset)
        return self.to_output(torch.tanh(hidden)), Pair(taps, last)


class IgnoresResetAtZero(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        if reset is not None:
            reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], dim=1)
        return super().mix(x, state, reset)


class LooksAhead(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x + 1e-6 * x.mean(1, keepdim=True), state, reset)


class StepsDifferently(Honest):
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().step(x, state)
        return y + 1e-7, state


class MixesRows(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x - 1e-6 * x.mean(0, keepdim=True), state, reset)


class HasAnIdleParameter(Honest):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.idle = nn.Parameter(torch.ones(d_model))


class CutsTheState(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x, Pair(state.taps, state.hidden.detach()), reset)


class _Tilted(torch.autograd.Function):
    """tanh, whose derivative is a thousandth too large: the same in every route, split and step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := torch.tanh(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (1 - ctx.saved_tensors[0].square()) * 1.001


class HasAWrongGradient(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, state = super().mix(x, state, reset)
        return _Tilted.apply(y), state


class OverwritesItsState(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, last = super().mix(x, state, reset)
        with torch.no_grad():
            state.hidden.copy_(last.hidden)
        return y, last


class ReadsUnwrittenMemory(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, last = super().mix(x, state, reset)
        return y + 0 * torch.empty_like(y), last


class KeepsItsStateInSingle(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, last = super().mix(x, Pair(state.taps, state.hidden), reset)
        return y, Pair(last.taps, last.hidden.float().to(x.dtype))


class ChangesTheStatesType(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        y, last = super().mix(x, state, reset)
        return y, tuple(last)


class KeepsTheSequenceAlive(Honest):
    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, last = super().forward(x, state, reset=reset)
        return y, Pair(last.taps, torch.stack([y, y + 0 * last.hidden.unsqueeze(1)], 1)[:, 0, -1])


class BranchesOnData(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return super().mix(x if float(x.detach().sum()) > 1e9 else 2 * x, state, reset)


class HasItsOwnInitialState(Honest):
    def forward(self, x: Tensor, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        if state is None:
            state = Pair(self.convolution.initial_state(x.shape[0]), self.zeros(x.shape[0], self.d_model) + 1e-3)
        return super().forward(x, state, reset=reset)


class Raises(Honest):
    def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        if x.shape[1] == 1:
            raise RuntimeError("one step is beneath me")
        return super().mix(x, state, reset)


def test_an_honest_mixer_passes() -> None:
    report = check_mixer(Honest(16), dtypes=(torch.float64, torch.float32, torch.bfloat16))
    assert report.ok and not report.broken
    assert {row.route for row in report.rows} == {FREE, "reference", "parallel"}
    assert {row.dtype for row in report.rows} == {"float64", "float32", "bfloat16"}


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (ForgetsALeaf, "split: outputs"),
        (ForgetsALeaf, "split: state"),
        (IgnoresResetInConvolution, "packing: outputs"),
        (IgnoresResetAtZero, "packing: outputs"),
        (LooksAhead, "causality"),
        (StepsDifferently, "step by step: outputs"),
        (MixesRows, "rows: outputs"),
        (HasAnIdleParameter, "gradient reaches"),
        (CutsTheState, "gradient reaches"),
        (CutsTheState, "split: gradient of x"),
        (CutsTheState, "derivative: gradient of state"),
        (HasAWrongGradient, "derivative: gradient of x"),
        (OverwritesItsState, "form"),
        (ReadsUnwrittenMemory, "whole: outputs"),
        (KeepsItsStateInSingle, "split: outputs"),
        (ChangesTheStatesType, "form"),
        (KeepsTheSequenceAlive, "form"),
        (HasItsOwnInitialState, "no state is the initial state"),
        (Raises, "step by step"),
    ],
)
def test_a_broken_mixer_is_named(broken: type[Mixer], check: str) -> None:
    with pytest.raises(LawError) as caught:
        check_mixer(broken(16), compile=False)
    names = [line.split("  ") for line in str(caught.value).splitlines()]
    assert any(check in [cell.strip() for cell in line] for line in names), str(caught.value)
    report = check_mixer(broken(16), compile=False, strict=False)
    assert check in {row.check for row in report.broken}


@pytest.mark.parametrize("check", ["torch.compile", "torch.export"])
def test_what_does_not_trace_is_named(check: str) -> None:
    with pytest.raises(LawError, match=check):
        check_mixer(BranchesOnData(16), routes=())


def test_routes_that_disagree_are_named() -> None:
    engine = Engine("tilted_for_a_test")
    try:
        engine.route("reference")(lambda h: h)
        engine.route("parallel", priority=10)(lambda h: h * (1 + 1e-6))

        class Disagrees(Honest):
            def mix(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
                y, last = super().mix(x, state, reset)
                return engine(y), last

        report = check_mixer(Disagrees(16), compile=False, strict=False)
        assert {row.route for row in report.broken} == {FREE, "parallel"}
        assert "whole: outputs" in {row.check for row in report.broken}
        engine.routes.pop("parallel")
        assert {row.route for row in check_mixer(Disagrees(16), compile=False).rows} == {FREE, "reference"}
        with pytest.raises(BackendError, match="no route 'parallel'"):
            check_mixer(Disagrees(16), compile=False, routes=("parallel",))
    finally:
        ENGINES.pop("tilted_for_a_test")


def test_the_mixer_that_is_checked_is_left_alone() -> None:
    mixer = Honest(16)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    check_mixer(mixer, compile=False, routes=(FREE,))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in mixer.named_parameters())


def test_what_cannot_be_tried_is_said() -> None:
    with pytest.raises(ConfigurationError, match="int64"):
        check_mixer(Honest(16), dtypes=(torch.int64,))
    with pytest.raises(ConfigurationError, match="at least 3 steps"):
        check_mixer(Honest(16), length=2)
