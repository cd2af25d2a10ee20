"""AR-Net: autoregression as a one-layer network, trained by gradient descent with a pull towards few lags.

    model = ARNet(100)
    model.fit(series, penalty=SparsityPenalty(sparsity=0.03))
    model.coefficients                      # (1, 100): [0, 0] belongs to the latest value
    model.predict(series, steps=12)

    fit_ar_nets(many_series, orders=(10, 100), penalties=…)     # every series and every order as one batch

Triebe, Laptev and Rajagopal 2019, arXiv 1911.12436, sections 2 and 3; constants of the authors' code. Compare with
the closed forms in `ostinato.models.autoregression`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ostinato.errors import ConfigurationError, DataError, DivergenceError
from ostinato.models.autoregression import lag_windows

_RAMPS = ("linear", "quadratic")


@dataclass(frozen=True)
class SparsityPenalty:
    """λ(s) R(w): a bounded pull on each lag's weight, strong near zero and none on large weights.

        λ(s) = c_lambda (1/s − 1)
        R(w) = mean_i 2 / (1 + exp(−c1 |w_i|^{1/c2})) − 1

    R is for a series of unit variance; scale c_lambda with the loss otherwise (about √L/100). c1 = c2 = 3 in the paper.
    """

    sparsity: float
    """s, the share of lags that are expected to matter: 1 penalises nothing."""
    c_lambda: float = 0.01
    c1: float = 3.0
    c2: float = 3.0
    ramp: str = "linear"
    """How λ grows over the epochs from 0: "linear" up to the last, "quadratic" up to the middle of training."""

    def __post_init__(self) -> None:
        if not 0 < self.sparsity <= 1:
            raise ConfigurationError(f"sparsity is a share of the lags, above 0 and at most 1; got {self.sparsity}")
        if self.ramp not in _RAMPS:
            raise ConfigurationError(f"there is no ramp {self.ramp!r}; choose one of {', '.join(_RAMPS)}")

    @property
    def strength(self) -> float:
        """λ(s) at the end of the ramp."""
        return self.c_lambda * (1 / self.sparsity - 1)

    def at(self, epoch: int, epochs: int) -> float:
        """λ in one epoch: none in the first (from the start it would keep true weights from growing)."""
        done = epoch / max(1, epochs - 1)
        return self.strength * (done if self.ramp == "linear" else min(1.0, 2 * done) ** 2)

    def regulariser(self, weights: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
        """R(w), from 0 (all zero) to below 1. The root's slope at zero is kept finite by 1e-8 inside."""
        return (2 * torch.sigmoid(self.c1 * (weights.abs() + 1e-8) ** (1 / self.c2)) - 1).mean()


