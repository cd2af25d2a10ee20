"""Plans: what parses, what comes back out, and where the caret stands when it does not parse."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import ConfigurationError, PlanError, UnknownNameError
from ostinato.mixers.attention import Attention
from ostinato.models.plan import Layer, Plan, parse_plan


def test_names_counts_and_options() -> None:
    plan = parse_plan(" min_gru * 2 ,attention(window=64, heads=2,)*2,\n attention()")
    assert [layer.name for layer in plan.layers] == ["min_gru"] * 2 + ["attention"] * 3
    assert plan.layers[2].options == plan.layers[3].options == {"window": 64, "heads": 2}
    assert plan.layers[4].options == {}


def test_kinds_of_values() -> None:
    text = "attention(a=-3, b=1e-3, c=True, d=none, e=sigmoid, f=\"two words\", g='it\\'s', h=.5, i=2.)"
    values = list(parse_plan(text).layers[0].options.values())
    assert values == [-3, 1e-3, True, None, "sigmoid", "two words", "it's", 0.5, 2.0]
    assert isinstance(values[0], int) and values[2] is True and isinstance(values[8], float)


def test_to_depth_repeats_and_cuts() -> None:
    plan = parse_plan("min_gru*2, attention")
    assert [layer.name[0] for layer in plan.to_depth(7)] == list("mmammam")
    assert plan.to_depth(2) == plan.layers[:2]
    assert plan.to_depth(None) == plan.layers
    with pytest.raises(ConfigurationError, match="depth 0"):
        plan.to_depth(0)


def test_a_layer_builds_its_mixer() -> None:
    built = parse_plan("attention(window=8, heads=2)").layers[0].build(16)
    assert isinstance(built, Attention) and (built.window, built.heads) == (8, 2)
    with pytest.raises(ConfigurationError, match="no option 'windows'"):
        parse_plan("attention(windows=8)").layers[0].build(16)


VALUES = st.one_of(
    st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
LAYERS = st.builds(
    Layer,
    st.sampled_from(["min_gru", "attention"]),
    st.dictionaries(st.text(string.ascii_lowercase + "_", min_size=1, max_size=5), VALUES, max_size=3),
)


@given(st.lists(LAYERS, min_size=1, max_size=5))
def test_what_is_written_is_read_back(layers: list[Layer]) -> None:
    plan = Plan(tuple(layers))
    assert parse_plan(str(plan)) == plan
    assert str(parse_plan(str(plan))) == str(plan)


def test_runs_are_written_as_counts() -> None:
    text = "min_gru*2, attention(window=64), min_gru"
    assert str(parse_plan("min_gru,min_gru, attention( window = 64 ),min_gru")) == text
    assert parse_plan(parse_plan(text)) == parse_plan(text)


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", 0, "name of a mixer, but found the end"),
        ("min_gru,", 8, "name of a mixer, but found the end"),
        ("min_gru,, attention", 8, "name of a mixer, but found ','"),
        ("min_gru attention", 8, "a comma"),
        ("min_gru)", 7, "but found '\\)'"),
        ("min_gru*", 8, "a count"),
        ("min_gru*-1", 8, "a count"),
        ("min_gru*2.5", 8, "a count"),
        ("min_gru*0", 8, "at least 1"),
        ("min_gru(expand)", 14, "'=' after the option 'expand'"),
        ("min_gru(expand=)", 15, "a value"),
        ("min_gru(expand=1, expand=2)", 18, "given twice"),
        ("min_gru(expand=1", 16, "found the end"),
        ("min_gru(expand='1)", 15, "a value"),
        ("min_gru(expand=1 2)", 17, "'\\)'"),
        ("min_gru(expand=1x)", 15, "a value"),
        ("3*min_gru", 0, "name of a mixer, but found '3'"),
    ],
)
def test_the_caret_points_at_the_place(text: str, place: int, what: str) -> None:
    with pytest.raises(PlanError, match=what) as caught:
        parse_plan(text)
    _, line, caret = str(caught.value).split("\n")
    assert line == "  " + text
    assert caret == "  " + " " * place + "^"


def test_the_caret_in_a_plan_of_several_lines() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("min_gru,\n\tattention!")
    _, line, caret = str(caught.value).split("\n")
    assert line[caret.index("^")] == "!"


def test_an_unknown_mixer_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'min_gru'"):
        parse_plan("attention, mingru*2")


def test_a_plan_is_a_string() -> None:
    with pytest.raises(PlanError, match="got list"):
        parse_plan(["min_gru"])  # type: ignore[arg-type]
