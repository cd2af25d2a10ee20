"""Pointer networks against their equations; masks, lengths, the search; and that they learn to sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.models.pointer import FILL, PointerNetwork, PointingModel, Seq2Seq
from ostinato.tasks.geometry import sorting

MODELS = {
    "pointer": lambda: PointerNetwork(2, 6),
    "pointer, two layers": lambda: PointerNetwork(2, 6, num_layers=2),
    "plain": lambda: Seq2Seq(2, 6, 5),
    "attention": lambda: Seq2Seq(2, 6, 5, attention=True),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PointingModel:
    return MODELS[request.param]().double()


def points(n: int = 4, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, n, 2, dtype=torch.float64)


def test_the_equations() -> None:
    model = PointerNetwork(2, 6).double()
    inputs, targets = points(4, 1), torch.tensor([[2, 3, 0]])
    found = model(inputs, None, targets)
    embedded = inputs @ model.embedding.weight.T
    encoded, state = model.encoder(embedded)
    keys = torch.cat([model.end[None], encoded[0]])
    reads = [model.start, embedded[0, 1], embedded[0, 2]]
    for step, read in enumerate(reads):
        decoded, state = model.decoder(read.view(1, 1, 6), state)
        attention = model.attention
        scores = [
            attention.score @ torch.tanh(attention.keys.weight @ e + attention.query.weight @ decoded[0, 0])
            for e in keys
        ]
        torch.testing.assert_close(found[0, step], torch.stack(scores).log_softmax(0))


def test_with_attention_the_summary_is_fed_back() -> None:
    model = Seq2Seq(2, 6, 5, attention=True).double()
    inputs = points(5, 1)
    found = model(inputs, None, torch.tensor([[2, 0]]))
    embedded = inputs @ model.embedding.weight.T
    encoded, state = model.encoder(embedded)
    summary = torch.zeros(1, 1, 12, dtype=torch.float64)
    for step, read in enumerate([model.start, embedded[0, 1]]):
        decoded, state = model.decoder(torch.cat([read.view(1, 1, 6), summary], -1), state)
        attention = model.attention
        weights = (torch.tanh(attention.keys(encoded) + attention.query(decoded)) @ attention.score)[..., None].softmax(
            1
        )
        summary = torch.cat([decoded, (weights * encoded).sum(1, keepdim=True)], -1)
        torch.testing.assert_close(found[0, step], model.readout(summary)[0, 0].log_softmax(0))


def test_padding_changes_nothing(model: PointingModel) -> None:
    inputs, lengths = points(5), torch.tensor([3, 5, 4])
    targets = torch.tensor([[1, 3, 0, FILL], [5, 1, 2, 0], [4, 0, FILL, FILL]])
    together = model(inputs, lengths, targets)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))
    for row, length in enumerate(lengths.tolist()):
        steps = int((targets[row] != FILL).sum())
        alone = model(inputs[row : row + 1, :length], None, targets[row : row + 1, :steps])
        first = together[row, :steps, : length + 1]
        assert torch.isneginf(together[row, :, length + 1 :]).all()
        torch.testing.assert_close(first, alone[0, :, : length + 1])
    made, likelihood = model.decode(inputs, lengths)
    for row, length in enumerate(lengths.tolist()):
        again, alone_likelihood = model.decode(inputs[row : row + 1, :length], max_steps=6)
        steps = min(made.shape[1], again.shape[1])
        assert made[row, :steps].tolist() == again[0, :steps].tolist()
        torch.testing.assert_close(likelihood[row], alone_likelihood[0])


def test_the_search_scores_as_forward_does(model: PointingModel) -> None:
    inputs = points()
    for beam in (1, 3):
        made, likelihood = model.decode(inputs, beam=beam)
        over = (made == 0).cumsum(1) > 1
        log_probs = model(inputs, None, made.masked_fill(over, FILL))
        picked = log_probs.gather(-1, made[..., None]).squeeze(-1).masked_fill(over, 0.0)
        torch.testing.assert_close(likelihood, picked.sum(1).detach())


def test_a_wide_beam_finds_the_best_tour() -> None:
    model = PointerNetwork(2, 6, end_token=False, mask_visited=True).double()
    inputs = points(4, 1)
    every = torch.tensor(list(itertools.permutations(range(1, 5))))
    scores = model(inputs.expand(len(every), -1, -1), None, every).gather(-1, every[..., None]).sum((1, 2)).detach()
    assert float(scores.exp().sum()) == pytest.approx(1)
    made, likelihood = model.decode(inputs, beam=24)
    assert made[0].tolist() == every[scores.argmax()].tolist()
    torch.testing.assert_close(likelihood[0], scores.max())
    greedy, _ = model.decode(points(4, 20))
    assert (greedy.sort(dim=1).values == torch.arange(1, 5)).all()


def test_what_does_not_fit(model: PointingModel) -> None:
    inputs = points()
    with pytest.raises(ShapeError, match="positions up to 4"):
        model(inputs, None, torch.tensor([[5]] * 3))
    with pytest.raises(ShapeError, match="from 1 to 4"):
        model(inputs, torch.tensor([4, 5, 1]), torch.tensor([[1]] * 3))
    with pytest.raises(ConfigurationError, match="beam"):
        model.decode(inputs, beam=0)
    with pytest.raises(ConfigurationError, match="sizes"):
        PointerNetwork(0, 4)
    if isinstance(model, Seq2Seq):
        with pytest.raises(ShapeError, match="cannot name more"):
            model.decode(points(6))


def test_it_learns_to_point_at_the_lower_number() -> None:
    model = PointerNetwork(1, 24, end_token=False, mask_visited=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rng = np.random.default_rng(0)
    for step in range(150):
        data = sorting(rng, 64, 2 + step % 2)
        loss = model.loss(torch.from_numpy(data.points).float(), None, torch.from_numpy(data.targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = sorting(np.random.default_rng(1), 200, 3)
    made, _ = model.decode(torch.from_numpy(data.points).float())
    assert (made.numpy() == data.targets).all(1).mean() > 0.7
