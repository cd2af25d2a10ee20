"""State collapse: whether a state overfills on sequences longer than the trained ones, where, and how much it can hold.

    statistics = state_statistics(model, tokens, every=128)
    for found in collapses(statistics, trained_length=1024):
        print(found.layer, found.leaf, found.unit, found.growth, found.channels)

On any mixer and any model that carries a state: the states themselves are looked at, through `model(tokens, state)`.

Source: Stuffed Mamba (arXiv 2410.07145), sections 2 to 4 and appendices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import ostinato.state
from ostinato.errors import ConfigurationError, ShapeError
from ostinato.mixers.base import Mixer
from ostinato.mixers.forgetting import Damped
from ostinato.mixers.heads import value_decay
from ostinato.ops.linear_attention import linear_attention
from ostinato.tasks.base import Batch

FORGET_LAW = (5.172, -4.469)
"""T_forget = 5.172 N − 4.469: the least training length, in thousands of tokens, from which N million numbers of
state are learned to be forgotten; the paper's fit to six sizes of Mamba-2."""
RECALL_LAW = (4.756, 1.365, -0.742)
"""T_recall = 4.756 (1.365^N − 1) − 0.742: the longest context, in thousands, with a passkey accuracy of 95%."""


def forget_threshold(state_size: float) -> float:
    """The least training length in tokens at which a state of so many numbers learns to forget (`FORGET_LAW`)."""
    slope, offset = FORGET_LAW
    return 1e3 * (slope * state_size / 1e6 + offset)


def recall_threshold(state_size: float) -> float:
    """The longest context in tokens from which a state of so many numbers gives a passkey back (`RECALL_LAW`)."""
    factor, base, offset = RECALL_LAW
    return 1e3 * (factor * (base ** (state_size / 1e6) - 1) + offset)


def state_size(model: nn.Module) -> int:
    """The numbers in the state of one sequence, all layers and the windows of convolutions included.

    Of a language model, its backbone's. Works on the meta device too: nothing need be allocated.
    """
    inner: Any = getattr(model, "backbone", model)
    return sum(leaf.numel() for _, leaf in ostinato.state.leaves(inner.initial_state(1)))


class StateStatistics(NamedTuple):
    """One leaf of the state along a sequence. A unit is a head, or the whole vector where there are no heads."""

    layer: int
    leaf: str
    positions: list[int]
    """How many tokens had been read."""
    mean: Float[Tensor, "points units"]
    variance: Float[Tensor, "points units"]
    """Over rows and channels, about that mean."""
    rms: Float[Tensor, "points units channels"]
    """Root mean square over the rows of every channel: where the outliers are."""


class Collapse(NamedTuple):
    """A unit whose state outgrows, past the trained length, what it was inside it."""

    layer: int
    leaf: str
    unit: int
    growth: float
    """The largest RMS of the unit beyond the trained length over the largest within."""
    position: int
    """Where it first exceeds the allowed growth."""
    channels: list[int]
    """The channels that overflow: those that themselves grew so much, largest first (at most 16)."""
    share: float
    """Their part of the unit's squared norm at its largest."""


@torch.no_grad()
def state_statistics(model: nn.Module, tokens: Tensor, *, every: int = 128) -> list[StateStatistics]:
    """Mean, variance and channels of every leaf of the state, after each `every` tokens and at the end.

    Args:
        model: `model(tokens, state) -> (outputs, state)`: a model, a backbone or one mixer; evaluated without dropout.
        tokens: ids (rows, time), or vectors (rows, time, width) for a mixer: the longer the better, many rows.
        every: tokens between two looks.

    Leaves that hold counters, and those that grow with time (attention's cache), are left out.
    Raises `ConfigurationError` for `every` below 1.
    """
    if every < 1:
        raise ConfigurationError(f"every must be at least 1 token, got {every}")
    looks: list[list[tuple[int, str, Tensor]]] = []
    positions: list[int] = []
    for stop, _, state in _pieces(model, tokens, every):
        positions.append(stop)
        looks.append(list(_layers(model, state)))
    found = []
    for index, (layer, leaf, first) in enumerate(looks[0]):
        series = [look[index][2] for look in looks]
        if first.numel() == 0 or any(value.shape != first.shape for value in series):
            continue
        if not (first.is_floating_point() or first.is_complex()):
            continue
        units = [_by_unit(value) for value in series]
        mean = torch.stack([value.mean((0, 2)) for value in units])
        variance = torch.stack([value.var((0, 2), correction=0) for value in units])
        rms = torch.stack([value.square().mean(0).sqrt() for value in units])
        found.append(StateStatistics(layer, leaf, positions, mean, variance, rms))
    return found


def _by_unit(value: Tensor) -> Float[Tensor, "rows units channels"]:
    """Float64 on the CPU; heads are the second of three axes or more."""
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    value = value.detach().double().cpu()
    return value.flatten(2) if value.ndim > 2 else value.reshape(value.shape[0], 1, -1)