class ARNet(nn.Module):
    """ŷ = c + W (y_{t−1}, …, y_{t−p}), or a ReLU network of the same lags.

    Args:
        p: the number of lags, which may be far above the true order.
        n_forecasts: values forecast at once; roll-outs go on from there.
        hidden: widths of ReLU layers in front of the linear one; then the weights are no longer coefficients.

    Raises:
        ConfigurationError: a size below 1.
    """

    def __init__(self, p: int, n_forecasts: int = 1, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        sizes = [p, *hidden, n_forecasts]
        if min(sizes) < 1:
            raise ConfigurationError(f"p, n_forecasts and hidden widths must be at least 1, got {sizes}")
        self.p, self.n_forecasts = p, n_forecasts
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def first(self) -> nn.Linear:
        """The layer that reads the lags: the one that is penalised."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def coefficients(self) -> Float[Tensor, "n_forecasts p"]:
        """The weights of the lags, the latest first. Raises `ConfigurationError` if there are hidden layers."""
        if len(self.layers) > 1:
            raise ConfigurationError("a network with hidden layers has no autoregressive coefficients")
        return self.first.weight.detach()

    def forward(self, lags: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch n_forecasts"]:
        """The forecast from the last p values, the latest first."""
        return self.layers(lags)

    def fit(
        self,
        series: Float[Tensor, " length"],
        *,
        penalty: SparsityPenalty | None = None,
        epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        decay: float = 0.75,
        seed: int = 0,
    ) -> list[float]:
        """Adam on the mean squared error plus the penalty; returns the squared error of each epoch.

        Args:
            series: of about unit variance and zero mean (standardise it first, by its training part).
            penalty: on the weights of the lags, never on the bias; None is plain least squares.
            epochs, batch_size: passes over all windows, in random order, and how many make a step.
            learning_rate, decay: of the first epoch, and the factor from one epoch to the next. The paper's 2e-4 is
                for some 100 000 samples; fewer need more.
            seed: of the order.

        Raises:
            DataError: a series too short for one window.
            DivergenceError: the loss is no longer finite.
        """
        lags, targets = lag_windows(series.to(self.first.weight), self.p, self.n_forecasts)

        def loss(rows: Int[Tensor, " batch"]) -> Tensor:
            return (self(lags[rows]) - targets[rows]).square().mean()

        def pull(epoch: int) -> Tensor:
            assert penalty is not None
            return penalty.at(epoch, epochs) * penalty.regulariser(self.first.weight)

        descent = _Descent(epochs, batch_size, learning_rate, decay, seed)
        return descent(self.parameters(), len(lags), loss, pull if penalty else None)

    @torch.no_grad()
    def predict(self, history: Float[Tensor, " length"], steps: int) -> Float[Tensor, " steps"]:
        """The next `steps` values; forecasts beyond the first n_forecasts read earlier forecasts as lags.

        Raises `DataError` for a history shorter than p.
        """
        if len(history) < self.p:
            raise DataError(f"a history of {len(history)} values is shorter than the {self.p} lags of this model")
        known = history.to(self.first.weight)[len(history) - self.p :]
        while len(known) < self.p + steps:
            known = torch.cat([known, self(known[-self.p :].flip(0))])
        return known[self.p : self.p + steps]


def fit_ar_nets(
    series: Float[Tensor, "members length"],
    orders: Sequence[int],
    penalties: Sequence[SparsityPenalty | None],
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    decay: float = 0.75,
    seed: int = 0,
) -> tuple[Float[Tensor, "members orders lags"], Float[Tensor, "members orders"]]:
    """Fit one AR-Net for every series and every order, all at once; the arguments are those of `ARNet.fit`.

    Each network is its own: losses are summed, and Adam works on each weight alone. All see the same windows of
    max(orders) lags, of which a lower order reads the latest.

    Returns:
        The coefficients (zero beyond a network's order) and the intercepts.

    Raises:
        ConfigurationError: not one penalty (or None) for each order.
        DataError, DivergenceError: as `ARNet.fit`.
    """
    if not orders or len(orders) != len(penalties):
        raise ConfigurationError(f"pass one penalty or None for each order; got {len(orders)} and {len(penalties)}")
    members, most = series.shape[0], max(orders)
    lags, targets = lag_windows(series, most)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(members, len(orders), most)
    for index, order in enumerate(orders):
        weights[:, index, :order] = (2 * torch.rand(members, order, generator=generator) - 1) / order**0.5
    mask = torch.stack([torch.arange(most) < order for order in orders]).to(series)
    weights = weights.to(series).requires_grad_()
    intercepts = series.new_zeros(members, len(orders), requires_grad=True)

    def loss(rows: Int[Tensor, " batch"]) -> Tensor:
        forecast = torch.baddbmm(intercepts[:, None], lags[:, rows], (weights * mask).transpose(1, 2))
        return (forecast - targets[:, rows]).square().mean(1).sum()

    def pull(epoch: int) -> Tensor:
        return sum(
            (
                members * penalty.at(epoch, epochs) * penalty.regulariser(weights[:, index, :order])
                for index, (order, penalty) in enumerate(zip(orders, penalties, strict=True))
                if penalty is not None
            ),
            start=series.new_zeros(()),
        )

    descent = _Descent(epochs, batch_size, learning_rate, decay, seed)
    descent([weights, intercepts], lags.shape[1], loss, pull if any(penalties) else None)
    return weights.detach() * mask, intercepts.detach()


@dataclass(frozen=True)
class _Descent:
    """Adam over shuffled rows, the learning rate multiplied by `decay` after each epoch."""

    epochs: int
    batch_size: int
    learning_rate: float
    decay: float
    seed: int

    def __call__(
        self,
        parameters: Iterable[Tensor],
        count: int,
        loss: Callable[[Tensor], Tensor],
        pull: Callable[[int], Tensor] | None,
    ) -> list[float]:
        """Minimise loss(rows) + pull(epoch) over `count` rows; returns each epoch's mean loss, without the pull."""
        parameters = list(parameters)
        device = parameters[0].device
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        losses = []
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.decay**epoch
            total = torch.zeros((), device=device)
            for rows in torch.randperm(count, generator=generator).to(device).split(self.batch_size):
                optimizer.zero_grad()
                error = loss(rows)
                # In the first epoch there is no pull, and nothing to compute.
                (error + pull(epoch) if pull and epoch else error).backward()
                optimizer.step()
                total += error.detach() * len(rows)
            losses.append(total.item() / count)
            if not torch.isfinite(total):
                raise DivergenceError(f"the loss is {losses[-1]} in epoch {epoch}; standardise the series")
        return losses
