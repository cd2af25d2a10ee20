from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ostinato.errors import ConfigurationError
from ostinato.tasks import passkey
from ostinato.tasks.passkey import FILLER, KEY, PREFIX, SUFFIX, Passkey, passkey_text


def test_marks_against_reading() -> None:
    task = Passkey(digits=3, length=24)
    batch = task.train_batch(0, 200, seed=0)
    assert batch.inputs.shape == (200, 24)
    cycle = passkey._tokens(FILLER).tolist()
    places = set()
    for tokens, targets, mask in zip(*(part.tolist() for part in batch[:3]), strict=True):
        mark, ask = tokens.index(11), tokens.index(12)
        key = tokens[mark + 1 : mark + 4]
        assert all(1 <= digit <= 10 for digit in key)
        assert tokens[:mark] + tokens[mark + 4 : ask] == [cycle[i % len(cycle)] for i in range(24 - 7)]
        assert tokens[ask + 1 :] == key[:-1] and ask == 21
        assert mask == [False] * 21 + [True] * 3 and targets[-3:] == key
        places.add(mark)
    # 24 tokens: 4 of the key with its mark, 1 question, 2 digits read back: 17 of filler, 18 places.
    assert places == set(range(18))


def test_words_are_those_of_the_text() -> None:
    task = Passkey(wording="words", digits=5, length=120, tested_lengths=(120,), test_size=8)
    names = {number: word for word, number in passkey._NUMBER.items()}
    for batch in task.test_batches():
        for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            key = " ".join(str(digit - 1) for digit in targets[-5:])
            text = " ".join(names[token] if token > 12 else str(token - 1) for token in tokens)
            bare = " ".join(passkey._words(PREFIX)), " ".join(passkey._words(SUFFIX))
            hidden = " ".join(passkey._words(KEY)).replace("The passkey is .", f"The passkey is {key} .")
            assert text.startswith(bare[0]) and text.endswith(f"{bare[1]} {key[:-2]}")
            sentence = " ".join(word if word != "{key}" else key for word in passkey._words(KEY))
            assert text.count(sentence) == 1 and hidden
            before = text[: text.index(sentence)].strip()
            assert before.endswith(".")  # a sentence begins after a sentence


def test_depths_are_even_and_told() -> None:
    task = Passkey(tested_lengths=(64, 256), test_size=32, depths=4)
    for batch in task.test_batches():
        part = (task.depth_of(batch) * 4).long().clamp(max=3)
        assert part.bincount(minlength=4).tolist() == [8, 8, 8, 8]
        logits = functional.one_hot(batch.targets, task.vocab_size).float()
        wrong = part == 2
        logits[wrong] = logits[wrong].roll(1, dims=-1)
        score = task.score(logits, batch)
        assert score["accuracy at depth 0.625"] == (0.0, 40.0)
        assert all(score[f"accuracy at depth {d}"] == (40.0, 40.0) for d in (0.125, 0.375, 0.875))


def test_baselines() -> None:
    found = Passkey(test_size=64).baselines()
    assert found["first digits"] == 1 and abs(found["most frequent answer"] - 0.1) < 0.05


def test_the_text_for_language_models() -> None:
    text = passkey_text("01234", 10, 0.35)
    body = text[len(PREFIX) :].split(SUFFIX)[0].strip()
    sentences = body.split(FILLER)
    assert len(sentences) == 10 and sentences[3].strip() == "The passkey is 01234. Remember it. 01234 is the passkey."
    assert passkey_text("1", 3, 1.0).index("The passkey is 1") > passkey_text("1", 3, 0.0).index("The passkey is 1")


@pytest.mark.parametrize(
    "options", [{"wording": "song"}, {"length": 8}, {"depths": 0}, {"wording": "words", "length": 50}]
)
def test_bad_passkey(options: dict) -> None:
    with pytest.raises(ConfigurationError):
        Passkey(**{"tested_lengths": (), **options})


def test_bad_text() -> None:
    with pytest.raises(ConfigurationError, match="depth"):
        passkey_text("1", 3, 1.5)
    assert torch.is_tensor(Passkey().depth_of(Passkey().train_batch(0, 2, 0)))