def _layers(model: nn.Module, state: Any) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, path, leaf) of the state of a language model, a backbone or a mixer."""
    layers = getattr(state, "layers", state)
    if isinstance(model, Mixer):
        layers = (layers,)
    for index, layer in enumerate(layers):
        for path, leaf in ostinato.state.leaves(layer):
            yield index, path, leaf


def _pieces(model: nn.Module, tokens: Tensor, every: int) -> Iterator[tuple[int, Any, Any]]:
    """(tokens read, outputs of the piece, state) piece by piece, on the model's device, without dropout."""
    device = next(model.parameters()).device
    training, state = model.training, None
    model.eval()
    try:
        for start in range(0, tokens.shape[1], every):
            piece = tokens[:, start : start + every].to(device)
            outputs, state = model(piece, state)
            yield start + piece.shape[1], outputs, state
    finally:
        model.train(training)


def collapses(statistics: Sequence[StateStatistics], trained_length: int, *, factor: float = 2.0) -> list[Collapse]:
    """The units whose RMS exceeds, past `trained_length`, `factor` times the largest within it; worst first.

    A state that saturates, by forgetting as much as it writes, gives none. Raises `ConfigurationError` where the
    statistics do not reach to both sides of the length.
    """
    found = []
    for one in statistics:
        inside = [i for i, position in enumerate(one.positions) if position <= trained_length]
        beyond = [i for i, position in enumerate(one.positions) if position > trained_length]
        if not inside or not beyond:
            raise ConfigurationError(
                f"statistics at {one.positions[0]} … {one.positions[-1]} do not reach to both sides of the trained "
                f"length {trained_length}; pass a longer sequence or look more often"
            )
        size = one.rms.square().mean(-1).sqrt()
        limit, channel_limit = (factor * value[inside].amax(0) for value in (size, one.rms))
        for unit in range(size.shape[1]):
            over = [i for i in beyond if not size[i, unit] <= limit[unit]]
            if not over or limit[unit] == 0:
                continue
            peak = max(beyond, key=lambda i: float(size[i, unit].nan_to_num(nan=torch.inf)))
            square = one.rms[peak, unit].square()
            grown = (one.rms[peak, unit] > channel_limit[unit]).nonzero().flatten()
            grown = grown[square[grown].argsort(descending=True)][:16]
            found.append(
                Collapse(
                    one.layer,
                    one.leaf,
                    unit,
                    growth=float(factor * size[peak, unit] / limit[unit]),
                    position=one.positions[over[0]],
                    channels=grown.tolist(),
                    share=float(square[grown].sum() / square.sum()),
                )
            )
    return sorted(found, key=lambda one: -one.growth)


@torch.no_grad()
def loss_by_position(
    model: nn.Module, batches: Batch | Sequence[Batch], bins: Sequence[int], *, chunk: int = 1024
) -> list[dict[str, float]]:
    """Cross-entropy in nats and accuracy over the scored positions in [bins[i], bins[i + 1]), for every i.

    A bin without scored positions has count 0 and no loss. For text, `language_batch` makes the batch. Sequences are
    read in chunks of `chunk`, so that memory does not grow with their length; a batch's `reset` is heeded.
    """
    if len(bins) < 2 or any(low >= high for low, high in pairwise(bins)):
        raise ConfigurationError(f"bins are rising positions, at least two, got {list(bins)}")
    sums = torch.zeros(3, len(bins) - 1, dtype=torch.float64)
    edges = torch.tensor(bins)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in [batches] if isinstance(batches, Batch) else batches:
            state = None
            for start in range(0, batch.inputs.shape[1], chunk):
                piece = batch.steps(start, start + chunk).to(device)
                logits, state = model(piece.inputs, state, reset=piece.reset)
                loss = F.cross_entropy(logits.float().flatten(0, 1), piece.targets.flatten(), reduction="none").cpu()
                right = (logits.argmax(-1) == piece.targets).double().flatten().cpu()
                place = start + torch.arange(piece.inputs.shape[1]).expand_as(piece.targets).flatten()
                which = torch.bucketize(place, edges, right=True) - 1
                scored = piece.mask.flatten().cpu() & (which >= 0) & (which < len(bins) - 1)
                for row, values in enumerate((torch.ones_like(right), loss.double(), right)):
                    sums[row].index_add_(0, which[scored], values[scored])
    finally:
        model.train(training)
    return [
        {"from": low, "to": high, "count": n} | ({"loss": loss / n, "accuracy": right / n} if n else {})
        for (low, high), (n, loss, right) in zip(pairwise(bins), sums.T.tolist(), strict=True)
    ]


def language_batch(tokens: Int[Tensor, "rows time"]) -> Batch:
    """A text as a batch in which every next token is scored."""
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))


