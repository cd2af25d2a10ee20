"""Sampling against its definition, and streams against the model's own logits."""

from __future__ import annotations

import itertools

import pytest
import torch

import ostinato
from ostinato import LanguageModel
from ostinato.errors import ConfigurationError, NonFiniteError, StateError
from ostinato.models.generation import sample, token_probabilities


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A model with enough preference that greedy and sampled text differ."""
    torch.manual_seed(1)
    model = LanguageModel(d_model=32, plan="min_gru, attention(window=8)", depth=2, tie_embeddings=False)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.mul_(3)
    return model.eval()


LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.0, 0.5], [3.0, 3.0, 0.0, -2.0, 1.0]])


def test_temperature_divides_the_logits() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = (LOGITS / temperature).softmax(-1)
        torch.testing.assert_close(token_probabilities(LOGITS, temperature=temperature), expected)


def test_temperature_zero_is_greedy_and_a_tiny_one_does_not_overflow() -> None:
    assert token_probabilities(LOGITS, temperature=0).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    tiny = token_probabilities(LOGITS * 1e4, temperature=1e-30)
    torch.testing.assert_close(tiny, torch.tensor([[0, 1.0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]]))


def test_top_k_keeps_exactly_the_k_likeliest() -> None:
    for k in range(1, 8):
        probabilities = token_probabilities(LOGITS, top_k=k)
        assert (probabilities > 0).sum(-1).tolist() == [min(k, 5)] * 2
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))
    kept = token_probabilities(LOGITS[:1], top_k=2)[0]
    torch.testing.assert_close(kept[[1, 3]], LOGITS[0, [1, 3]].softmax(-1))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.57, 0.9, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(top_p: float) -> None:
    full = LOGITS[0].double().softmax(-1)
    found = token_probabilities(LOGITS[:1].double(), top_p=top_p)[0] > 0
    subsets = [list(subset) for size in range(1, 6) for subset in itertools.combinations(range(5), size)]
    enough = [subset for subset in subsets if full[subset].sum() >= top_p - 1e-12]
    smallest = max((s for s in enough if len(s) == len(enough[0])), key=lambda s: full[s].sum())
    assert found.nonzero().squeeze(1).tolist() == smallest


def test_top_p_acts_on_what_temperature_and_top_k_leave() -> None:
    both = token_probabilities(LOGITS[:1], temperature=2.0, top_k=3, top_p=0.5)
    three = (LOGITS[0, [1, 3, 4]] / 2).softmax(-1)
    assert three[0] < 0.5 < three[:2].sum()
    torch.testing.assert_close(both[0, [1, 3]], three[:2] / three[:2].sum())


def test_samples_follow_the_probabilities() -> None:
    rows = LOGITS[:1].expand(20_000, -1)
    drawn = sample(rows, torch.Generator().manual_seed(0), temperature=0.8, top_k=4)
    frequencies = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(
        frequencies, token_probabilities(LOGITS, temperature=0.8, top_k=4)[0], atol=0.015, rtol=0
    )


def test_logits_of_a_diverged_model() -> None:
    with pytest.raises(NonFiniteError, match="NaN"):
        token_probabilities(torch.tensor([[0.0, torch.nan]]))


def test_a_greedy_stream_is_the_forward_argmax(model: LanguageModel) -> None:
    prompt = "The first"
    stream = model.stream(prompt, temperature=0, max_tokens=30)
    text = stream.read()
    tokens = torch.tensor([[*prompt.encode(), *stream.tokens]])
    logits, _ = model(tokens)
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == stream.tokens
    assert model.tokenizer.decode(stream.tokens).startswith(text)


def test_a_seed_makes_a_stream_repeatable(model: LanguageModel) -> None:
    one, two, other = (model.stream("a", seed=seed, max_tokens=40).read() for seed in (7, 7, 8))
    assert one == two != other
    torch.manual_seed(3)
    free = model.stream("a", max_tokens=40).read()
    torch.manual_seed(3)
    assert model.stream("a", max_tokens=40).read() == free


def test_a_seeded_stream_leaves_the_global_generator_alone(model: LanguageModel) -> None:
    before = torch.random.get_rng_state()
    model.stream("a", seed=0, max_tokens=5).read()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pieces_text_and_tokens_agree(model: LanguageModel) -> None:
    stream, pieces = model.stream("x", seed=0, max_tokens=60), []
    for piece in stream:
        assert piece
        pieces.append(piece)
        assert stream.text == "".join(pieces)
    assert len(stream.tokens) == 60
    assert list(stream) == []
    assert model.stream("x", max_tokens=0).read() == ""


def test_a_stream_goes_on_from_its_own_state(model: LanguageModel) -> None:
    whole = model.stream("Go", temperature=0, max_tokens=30)
    whole.read()
    first = model.stream("Go", temperature=0, max_tokens=12)
    first.read()
    second = model.stream(state=first.state, temperature=0, max_tokens=18)
    second.read()
    assert first.tokens + second.tokens == whole.tokens
    torch.testing.assert_close(second.state, whole.state)


def test_a_stream_broken_off_goes_on(model: LanguageModel) -> None:
    whole = model.stream("Go", seed=5, max_tokens=50).read()
    stream = model.stream("Go", seed=5, max_tokens=50)
    first = next(stream)
    for piece in stream:
        second = piece
        break
    assert stream.text == first + second
    assert stream.read() == whole


def test_the_state_that_is_given_is_not_changed(model: LanguageModel) -> None:
    state = model.read("Call me Ishmael.")
    copy = ostinato.state.clone(state)
    first = model.stream(" Some", state=state, seed=1, max_tokens=20).read()
    torch.testing.assert_close(state, copy, atol=0, rtol=0)
    assert model.stream(" Some", state=state, seed=1, max_tokens=20).read() == first


class Scripted(torch.nn.Module):
    """Stands in for a model's step: says a fixed text, whatever it is told."""

    def __init__(self, model: LanguageModel, said: bytes) -> None:
        super().__init__()
        self.model, self.said, self.place = model, said, 0

    def logits(self) -> torch.Tensor:
        logits = torch.zeros(1, 256)
        if self.place < len(self.said):
            logits[0, self.said[self.place]] = 100.0
        return logits

    def advance(self, tokens: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        self.place += 1
        return self.logits(), state


def scripted(model: LanguageModel, said: str | bytes, monkeypatch: pytest.MonkeyPatch, **options: object):  # type: ignore[no-untyped-def]
    said = said.encode() if isinstance(said, str) else said
    script = Scripted(model, said)
    stream = model.stream("x", temperature=0, max_tokens=len(said), **options)  # type: ignore[arg-type]
    stream._logits = script.logits()
    monkeypatch.setattr(model, "advance", script.advance)
    return stream


def test_a_character_of_several_bytes_is_held_back(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(scripted(model, "aé→🎵b", monkeypatch)) == ["a", "é", "→", "🎵", "b"]


def test_an_unfinished_character_is_dropped_at_the_end(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = scripted(model, "ab→".encode()[:-1], monkeypatch)
    assert stream.read() == "ab" and len(stream.tokens) == 4


def test_bytes_that_are_no_text_are_replaced(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scripted(model, b"a\xff\xc3b", monkeypatch).read() == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("world", "hello "),
        (("xyz", "lo wo"), "hel"),
        (["o", "hello "], "hell"),
        ("\n\n", "hello world\n!"),
        ("h", ""),
        ("world\n!?", "hello world\n!"),
    ],
)
def test_stop_texts(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, stop: str | list[str], text: str) -> None:
    stream = scripted(model, "hello world\n!", monkeypatch, stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == text
    if stop == "world":
        assert pieces == list("hello ")


def test_an_end_token_ends_the_stream(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "end", ord("o"), raising=False)
    assert scripted(model, "hello", monkeypatch).read() == "hell"


def test_an_endless_stream(model: LanguageModel) -> None:
    stream = model.stream("a", max_tokens=None, seed=0)
    for _ in itertools.takewhile(lambda _: len(stream.tokens) < 300, stream):
        pass
    assert len(stream.tokens) >= 300


def test_from_nothing_the_stream_starts_after_a_newline(model: LanguageModel) -> None:
    assert model.stream(seed=2, max_tokens=20).read() == model.stream("\n", seed=2, max_tokens=20).read()


def test_a_stream_has_no_dropout_and_leaves_the_mode(model: LanguageModel) -> None:
    dropping = LanguageModel(d_model=16, plan="min_gru", depth=1, dropout=0.5)
    assert dropping.training
    texts = {dropping.stream("ab", temperature=0, max_tokens=10).read() for _ in range(3)}
    assert len(texts) == 1 and dropping.training


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_tokens": -1},
        {"stop": [""]},
    ],
    ids=str,
)
def test_options_out_of_range(model: LanguageModel, options: dict) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        model.stream("a", **options)


def test_a_stream_wants_one_row(model: LanguageModel) -> None:
    with pytest.raises(StateError, match="select"):
        model.stream("a", state=model.initial_state(2))
