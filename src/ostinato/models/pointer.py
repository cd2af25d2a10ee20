"""Pointer networks: sequence to sequence, where the outputs are positions of the input.

    model = PointerNetwork(input_size=2, hidden=128)
    log_probs = model(points, lengths, targets)        # (batch, steps, n + 1): position 0 is the end, 1 … n the inputs
    answers, log_likelihood = model.decode(points, lengths, beam=3)

Vinyals, Fortunato and Jaitly 2015, arXiv 1506.03134, section 2; with the paper's baselines `Seq2Seq`, whose outputs
are a fixed vocabulary. All three are the same encoder and decoder, and differ in what is made of the decoder's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.ops.checks import check_sequence, check_shape

END, FILL = 0, -1
Carried = tuple[Tensor, ...]
"""What the decoder carries from step to step: its hidden states and cells, (batch, layers, hidden), and a summary."""


class PointerAttention(nn.Module):
    """u_j = vᵀ tanh(W_1 e_j + W_2 d), without biases (equation 1 of the card; the paper's equation 3)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.keys = nn.Linear(hidden, hidden, bias=False)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Parameter(torch.empty(hidden).uniform_(-(hidden**-0.5), hidden**-0.5))

    def forward(
        self, keys: Float[Tensor, "batch n hidden"], states: Float[Tensor, "batch steps hidden"]
    ) -> Float[Tensor, "batch steps n"]:
        """Scores of every input at every step; `keys` are W_1 e_j, made once by `self.keys`."""
        # A product with a vector: as a matrix of one column it is several times as slow, most of all backward.
        return torch.tanh(keys[:, None] + self.query(states)[:, :, None]) @ self.score


class PointingModel(nn.Module, ABC):
    """The encoder, the decoder's loop and the search, which the pointer network and its baselines share.

    Points enter both by one linear embedding. It adds no function that an LSTM does not have; but an LSTM's weights
    start as small for 2 coordinates as for a hidden state, so that without it what tells one point from another
    starts several times smaller, and training stands still for thousands of steps before it points at anything.

    Args:
        input_size: coordinates of a point.
        hidden: width of encoder and decoder.
        num_layers: of each.
        end_token: whether an answer ends by its own symbol; otherwise it has as many steps as there are points.
        mask_visited: whether a point can be pointed at only once.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        num_layers: int = 1,
        end_token: bool = True,
        mask_visited: bool = False,
        *,
        summary: int = 0,
    ) -> None:
        super().__init__()
        if min(input_size, hidden, num_layers) < 1:
            raise ConfigurationError(
                f"sizes must be at least 1, got input_size {input_size}, hidden {hidden}, num_layers {num_layers}"
            )
        self.end_token, self.mask_visited, self.summary = end_token, mask_visited, summary
        self.embedding = nn.Linear(input_size, hidden, bias=False)
        self.encoder = nn.LSTM(hidden, hidden, num_layers, batch_first=True)
        self.decoder = nn.LSTM(hidden + summary, hidden, num_layers, batch_first=True)
        self.start = nn.Parameter(torch.randn(hidden) * hidden**-0.5)

    @abstractmethod
    def prepare(self, encoded: Float[Tensor, "batch n hidden"]) -> Tensor:
        """What of the encoder's states is the same at every step."""

    @abstractmethod
    def outputs(
        self, prepared: Tensor, valid: Tensor, states: Float[Tensor, "batch steps hidden"]
    ) -> tuple[Float[Tensor, "batch steps outputs"], Tensor | None]:
        """Scores of all outputs, and the summary that the next step reads (None if it reads none)."""

    def check(self, points: Tensor, lengths: Tensor | None) -> Tensor:
        """The lengths, on the processor; raises `ShapeError` or `DtypeError` for what does not fit."""
        check_sequence("points", points, "batch n coordinates")
        batch, n, _ = points.shape
        if lengths is None:
            return torch.full((batch,), n)
        check_shape("lengths", lengths, (batch,), "batch")
        lengths = lengths.cpu()
        if int(lengths.min()) < 1 or int(lengths.max()) > n:
            raise ShapeError(f"lengths must be from 1 to {n}, got {int(lengths.min())} to {int(lengths.max())}")
        return lengths

    def encode(self, points: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Carried]:
        """The encoder's states (zero beyond a length), which points are there, and what the decoder begins with."""
        n = points.shape[1]
        embedded = self.embedding(points)
        if int(lengths.min()) == n:
            encoded, (hidden, cell) = self.encoder(embedded)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            packed, (hidden, cell) = self.encoder(packed)
            encoded, _ = pad_packed_sequence(packed, batch_first=True, total_length=n)
        valid = torch.arange(n, device=points.device) < lengths.to(points.device)[:, None]
        carried: Carried = (hidden.transpose(0, 1), cell.transpose(0, 1))
        if self.summary:
            carried = (*carried, points.new_zeros(len(points), self.summary))
        return encoded, valid, carried

    def advance(
        self, inputs: Float[Tensor, "batch steps input"], carried: Carried, prepared: Tensor, valid: Tensor
    ) -> tuple[Float[Tensor, "batch steps outputs"], Carried]:
        """Scores for a stretch of decoder inputs; a stretch has one step if a summary is fed back."""
        hidden, cell, *summary = carried
        if summary:
            inputs = torch.cat([inputs, summary[0][:, None]], dim=-1)
        layers_first = (hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous())
        states, (hidden, cell) = self.decoder(inputs, layers_first)
        scores, made = self.outputs(prepared, valid, states)
        after: Carried = (hidden.transpose(0, 1), cell.transpose(0, 1))
        return scores, after if made is None else (*after, made)

    def allowed(self, valid: Tensor, visited: Tensor, outputs: int) -> Tensor:
        """Which outputs may be chosen, (batch, …, outputs); `visited` is (batch, …, n)."""
        points = ~visited if self.mask_visited else torch.ones_like(visited)
        points = points & valid.view(len(valid), *[1] * (visited.ndim - 2), -1)
        end = torch.full_like(points[..., :1], self.end_token)
        if not self.end_token:
            # Rows whose every point is visited are over; something must be left to choose.
            end = end | ~points.any(-1, keepdim=True)
        points = functional.pad(points, (0, outputs - 1 - points.shape[-1]))
        return torch.cat([end, points], dim=-1)

    def forward(
        self,
        points: Float[Tensor, "batch n input"],
        lengths: Int[Tensor, " batch"] | None,
        targets: Int[Tensor, "batch steps"],
    ) -> Float[Tensor, "batch steps outputs"]:
        """log p(C_i | C_1 … C_{i−1}, P) at every step of the targets (teacher forcing).

        Args:
            points: the inputs P, filled up beyond a row's length with anything.
            lengths: how many points each row has; None if all are full.
            targets: positions from 1, `END` (0), and `FILL` (−1) beyond an answer.

        Raises:
            ShapeError, DtypeError: arguments that do not fit each other.
        """
        lengths = self.check(points, lengths)
        batch, n, _ = points.shape
        if targets.ndim != 2 or len(targets) != batch or int(targets.max()) > n:
            raise ShapeError(
                f"targets must be (batch {batch}, steps) of positions up to {n}, got shape {tuple(targets.shape)} "
                f"and positions up to {int(targets.max())}"
            )
        encoded, valid, carried = self.encode(points, lengths)
        prepared = self.prepare(encoded)
        pointed = targets[:, :-1].clamp(min=0)
        inputs = torch.cat([self.start.expand(batch, 1, -1), self.embedding(_at(points, pointed))], dim=1)
        if self.summary:
            pieces = []
            for step in range(inputs.shape[1]):
                scores, carried = self.advance(inputs[:, step : step + 1], carried, prepared, valid)
                pieces.append(scores)
            scores = torch.cat(pieces, dim=1)
        else:
            scores, _ = self.advance(inputs, carried, prepared, valid)
        marks = functional.one_hot(pointed, n + 1)[..., 1:].cumsum(dim=1) > 0
        visited = torch.cat([torch.zeros_like(marks[:, :1]) if marks.shape[1] else _none(valid), marks], dim=1)
        return scores.masked_fill(~self.allowed(valid, visited, scores.shape[-1]), -torch.inf).log_softmax(-1)

    def loss(self, points: Tensor, lengths: Tensor | None, targets: Tensor) -> Float[Tensor, ""]:
        """Mean −log p of the targets' symbols, in nats."""
        log_probs = self(points, lengths, targets)
        return functional.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=FILL)

    @torch.no_grad()
    def decode(
        self,
        points: Float[Tensor, "batch n input"],
        lengths: Int[Tensor, " batch"] | None = None,
        beam: int = 1,
        max_steps: int | None = None,
    ) -> tuple[Int[Tensor, "batch steps"], Float[Tensor, " batch"]]:
        """The likeliest answer found by a beam search (greedy for a beam of 1), and its log likelihood.

        Args:
            points, lengths: as in `forward`.
            beam: how many answers are kept at every step.
            max_steps: of an answer; None is one for each point, and one for the end.

        Returns:
            Positions from 1, 0 from the end on; and the sum of the log probabilities.

        Raises:
            ConfigurationError: a beam below 1.
        """
        if beam < 1:
            raise ConfigurationError(f"a beam must be at least 1 wide, got {beam}")
        lengths = self.check(points, lengths)
        batch, n, _ = points.shape
        encoded, valid, carried = self.encode(points, lengths)
        prepared = self.prepare(encoded)
        # Rows of one instance stand together: (batch · beam, …).
        points, valid, prepared = (each.repeat_interleave(beam, 0) for each in (points, valid, prepared))
        carried = tuple(each.repeat_interleave(beam, 0) for each in carried)
        total = points.new_full((batch, beam), -torch.inf)
        total[:, 0] = 0.0
        inputs = self.start.expand(batch * beam, 1, -1)
        visited = _none(valid)[:, 0]
        ended = torch.zeros(batch * beam, dtype=torch.bool, device=points.device)
        made = torch.zeros(batch * beam, 0, dtype=torch.long, device=points.device)
        for _ in range(max_steps or n + int(self.end_token)):
            scores, carried = self.advance(inputs, carried, prepared, valid)
            scores = scores[:, 0].masked_fill(~self.allowed(valid, visited, scores.shape[-1]), -torch.inf)
            scores = scores.log_softmax(-1)
            outputs = scores.shape[-1]
            # What has ended goes on with END at no cost.
            scores = scores.masked_fill(ended[:, None], -torch.inf)
            scores[:, END] = scores[:, END].masked_fill(ended, 0.0)
            total, best = (total[..., None] + scores.view(batch, beam, outputs)).flatten(1).topk(beam, dim=1)
            rows = (best // outputs + beam * torch.arange(batch, device=best.device)[:, None]).flatten()
            symbols = (best % outputs).flatten()
            carried = tuple(each[rows] for each in carried)
            made = torch.cat([made[rows], symbols[:, None]], dim=1)
            ended = ended[rows] | (symbols == END)
            visited = visited[rows] | (functional.one_hot(symbols, outputs)[:, 1 : n + 1] > 0)
            inputs = self.embedding(_at(points, symbols.clamp(max=n)[:, None]))
            if bool(ended.all()):
                break
        return made.view(batch, beam, -1)[:, 0], total[:, 0]


class PointerNetwork(PointingModel):
    """Ptr-Net: p(C_i = j) = softmax_j(vᵀ tanh(W_1 e_j + W_2 d_i)), j = 0 being a learned end vector.

    The decoder reads the coordinates of what it pointed at last, from a learned start. Options as `PointingModel`.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        num_layers: int = 1,
        end_token: bool = True,
        mask_visited: bool = False,
    ) -> None:
        super().__init__(input_size, hidden, num_layers, end_token, mask_visited)
        self.attention = PointerAttention(hidden)
        self.end = nn.Parameter(torch.randn(hidden) * hidden**-0.5)

    def prepare(self, encoded: Float[Tensor, "batch n hidden"]) -> Tensor:
        """W_1 e_j of the end and of all points, (batch, n + 1, hidden)."""
        end = self.end.expand(len(encoded), 1, -1)
        return self.attention.keys(torch.cat([end, encoded], dim=1))

    def outputs(
        self, prepared: Tensor, valid: Tensor, states: Float[Tensor, "batch steps hidden"]
    ) -> tuple[Float[Tensor, "batch steps outputs"], Tensor | None]:
        """A score for the end and for each point."""
        return self.attention(prepared, states), None


class Seq2Seq(PointingModel):
    """The paper's baselines: an output vocabulary fixed at n_max positions and the end.

    - without attention: p(C_i) = softmax(W_o d_i);
    - with: a = softmax(u) over the encoder's states, d' = Σ_j a_j e_j, p(C_i) = softmax(W_o [d_i ; d'_i]), and
      [d_i ; d'_i] is fed to the next step.

    Symbols beyond a row's own points are masked, which the paper does not do and which can only help. Options as
    `PointingModel`. More than `n_max` points are a `ShapeError`: such a model has no symbols for them.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        n_max: int,
        attention: bool = False,
        num_layers: int = 1,
        end_token: bool = True,
        mask_visited: bool = False,
    ) -> None:
        width = 2 * hidden if attention else hidden
        super().__init__(input_size, hidden, num_layers, end_token, mask_visited, summary=width if attention else 0)
        self.n_max = n_max
        self.attention = PointerAttention(hidden) if attention else None
        self.readout = nn.Linear(width, n_max + 1)

    def check(self, points: Tensor, lengths: Tensor | None) -> Tensor:
        """As of every pointing model; and there must be a symbol for every point."""
        lengths = super().check(points, lengths)
        if points.shape[1] > self.n_max:
            raise ShapeError(
                f"this model has symbols for {self.n_max} points, got {points.shape[1]}; it cannot name more"
            )
        return lengths

    def prepare(self, encoded: Float[Tensor, "batch n hidden"]) -> Tensor:
        """The encoder's states themselves, and W_1 of them beside if there is attention."""
        return encoded if self.attention is None else torch.cat([encoded, self.attention.keys(encoded)], dim=-1)

    def outputs(
        self, prepared: Tensor, valid: Tensor, states: Float[Tensor, "batch steps hidden"]
    ) -> tuple[Float[Tensor, "batch steps outputs"], Tensor | None]:
        """A score for every symbol of the vocabulary; with attention also [d ; d']."""
        if self.attention is None:
            return self.readout(states), None
        encoded, keys = prepared.chunk(2, dim=-1)
        scores = self.attention(keys, states)
        weights = scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
        both = torch.cat([states, weights @ encoded], dim=-1)
        return self.readout(both), both[:, -1]


def _at(points: Tensor, positions: Tensor) -> Tensor:
    """The coordinates at positions from 1 on; zero at the end symbol."""
    padded = functional.pad(points, (0, 0, 1, 0))
    return padded.gather(1, positions[..., None].expand(-1, -1, points.shape[-1]))


def _none(valid: Tensor) -> Tensor:
    """Nothing visited, (batch, 1, n)."""
    return torch.zeros_like(valid)[:, None]