def explodes_at(
    losses: Sequence[float], positions: Sequence[int], trained_length: int, factor: float = 2.0
) -> int | None:
    """The first position whose loss exceeds `factor` × the largest within the trained length; None if none does.

    None is the paper's criterion of having learned to forget. Raises `ConfigurationError` if nothing lies within.
    """
    within = [loss for loss, position in zip(losses, positions, strict=True) if position <= trained_length]
    if not within:
        raise ConfigurationError(
            f"no position lies within the trained length {trained_length}: {list(positions)[:5]} …"
        )
    beyond = ((p, loss) for p, loss in zip(positions, losses, strict=True) if p > trained_length)
    return next((p for p, loss in beyond if not loss <= factor * max(within)), None)


def capacity(lengths: Sequence[int], accuracies: Sequence[float], threshold: float = 0.95) -> int:
    """T_recall: the longest length up to which every accuracy reaches the threshold; 0 if the first does not."""
    longest = 0
    for length, accuracy in sorted(zip(lengths, accuracies, strict=True)):
        if not accuracy >= threshold:
            break
        longest = length
    return longest


class Written(NamedTuple):
    """What one layer's engine was given for one sequence."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    log_decay: Tensor | None
    log_value_decay: Tensor | None
    """None but for `outer_gated_attention`."""


@contextmanager
def watched_scans(model: nn.Module) -> Iterator[list[Written]]:
    """A list of what every mixer with a matrix memory hands to its engine, while the block runs."""
    calls: list[Written] = []
    layers = [_holder(module) for module in model.modules() if isinstance(module, Mixer) and hasattr(module, "scan")]

    def watching(scan: Any) -> Any:
        def call(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> Any:
            *own, log_decay, _ = rest
            calls.append(Written(queries, keys, values, log_decay, value_decay(values, own)))
            return scan(queries, keys, values, *rest, **options)

        return call

    own = [vars(layer).get("scan") for layer in layers]
    for layer in layers:
        layer.scan = watching(layer.scan)  # type: ignore[assignment]
    try:
        yield calls
    finally:
        for layer, before in zip(layers, own, strict=True):
            with suppress(AttributeError):
                del layer.scan
            if before is not None:
                layer.scan = before


def _holder(layer: Any) -> Any:
    """What has the engine that decays and writes reach as they act: the mixer, or the damping before its engine."""
    while isinstance(layer.scan, Damped):
        layer = layer.scan
    return layer


@torch.no_grad()
def retention_profile(model: nn.Module, tokens: Tensor) -> list[Float[Tensor, "time heads"]]:
    """α_{1:t}, layer by layer: what is left of the first token at every position, per head, averaged over rows.

    α_{1:t} = ∏_{i=2…t} α_i, summed as logarithms; the mean over key channels where each has its own decay, and times
    that of β_{1:t} over value channels where these decay too (the gate is α βᵀ). A head whose value is near 1 at the
    trained length has not learned to forget. A memory without decay has 1 everywhere.
    """
    with watched_scans(model) as calls:
        training = model.training
        model.eval()
        try:
            model(tokens)
        finally:
            model.train(training)
    if not calls:
        raise ConfigurationError("there is no mixer with a matrix memory in this model, so nothing says how it decays")
    found = []
    for call in calls:
        if call.log_decay is None:
            found.append(torch.ones(tokens.shape[1], call.keys.shape[2], dtype=torch.float64))
            continue
        left = _left(call.log_decay)
        found.append((left if call.log_value_decay is None else left * _left(call.log_value_decay)).mean(0).cpu())
    return found


def _left(log_decay: Tensor) -> Float[Tensor, "batch time heads"]:
    """∏_{i=2…t} of the decays, the mean over channels where there are any."""
    log_decay = log_decay.double().clone()
    log_decay[:, 0] = 0
    left = log_decay.cumsum(1).exp()
    return left.mean(-1) if left.ndim == 4 else left


@torch.no_grad()
def retrieval_error(
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_decay: Tensor | None,
    written: int,
) -> tuple[Float[Tensor, "rest heads"], Float[Tensor, "rest heads"]]:
    """(signal, noise) from position `written` on, when what was written there is read by its own key k_s.

    signal = ‖α_{s+1:t} (k_sᵀ k_s) v_s‖, noise = ‖Σ_{i ≠ s} α_{i+1:t} (k_sᵀ k_i) v_i‖, root mean squares over the batch.
    The noise grows with t unless the memory forgets; for `linear_attention`'s memories.

    Raises `ShapeError` for a position that is not there.
    """
    if not 0 <= written < keys.shape[1]:
        raise ShapeError(f"there is no position {written} in a sequence of {keys.shape[1]}")
    keys, values = keys.double(), values.double()
    gates = None if log_decay is None else log_decay.double()
    queries = keys[:, written : written + 1].expand_as(keys)
    whole, _ = linear_attention(queries, keys, values, gates)
    alone = torch.zeros_like(values)
    alone[:, written] = values[:, written]
    signal, _ = linear_attention(queries, keys, alone, gates)

    def size(x: Tensor) -> Tensor:
        return x[:, written:].square().sum(-1).mean(0).sqrt().cpu()

    return size(signal), size(whole - signal)
