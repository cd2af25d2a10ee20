"""The language model: the law, reading in constant memory, states as things one owns."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ostinato
from ostinato import LanguageModel
from ostinato.errors import ConfigurationError, DataError, DtypeError, ShapeError, StateError

PLANS = ["min_gru", "min_gru, attention", "attention(window=5), min_gru"]


def build(plan: str = "min_gru, attention(window=5)", **options: object) -> LanguageModel:
    return LanguageModel(d_model=16, plan=plan, depth=2, **options).double().eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", PLANS)
def test_the_law(plan: str) -> None:
    model = build(plan)
    tokens, reset = torch.randint(0, 256, (2, 12)), torch.rand(2, 12) < 0.2
    whole, last = model(tokens, reset=reset)
    first, state = model(tokens[:, :5], reset=reset[:, :5])
    second, state = model(tokens[:, 5:], state, reset=reset[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=0)
    plain, _ = model(tokens)
    state = model.initial_state(2)
    for t in range(12):
        logits, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, plain[:, t], atol=1e-12, rtol=0)


def test_a_gradient_reaches_every_parameter() -> None:
    for model in (build(), build(tie_embeddings=False)):
        tokens = torch.randint(0, 256, (2, 9))
        logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = LanguageModel(d_model=32, plan="min_gru, attention(window=8)", depth=2)
    tokens = torch.tensor([list(b"the quick brown fox jumps over the lazy dog. ") * 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        logits, _ = model(tokens[:, :-1])
        losses.append(F.cross_entropy(logits[0], tokens[0, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 5.3 and losses[-1] < 0.5
    assert model.stream("the quick brown", temperature=0, max_tokens=10).read() == " fox jumps"


def test_read_does_not_depend_on_the_chunk() -> None:
    model, text = build(), "Grüße, and then: all the rest of it → end."
    _, whole = model(torch.tensor([list(text.encode())]))
    for chunk in (1, 7, 1000):
        torch.testing.assert_close(model.read(text, chunk=chunk), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.read(io.StringIO(text.replace(",", ",\n"))), model.read(text.replace(",", ",\n")))
    half = model.read(text[:9])
    torch.testing.assert_close(model.read(text[9:], half), whole, atol=1e-12, rtol=0)


def test_a_long_text_is_read_in_memory_that_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = build("min_gru"), []
    encode, hidden = model.tokenizer.encode, model._hidden
    monkeypatch.setattr(model.tokenizer, "encode", lambda part: (sizes.append(len(part)), encode(part))[1])
    monkeypatch.setattr(model, "_hidden", lambda ids, state: (sizes.append(ids.shape[1]), hidden(ids, state))[1])
    text = "é" * 100_000
    state = model.read(text, chunk=16384)
    assert max(sizes) == 65536 and sizes.count(16384) == 200_000 // 16384 and sum(sizes) == 300_000
    _, last = hidden(torch.tensor([list(text.encode())]), None)
    torch.testing.assert_close(state, last)


def test_read_takes_no_gradient_and_nothing_from_nothing() -> None:
    model = build()
    state = model.read("abc")
    assert not any(leaf.requires_grad for _, leaf in ostinato.state.leaves(state))
    torch.testing.assert_close(model.read("", state), state, atol=0, rtol=0)
    torch.testing.assert_close(model.read(""), model.initial_state(1), atol=0, rtol=0)


def test_reading_more_does_not_make_the_state_larger() -> None:
    model = build("min_gru, attention(window=5)")
    sizes = [ostinato.state.num_bytes(model.read("word " * count, chunk=16)) for count in (0, 1, 100)]
    assert sizes[0] == sizes[1] == sizes[2] > 0
    growing = build("attention")
    assert ostinato.state.num_bytes(growing.read("x" * 100)) > 5 * ostinato.state.num_bytes(growing.read("x" * 10))


def test_a_state_does_not_hold_on_to_what_was_read() -> None:
    def held(state: object) -> int:
        storages = [leaf.untyped_storage() for _, leaf in ostinato.state.leaves(state)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    model = build()
    state = model.read("x" * 500)
    assert held(state) == ostinato.state.num_bytes(state)
    # What the model and the window keep themselves is theirs without reading, too.
    _, state = model(torch.randint(0, 256, (1, 500)))
    assert held(state.layers[1]) == ostinato.state.num_bytes(state.layers[1])
    assert held(state.output) == ostinato.state.num_bytes(state.output)


def test_a_fork_gives_the_same_stream_in_every_branch() -> None:
    model = build()
    state = model.read("Once upon a time")
    branches = ostinato.state.select(state, [0, 0, 0])
    expected = model.stream(" there", state=state, seed=4, max_tokens=20).read()
    for row in range(3):
        branch = ostinato.state.select(branches, row)
        assert model.stream(" there", state=branch, seed=4, max_tokens=20).read() == expected
    # And the branches go on as one batch, each with its own tokens, as they would alone.
    tokens = torch.randint(0, 256, (3, 4))
    together, _ = model(tokens, branches)
    for row in range(3):
        alone, _ = model(tokens[row : row + 1], state)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)


def test_states_join_into_a_batch() -> None:
    model = build()
    states = [model.read("one text"), model.read("another, longer text")]
    joined = ostinato.state.concatenate(states)
    tokens = torch.randint(0, 256, (2, 4))
    together, _ = model(tokens, joined)
    for row, state in enumerate(states):
        torch.testing.assert_close(together[row : row + 1], model(tokens[row : row + 1], state)[0], atol=1e-12, rtol=0)
    read = model.read(" and on", joined)
    torch.testing.assert_close(ostinato.state.select(read, 1), model.read(" and on", states[1]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_a_state_is_saved_and_loaded_in_the_middle_of_a_text(plan: str, tmp_path: Path) -> None:
    model = build(plan)
    state = model.read("In the beginning")
    ostinato.state.save(state, tmp_path / "state.safetensors")
    loaded = ostinato.state.load(tmp_path / "state.safetensors", like=model.initial_state(1))
    torch.testing.assert_close(loaded, state, atol=0, rtol=0)
    expected = model.stream(" was", state=state, seed=0, max_tokens=20).read()
    assert model.stream(" was", state=loaded, seed=0, max_tokens=20).read() == expected
    with pytest.raises(StateError, match="another model"):
        ostinato.state.load(tmp_path / "state.safetensors", like=model.initial_state(1).layers)


def test_logits_start_with_variance_one_at_every_width() -> None:
    for d_model in (16, 256):
        logits, _ = LanguageModel(d_model=d_model, plan="min_gru", depth=4)(torch.randint(0, 256, (4, 64)))
        assert 0.6 < logits.std() < 1.6


def test_num_parameters_and_tied_embeddings() -> None:
    tied, untied = build(), build(tie_embeddings=False)
    assert untied.num_parameters() - tied.num_parameters() == 256 * 16
    assert tied.num_parameters() == sum(p.numel() for p in tied.parameters())
    with torch.no_grad():
        tied.embedding.weight.zero_()
    assert tied(torch.zeros(1, 2, dtype=torch.long))[0].abs().max() == 0


def test_the_vocabulary_is_the_tokenizers_or_larger() -> None:
    assert build().vocab_size == 256
    assert build(vocab_size=300)(torch.tensor([[299]]))[0].shape == (1, 1, 300)
    with pytest.raises(ConfigurationError, match="less than the 256"):
        build(vocab_size=100)


def test_what_does_not_fit_is_said() -> None:
    model, tokens = build(), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(DtypeError, match=r"integers \(torch.long\), got torch.float32"):
        model(tokens.float())
    with pytest.raises(ShapeError, match="neither of them empty"):
        model(tokens[:, :0])
    with pytest.raises(ShapeError, match=r"\(batch, time\)"):
        model(tokens[0])
    with pytest.raises(DataError, match=r"in \[0, 256\), got values from 0 to 256"):
        model(torch.tensor([[0, 256]]))
    with pytest.raises(ConfigurationError, match="dropout"):
        build(dropout=1.5)
    _, state = model(tokens)
    with pytest.raises(StateError, match="LanguageState, got tuple"):
        model(tokens, state.layers)
    with pytest.raises(StateError, match="batch size 1"):
        model(tokens[:1], state)
    with pytest.raises(StateError):
        model(tokens, build("min_gru")(tokens)[1])
    with pytest.raises(ConfigurationError, match="chunk"):
        model.read("abc", chunk=0)
    with pytest.raises(DataError, match="UTF-8"):
        model.read("\ud800")


def test_compiles_as_one_graph() -> None:
    model, tokens = build(), torch.randint(0, 256, (1, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])
