"""Finite networks of the specifications of `theory/kernels.py`, drawn and trained many at a time.

    network, draws = draw_networks(spec, features=2, width=800, draws=20, seed=0)
    outputs = run_networks(network, draws, x)                     # (draws, inputs, outputs)
    draws = descend(network, draws, x, y, rate=1.0, steps=200)

All parameters are N(0, 1) and the scales stand in the maps, so that one learning rate serves every layer and width.

Source: Jacot et al. (arXiv 1806.07572), section 2 and remark 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ostinato.errors import ConfigurationError, DivergenceError
from ostinato.theory.kernels import Activation, Dense, Recurrent, Residual, Spec

Draws = dict[str, Tensor]
"""Parameters by name, each with a leading axis over the draws."""


class ScaledLinear(nn.Module):
    """z = (scale/√features) W a + shift · b; b is there only for a shift that is not 0."""

    def __init__(self, features: int, outputs: int, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale / math.sqrt(features), shift
        self.weight = nn.Parameter(torch.randn(outputs, features))
        self.bias = nn.Parameter(torch.randn(outputs)) if shift else None

    def forward(self, a: Float[Tensor, "... features"]) -> Float[Tensor, "... outputs"]:
        """The map."""
        z = self.scale * (a @ self.weight.mT)
        return z if self.bias is None else z + self.shift * self.bias


class WideNetwork(nn.Module):
    """The network of a specification: hidden `Dense` and `Recurrent` have `width` units, the last `Dense` `outputs`.

    Args:
        spec: as in `theory.kernels`; it ends in `Dense`.
        features: width of the input, or of one step of it.
        width: n.
        outputs: of the network.

    Raises:
        ConfigurationError: the specification does not end in `Dense`, or adds what differs in width.
    """

    def __init__(self, spec: Spec, features: int, width: int, outputs: int = 1) -> None:
        super().__init__()
        if not spec or not isinstance(spec[-1], Dense):
            raise ConfigurationError("a network's spec must end in Dense, its readout")
        self.spec = tuple(spec)
        self.maps = nn.ModuleList()
        last = self._grow(self.spec[:-1], features, width)
        self.maps.append(ScaledLinear(last, outputs, spec[-1].weight, spec[-1].bias))

    def _grow(self, layers: Spec, current: int, width: int) -> int:
        for layer in layers:
            if isinstance(layer, Dense):
                self.maps.append(ScaledLinear(current, width, layer.weight, layer.bias))
                current = width
            elif isinstance(layer, Recurrent):
                self.maps.append(ScaledLinear(current, width, layer.inputs, layer.bias))
                self.maps.append(ScaledLinear(width, width, layer.weight, 0.0))
                current = width
            elif isinstance(layer, Residual) and self._grow(layer.branch, current, width) != current:
                raise ConfigurationError(
                    f"a Residual of width {width} follows a layer of width {current}: put Dense first"
                )
        return current

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch outputs"]:
        """The outputs."""
        return self._run(self.spec, x, iter(self.maps))

    def _run(self, layers: Spec, x: Tensor, maps: Iterator[nn.Module]) -> Tensor:
        for layer in layers:
            if isinstance(layer, Activation):
                x = layer(x)
            elif isinstance(layer, Dense):
                x = next(maps)(x)
            elif isinstance(layer, Residual):
                x = x + self._run(layer.branch, x, maps)
            elif isinstance(layer, Recurrent):
                from_input, from_state = next(maps), next(maps)
                hidden = layer.activation(from_input(x[:, 0]))
                for t in range(1, x.shape[1]):
                    hidden = layer.activation(from_input(x[:, t]) + from_state(hidden))
                x = hidden
        return x


def draw_networks(
    spec: Spec,
    features: int,
    width: int,
    draws: int,
    *,
    seed: int = 0,
    outputs: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[WideNetwork, Draws]:
    """A network and `draws` independent draws of its parameters, N(0, 1) from the seed (drawn on `device`)."""
    with torch.device("meta"):
        network = WideNetwork(spec, features, width, outputs)
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    drawn = {
        name: torch.randn(draws, *parameter.shape, generator=generator, dtype=dtype, device=device)
        for name, parameter in network.named_parameters()
    }
    return network, drawn


def run_networks(network: nn.Module, draws: Draws, x: Tensor) -> Float[Tensor, "draws batch outputs"]:
    """The outputs of every draw."""
    return vmap(lambda parameters: functional_call(network, parameters, (x,)))(draws)


def descend(
    network: nn.Module,
    draws: Draws,
    x: Float[Tensor, "batch ..."],
    y: Float[Tensor, " batch"],
    *,
    rate: float,
    steps: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Draws:
    """Full gradient descent of every draw on ½ mean (f(x) − y)²; the parameters given are left as they were.

    Args:
        network, draws: of one output.
        x, y: all of the training set.
        rate: the learning rate η. With N points the function moves by (η/N) Θ a step.
        steps: how many.
        watch: called with the step and the outputs (draws, batch) before it, and once after the last.

    Raises:
        DivergenceError: the outputs are no longer finite; the rate is above 2/λ_max of Θ/N.
    """
    draws = {name: value.clone().requires_grad_() for name, value in draws.items()}
    for step in range(steps):
        outputs = run_networks(network, draws, x).squeeze(-1)
        if watch is not None:
            watch(step, outputs.detach())
        loss = 0.5 * (outputs - y).square().mean(dim=1).sum()
        gradients = torch.autograd.grad(loss, list(draws.values()))
        with torch.no_grad():
            for value, gradient in zip(draws.values(), gradients, strict=True):
                value.sub_(gradient, alpha=rate)
    draws = {name: value.detach() for name, value in draws.items()}
    with torch.no_grad():
        outputs = run_networks(network, draws, x).squeeze(-1)
    if not outputs.isfinite().all():
        raise DivergenceError(f"gradient descent diverged at rate {rate}; take one below 2/λ_max of the kernel over N")
    if watch is not None:
        watch(steps, outputs)
    return draws
