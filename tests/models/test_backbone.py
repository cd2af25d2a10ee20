"""The backbone: the law over hybrids, its state, its context, its initialisation, its errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ostinato
from ostinato.errors import ConfigurationError, PlanError, ShapeError, StateError, UnknownNameError
from ostinato.mixers.minimal import MinGRU
from ostinato.models.backbone import Backbone

PLANS = ["min_gru", "min_gru*2, attention", "attention(window=3), min_gru(expand=2)"]


def draw(time: int = 12, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, time, 16, dtype=torch.float64, requires_grad=True), torch.rand(batch, time) < 0.2


@pytest.mark.parametrize("channel_mixer", ["swiglu", None])
@pytest.mark.parametrize("plan", PLANS)
def test_the_law_in_outputs_states_and_gradients(plan: str, channel_mixer: str | None) -> None:
    backbone = Backbone(16, plan, 3, channel_mixer=channel_mixer).double()
    x, reset = draw()
    probe = torch.randn_like(x)
    _, entering = backbone(torch.randn(2, 4, 16, dtype=torch.float64))
    entering = ostinato.state.map(
        lambda leaf: leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf, entering
    )
    given = [leaf for _, leaf in ostinato.state.leaves(entering) if leaf.requires_grad]

    def outcome(outputs: Tensor, state: object) -> list[Tensor]:
        loss = (outputs * probe).sum()
        gradients = torch.autograd.grad(loss, [x, *backbone.parameters(), *given])
        return [outputs, *(leaf for _, leaf in ostinato.state.leaves(state)), *gradients]

    whole = outcome(*backbone(x, entering, reset=reset))
    first, state = backbone(x[:, :5], entering, reset=reset[:, :5])
    second, state = backbone(x[:, 5:], state, reset=reset[:, 5:])
    pieces = outcome(torch.cat([first, second], dim=1), state)
    state, outputs = entering, []
    for t in range(12):
        output, state = backbone(x[:, t : t + 1], state, reset=reset[:, t : t + 1])
        outputs.append(output)
    steps = outcome(torch.cat(outputs, dim=1), state)
    torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=0)
    torch.testing.assert_close(steps, whole, atol=1e-9, rtol=0)


def test_step_and_initial_state() -> None:
    backbone = Backbone(16, "min_gru, attention", 2).double()
    x, _ = draw()
    whole, last = backbone(x)
    state = backbone.initial_state(2)
    assert len(state) == backbone.depth == len(backbone.mixers) == 2
    for t in range(12):
        y, state = backbone.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_the_plan_is_repeated_to_the_depth() -> None:
    backbone = Backbone(16, "min_gru*2, attention", 5)
    assert [type(mixer).__name__ for mixer in backbone.mixers] == ["MinGRU", "MinGRU", "Attention", "MinGRU", "MinGRU"]
    assert Backbone(16, "min_gru*2, attention").depth == 3


def test_without_channel_mixers_and_with_dropout() -> None:
    assert not any("channel" in name for name, _ in Backbone(16, "min_gru", channel_mixer=None).named_parameters())
    backbone, x = Backbone(16, "min_gru", 2, dropout=0.5), torch.randn(1, 4, 16)
    assert (backbone(x)[0] - backbone(x)[0]).abs().max() > 0
    backbone.eval()
    torch.testing.assert_close(backbone(x)[0], backbone(x)[0], atol=0, rtol=0)


def test_output_projections_shrink_with_depth_and_nothing_else_changes() -> None:
    def built(depth: int) -> Backbone:
        torch.manual_seed(0)
        return Backbone(16, "attention", depth)

    one, four = built(1), built(4)
    mine, theirs = one.blocks[0], four.blocks[0]
    torch.testing.assert_close(theirs.mixer.to_output.weight, mine.mixer.to_output.weight / 2)
    torch.testing.assert_close(theirs.channel_mixer.to_output.weight, mine.channel_mixer.to_output.weight / 2)
    torch.testing.assert_close(theirs.mixer.to_query.weight, mine.mixer.to_query.weight, atol=0, rtol=0)


class Marked(MinGRU):
    """A mixer that looks at the token ids, and brings its own output scale."""

    needs = ("tokens",)
    depth_scaled = False

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.marks = nn.Embedding(8, d_model)

    def mix(self, x, state, reset, *, tokens):  # type: ignore[no-untyped-def, override]
        return super().mix(x + self.marks(tokens), state, reset)


@pytest.fixture
def marked() -> Iterator[None]:
    ostinato.register("marked", Marked, check=False)
    yield
    ostinato.unregister("marked")


@pytest.mark.usefixtures("marked")
def test_a_mixer_is_handed_what_it_needs() -> None:
    backbone, x = Backbone(16, "min_gru, marked", 2), torch.randn(2, 5, 16)
    tokens = torch.randint(0, 8, (2, 5))
    whole, last = backbone(x, tokens=tokens, positions=None)
    other, _ = backbone(x, tokens=(tokens + 1) % 8)
    assert (whole - other).abs().max() > 1e-4
    state = backbone.initial_state(2)
    for t in range(5):
        y, state = backbone.step(x[:, t], state, tokens=tokens[:, t])
        torch.testing.assert_close(y, whole[:, t], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigurationError, match="Marked needs 'tokens'"):
        backbone(x)


@pytest.mark.usefixtures("marked")
def test_a_language_model_gives_token_ids() -> None:
    model = ostinato.LanguageModel(8 + 256, 16, "marked", 1)
    tokens = torch.tensor([[1, 2, 3]])
    before, _ = model(tokens)
    with torch.no_grad():
        model.backbone.mixers[0].marks.weight[3] += 1
    after, _ = model(tokens)
    assert (before - after)[0, :2].abs().max() == 0 and (before - after)[0, 2].abs().max() > 0


@pytest.mark.usefixtures("marked")
def test_a_mixer_may_keep_its_own_output_scale() -> None:
    torch.manual_seed(0)
    alone = Marked(16)
    torch.manual_seed(0)
    stacked = Backbone(16, "marked", 4, channel_mixer=None).mixers[0]
    torch.testing.assert_close(stacked.to_output.weight, alone.to_output.weight, atol=0, rtol=0)


def test_what_does_not_fit_is_said() -> None:
    backbone, x = Backbone(16, "min_gru", 2), torch.randn(2, 3, 16)
    _, state = backbone(x)
    with pytest.raises(StateError, match="tuple of 2 mixers' states, got 1"):
        backbone(x, state[:1])
    with pytest.raises(StateError, match="got Tensor"):
        backbone(x, x)
    with pytest.raises(StateError, match="batch size 1"):
        backbone(x[:1], state)
    with pytest.raises(ShapeError, match="d_model 16"):
        Backbone(16, "min_gru")(torch.randn(1, 2, 8))
    with pytest.raises(UnknownNameError, match="'swiglu'"):
        Backbone(16, "min_gru", channel_mixer="swigl")
    with pytest.raises(ConfigurationError, match="dropout"):
        Backbone(16, "min_gru", dropout=1.0)
    with pytest.raises(ConfigurationError, match="depth 0"):
        Backbone(16, "min_gru", 0)
    with pytest.raises(PlanError, match=r"\^"):
        Backbone(16, "min_gru*")
    with pytest.raises(ConfigurationError, match="divisible"):
        Backbone(15, "attention")
