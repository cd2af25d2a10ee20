"""Mixers that are not causal: each keeps the part of the law that it states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ostinato
from ostinato.errors import ConfigurationError, LawError, StateError
from ostinato.mixers import registry
from ostinato.mixers.whole import WholeMixer
from ostinato.models.vector_classifier import VectorClassifier
from ostinato.ops.sequences import places, same_sequence, sequence_max, sequence_softmax, sequence_sum, whole_attention
from ostinato.testing.whole import check_whole_mixer


@pytest.mark.parametrize("name", registry.whole_mixers())
def test_every_whole_mixer_keeps_what_it_states(name: str) -> None:
    cls = registry.mixer_class(name)
    mixer = registry.mixer(name, 16)
    assert isinstance(mixer, WholeMixer) and not mixer.causal and cls.traits.paper and cls.__doc__
    report = check_whole_mixer(mixer, length=13, dtypes=(torch.float64, torch.float32), name=name)
    assert report.ok and len(report.rows) > 10


def test_they_are_found_by_name_but_not_listed_among_the_causal() -> None:
    assert "hydra" in registry.whole_mixers() and "hydra" not in registry.mixers()
    with pytest.raises(ConfigurationError, match="built-in"):
        ostinato.register("hydra", registry.mixer_class("gla"))
    model = VectorClassifier(3, 2, 16, "hydra, gla", norm_place="pre")
    logits, state = model(torch.randn(2, 5, 3))
    assert logits.shape == (2, 5, 2) and state[0] is None
    with pytest.raises(ConfigurationError, match="Hydra would see it"):
        ostinato.LanguageModel(d_model=16, plan="hydra")
    with pytest.raises(StateError, match="reads whole sequences"):
        model(torch.randn(2, 5, 3), (torch.zeros(2, 1), None))


def test_a_leak_between_packed_sequences_is_found() -> None:
    class Leaking(registry.mixer_class("hydra")):  # type: ignore[misc]
        def mix_whole(self, x: Any, reset: Any) -> Any:
            return super().mix_whole(x, None)

    with pytest.raises(LawError, match="packing"):
        check_whole_mixer(Leaking(16), length=8)
    with pytest.raises(ConfigurationError, match="is causal"):
        check_whole_mixer(ostinato.mixer("gla", 16))  # type: ignore[arg-type]


RESET = torch.tensor([[False, False, True, False, True, True], [True, False, False, False, False, False]])


def test_sums_over_sequences() -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    total, top = sequence_sum(x, RESET), sequence_max(x, RESET)
    soft = sequence_softmax(x, RESET)
    for row, parts in ((0, [(0, 2), (2, 4), (4, 5), (5, 6)]), (1, [(0, 6)])):
        for start, end in parts:
            piece = x[row, start:end]
            assert torch.allclose(total[row, start:end], piece.sum(0).expand_as(piece))
            assert torch.equal(top[row, start:end], piece.amax(0).expand_as(piece))
            assert torch.allclose(soft[row, start:end], piece.softmax(0))
    assert torch.allclose(sequence_softmax(x), x.softmax(1))
    assert not sequence_softmax(torch.full((1, 3, 2), -torch.inf)).any()
    assert places(RESET, 2, 6, x.device).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_whole_attention_is_its_masked_matrix() -> None:
    q, k = (torch.randn(2, 6, 2, 3, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 6, 2, 4, dtype=torch.float64)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    for reset in (None, RESET):
        mask = 1.0 if reset is None else same_sequence(reset).unsqueeze(1).double()
        wanted = torch.einsum("bhij,bjhv->bihv", scores * mask, v)
        assert torch.allclose(whole_attention(q, k, v, reset=reset), wanted, atol=1e-12)
